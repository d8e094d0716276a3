"""What a report draws, as plain numbers: charts of panels of series."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from statistics import mean, stdev
from typing import Any, Literal

from fedsam.report.domains import MEAN, leave_one_out
from fedsam.report.scalars import GAPS, Tau, scalars, sharpness, taus
from fedsam.report.table import Cell, ResultTable, short, words
from fedsam.runs import metrics
from fedsam.runs.metrics import heading, words_of
from fedsam.runs.run import Run


@dataclass(frozen=True)
class Series:
    """A method's values, with a sample standard deviation to either side.

    Attributes
    ----------
    label : str
        The row of the table.
    number : int
        Of the row: its colour.
    x : list
        Rounds, names or other numbers.
    y, spread : list of float
        As many.
    """

    label: str
    number: int
    x: list[Any]
    y: list[float]
    spread: list[float]


@dataclass(frozen=True)
class Panel:
    """One pair of axes; labels of its own, or the chart's."""

    title: str
    series: list[Series]
    x_label: str = ""
    y_label: str = ""


@dataclass(frozen=True)
class Chart:
    """Panels side by side: those of bands and names are on one scale, from zero.

    Attributes
    ----------
    name : str
        Of its files.
    heading, x_label, y_label : str
        What is seen.
    panels : list of Panel
        At least one.
    categories : list of str
        The places on the x axis where they are names.
    kind : str
        "bands" over rounds, "names", "values" (lines over a number, which the panels share), or
        "points".
    """

    name: str
    heading: str
    x_label: str
    y_label: str
    panels: list[Panel]
    categories: list[str] = field(default_factory=list)
    kind: Literal["bands", "names", "values", "points"] = "bands"

    @property
    def one_scale(self) -> bool:
        """Whether the panels share their y axis, from zero."""
        return self.kind in ("bands", "names")

    @property
    def top(self) -> float:
        """The largest value, with its deviation."""
        every = [series for panel in self.panels for series in panel.series]
        return max(y + s for one in every for y, s in zip(one.y, one.spread, strict=True))


Settings = dict[str, Any]


def measured_charts(table: ResultTable) -> list[Chart]:
    """Return every chart that the runs have data for."""
    return against_options(table) + against_the_gap(table)


def against_the_gap(table: ResultTable) -> list[Chart]:
    """Return, for each measure of sharpness, its numbers against the generalisation gap."""
    charts = []
    every = sorted(taus(table), key=lambda tau: (tau.scalar.measure, tau.gap))
    for measure, of_measure in groupby(every, key=lambda tau: tau.scalar.measure):
        panels = [_scatter(table, tau) for tau in of_measure]
        heading = f"Generalisation gap against {measure}"
        charts.append(Chart(f"gap-{_slug(measure)}", heading, "", "", panels, kind="points"))
    return charts


def _scatter(table: ResultTable, tau: Tau) -> Panel:
    series = []
    for number, row in enumerate(table.rows):
        runs = [run for run in tau.runs if table.row(run) == row]
        x, y = tau.points(runs)
        if x:
            series.append(Series(row, number, x, y, [0.0] * len(y)))
    several = len({run.config.dataset for run in table.runs}) > 1
    dataset = f"{tau.dataset}, " if several else ""
    title = f"{dataset}{tau.scalar.name}: {tau}"
    return Panel(title, series, str(tau.scalar), GAPS[tau.gap].label)


def against_options(table: ResultTable) -> list[Chart]:
    """Return the headline and all that was measured against each number in which like runs differ.

    A number is a config key (rho) or an entry of its options (the ``start`` of a late phase). A
    line is what the runs have in common otherwise; it needs two numbers at least.
    """
    settings = {run.path: _settings(table, run) for run in table.runs}
    keys = sorted({key for values in settings.values() for key in values})
    measured = [s for s in scalars(table) if s in sharpness(table) or s.measure == metrics.LIFELONG]
    charts = []
    for key in keys:
        if key == "alpha" and not measured:  # the headline against alpha has a chart of its own
            continue
        lines = _lines(table, settings, key)
        panels = [Panel("", _values(lines, _percent), key, f"{table.headline} (%)")]
        panels += [Panel("", _values(lines, scalar.of), key, str(scalar)) for scalar in measured]
        drawn = [panel for panel in panels if any(len(one.x) > 1 for one in panel.series)]
        if drawn:
            more = " and what was measured" if measured else ""
            title = f"{heading(table.headline)}{more} against {key}"
            charts.append(Chart(f"option-{_slug(key)}", title, key, "", drawn, kind="values"))
    return charts


def _settings(table: ResultTable, run: Run) -> Settings:
    """Return in what a run may differ from others of its method, options entry by entry."""
    settings: Settings = {}
    for key in (*table.column_keys, *table.row_keys):
        value, name = getattr(run.config, key), key.replace("_", " ")
        if isinstance(value, dict):
            settings |= {f"{name}: {entry}": option for entry, option in value.items()}
        else:
            settings[name] = value
    return settings


def _lines(
    table: ResultTable, settings: dict[Any, Settings], key: str
) -> dict[str, dict[float, list[Run]]]:
    """Return the runs by line, and by the number at ``key``; others take no part."""
    settings = {path: values for path, values in settings.items() if _is_number(values.get(key))}
    differing = {
        other
        for other in {name for values in settings.values() for name in values}
        if other != key and len({repr(values.get(other)) for values in settings.values()}) > 1
    }
    lines: dict[str, dict[float, list[Run]]] = {}
    for run in table.runs:
        if (values := settings.get(run.path)) is None:
            continue
        both = sorted(differing & set(values))
        rest = [f"{name.rpartition(': ')[2]} {short(values[name])}" for name in both]
        label = ", ".join([run.method, *rest])
        lines.setdefault(label, {}).setdefault(float(values[key]), []).append(run)
    return lines


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _values(
    lines: dict[str, dict[float, list[Run]]], value_of: Callable[[Run], float | None]
) -> list[Series]:
    """Return a line each, over the numbers at which its runs have a value."""
    series = []
    for number, (label, by_number) in enumerate(sorted(lines.items())):
        x, y, spread = [], [], []
        for place, runs in sorted(by_number.items()):
            values = [value for run in runs if (value := value_of(run)) is not None]
            if values:
                x.append(place)
                y.append(mean(values))
                spread.append(stdev(values) if len(values) > 1 else 0.0)
        if x:
            series.append(Series(label, number, x, y, spread))
    return series


def _percent(run: Run) -> float | None:
    return None if math.isnan(run.final) else 100 * run.final


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


MOST_GROUPS = 10  # in a panel
# of metrics.jsonl, with the heading and the axis that they get and the factor they are shown with
OVER_ROUNDS = (
    (metrics.WORST, "The worst group of test images", "the worst group (%)", 100),
    (
        metrics.GAP,
        "The gap between groups of test images",
        "best - worst, or seen - unseen (points)",
        100,
    ),
    (metrics.LOSS, "Loss", "test loss (nats)", 1),
    (metrics.CLIENT_NORM, "How far clients walk in a round", "root mean square of |w_k - w|", 1),
    (
        metrics.CLIENT_DRIFT,
        "How far from each other they end",
        "root mean square of |w_k - mean|",
        1,
    ),
    (metrics.UPDATE_NORM, "How far the server goes", "|w_new - w|", 1),
)


def all_charts(table: ResultTable, target: float | None) -> list[Chart]:
    """Return every chart that the runs have data for."""
    charts = [of_headline(table, headline) for headline in table.headlines]
    if "alpha" in table.column_keys:
        charts.append(against_alpha(table))
    charts += by_domain(table)
    charts += [of_groups(table), *(over_rounds(table, *row) for row in OVER_ROUNDS)]
    if target is not None:
        charts += to_target(table, target)
    charts += measured_charts(table)
    return [chart for chart in charts if chart.panels]


def of_headline(table: ResultTable, headline: str) -> Chart:
    """Return a headline over rounds, of the runs whose headline it is."""
    words = words_of(headline)
    return over_rounds(table, headline, heading(words), f"test {words} (%)", 100, headline)


def of_groups(table: ResultTable) -> Chart:
    """Return the headline of each group of test images over rounds: a panel a method and column.

    Means over seeds. Of more than ten groups, the five that end worst and the five that end best.
    """
    panels = []
    names = list(
        dict.fromkeys(n for run in table.runs for n in run.summary.get(metrics.GROUPS, {}))
    )
    for column in table.columns:
        for row in table.rows:
            cell = table.cells.get((row, column))
            series = _series_of_groups(cell, names) if cell else []
            if series:
                title = ", ".join(filter(None, [row, _heading(table, column)]))
                panels.append(Panel(title, series))
    title = f"{heading(table.headline)} of groups of test images"
    return Chart("groups", title, "round", f"test {table.headline} (%)", panels)


def _series_of_groups(cell: Cell, names: Sequence[str]) -> list[Series]:
    """Return a line for each group; without bands, as those of ten lines would hide each other.

    Of the ``names`` of all groups each has a colour of its own in every panel, if they are few.
    """
    every = cell.runs[0].summary.get(metrics.GROUPS, {})
    ranked = sorted((group for group in every if every[group] is not None), key=every.__getitem__)
    half = MOST_GROUPS // 2
    chosen = ranked if len(ranked) <= MOST_GROUPS else ranked[:half] + ranked[-half:]
    series = []
    shown = names if len(names) <= MOST_GROUPS else [group for group in every if group in chosen]
    for number, name in enumerate(shown):
        if name not in chosen:
            continue
        rounds, middle, _ = over_seeds([_of_group(run, name) for run in cell.runs])
        if rounds:
            percent = [100 * value for value in middle]
            series.append(Series(name, number, rounds, percent, [0.0] * len(rounds)))
    return series


def _of_group(run: Run, name: str) -> dict[int, float]:
    """Return the headline of a group by round, where it was measured."""
    curve: dict[int, Any] = run.curve(metrics.GROUPS)
    every = {r: groups.get(name, {}) for r, groups in curve.items()}
    return {r: v for r, of in every.items() if (v := of.get(run.headline)) is not None}


def over_rounds(
    table: ResultTable, name: str, heading: str, y_label: str, factor: int, headline: str = ""
) -> Chart:
    """Return a metric over rounds: a panel a column, a line a method, bands over seeds.

    With a ``headline``, of those runs whose headline it is.
    """
    panels = []
    for column in table.columns:
        series = []
        for number, row in enumerate(table.rows):
            cell = table.cells.get((row, column))
            if cell is None or (headline and cell.runs[0].headline != headline):
                continue
            rounds, middle, spread = over_seeds([run.curve(name) for run in cell.runs])
            if rounds:
                shown = [[factor * value for value in values] for values in (middle, spread)]
                series.append(Series(row, number, rounds, *shown))
        if series:
            panels.append(Panel(_heading(table, column), series))
    return Chart(name.replace("_", "-"), heading, "round", y_label, panels)


def over_seeds(curves: Sequence[dict[int, float]]) -> tuple[list[int], list[float], list[float]]:
    """Return the rounds that all curves have, and mean and deviation over them."""
    rounds = sorted(set.intersection(*map(set, curves)))
    values = [[curve[r] for curve in curves] for r in rounds]
    return rounds, [mean(v) for v in values], [_deviation(v) for v in values]


def against_alpha(table: ResultTable) -> Chart:
    """Return the final headline against alpha: a panel for each other setting."""
    place = table.column_keys.index("alpha")
    alphas = sorted({column[place] for column in table.columns})
    others = sorted({(*c[:place], *c[place + 1 :]) for c in table.columns})
    keys = (*table.column_keys[:place], *table.column_keys[place + 1 :])
    panels = []
    for other in others:
        series = []
        for number, row in enumerate(table.rows):
            cells = {
                f"{alpha:g}": table.cells[row, column]
                for alpha in alphas
                if (row, column := (*other[:place], alpha, *other[place:])) in table.cells
            }
            known = {x: cell for x, cell in cells.items() if not math.isnan(cell.mean)}
            y = [100 * cell.mean for cell in known.values()]
            spread = [100 * (cell.deviation or 0.0) for cell in known.values()]
            if y:
                series.append(Series(row, number, list(known), y, spread))
        panels.append(Panel(words(keys, other), series))
    return Chart(
        "alpha",
        f"{heading(table.headline)} against heterogeneity",
        "alpha (0: one class a client)",
        f"{table.headline} (%), last 100 rounds",
        panels,
        [f"{alpha:g}" for alpha in alphas],
        "names",
    )


def by_domain(table: ResultTable) -> list[Chart]:
    """Return a chart a figure of every method on each domain that was left out, and their mean."""
    charts = []
    numbers = {row: number for number, row in enumerate(table.rows)}
    for figure, group in groupby(leave_one_out(table), key=lambda one: one.figure):
        every = list(group)
        panels = []
        names = list(dict.fromkeys(name for one in every for name in [*one.domains, MEAN]))
        for one in every:
            series = []
            for row, values in one.values.items():
                x = [name for name in [*one.domains, MEAN] if values[name]]
                y = [100 * mean(values[name]) for name in x]
                spread = [100 * _deviation(values[name]) for name in x]
                series.append(Series(row, numbers[row], x, y, spread))
            panels.append(Panel(one.setting, series))
        title = f"{heading(table.headline)} on the domain that is left out, {figure}"
        label = f"{table.headline} (%)"
        name = f"leave-out-{_slug(figure)}"
        charts.append(Chart(name, title, "domain that is left out", label, panels, names, "names"))
    return charts


def to_target(table: ResultTable, target: float) -> list[Chart]:
    """Return rounds, and seconds of training, to a target; methods of which all seeds got there.

    ``target`` lies in [0, 1].
    """
    titles = [_heading(table, column) or "all" for column in table.columns]
    charts = []
    for which, unit in enumerate(("rounds", "seconds")):
        series = []
        for number, row in enumerate(table.rows):
            x, y, spread = [], [], []
            for column, title in zip(table.columns, titles, strict=True):
                cell = table.cells.get((row, column))
                reached = [run.reaches(target) for run in cell.runs] if cell else []
                values = [pair[which] for pair in reached if pair]
                if values and len(values) == len(reached):
                    x.append(title)
                    y.append(mean(values))
                    spread.append(_deviation(values))
            if x:
                series.append(Series(row, number, x, y, spread))
        panels = [Panel("", series)] if series else []
        label = f"{unit} to {target:.0%} {table.headline}"
        charts.append(
            Chart(f"{unit}-to-target", heading(label), "", label, panels, titles, "names")
        )
    return charts


def partitions(table: ResultTable) -> list[tuple[str, Run]]:
    """Return a run of each column, whose split stands for the others', and a title."""
    first: dict[tuple[Any, ...], Run] = {}
    for (_, column), cell in table.cells.items():
        first.setdefault(column, cell.runs[0])
    several = len({run.config.seed for run in table.runs}) > 1
    titled = []
    for column in table.columns:
        seed = f"seed {first[column].config.seed}" if several else ""
        titled.append((", ".join(filter(None, [_heading(table, column), seed])), first[column]))
    return titled


def _heading(table: ResultTable, column: tuple[Any, ...]) -> str:
    return words(table.column_keys, column)


def _deviation(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0
