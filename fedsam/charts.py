"""Which charts a report holds; figures.py draws them on paper, page.py in a browser."""

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from fedsam.measured_charts import measured_charts
from fedsam.panels import Chart, Panel, Series
from fedsam.results import Cell, Grid, Run, words

# of metrics.jsonl, with the heading and the axis that they get and the factor they are shown with
OVER_ROUNDS = (
    ("accuracy", "Accuracy", "test accuracy (%)", 100),
    ("loss", "Loss", "test loss (nats)", 1),
    ("client_norm", "How far clients walk in a round", "root mean square of |w_k - w|", 1),
    ("client_drift", "How far from each other they end", "root mean square of |w_k - mean|", 1),
    ("update_norm", "How far the server goes", "|w_new - w|", 1),
)


def all_charts(grid: Grid, target: float | None) -> list[Chart]:
    """Return every chart that the runs have data for."""
    charts = [over_rounds(grid, *given) for given in OVER_ROUNDS]
    if "alpha" in grid.column_keys:
        charts.insert(1, against_alpha(grid))
    if target is not None:
        charts += to_target(grid, target)
    charts += measured_charts(grid)
    return [chart for chart in charts if chart.panels]


def over_rounds(grid: Grid, name: str, heading: str, y_label: str, factor: int) -> Chart:
    """Return a metric over rounds: a panel a column, a line a method, bands over seeds."""
    panels = []
    for column in grid.columns:
        series = []
        for number, row in enumerate(grid.rows):
            if (cell := grid.cells.get((row, column))) is None:
                continue
            rounds, middle, spread = over_seeds(cell, name)
            if rounds:
                shown = [[factor * value for value in values] for values in (middle, spread)]
                series.append(Series(row, number, rounds, *shown))
        if series:
            panels.append(Panel(_heading(grid, column), series))
    return Chart(name.replace("_", "-"), heading, "round", y_label, panels)


def over_seeds(cell: Cell, name: str) -> tuple[list[int], list[float], list[float]]:
    """Return the rounds that all runs measured, and mean and deviation of a metric at them."""
    found = [run.curve(name) for run in cell.runs]
    rounds = sorted(set.intersection(*map(set, found)))
    values = [[curve[r] for curve in found] for r in rounds]
    return rounds, [mean(v) for v in values], [_deviation(v) for v in values]


def against_alpha(grid: Grid) -> Chart:
    """Return final accuracy against alpha: a panel for each other setting."""
    place = grid.column_keys.index("alpha")
    alphas = sorted({column[place] for column in grid.columns})
    others = sorted({(*c[:place], *c[place + 1 :]) for c in grid.columns})
    keys = (*grid.column_keys[:place], *grid.column_keys[place + 1 :])
    panels = []
    for other in others:
        series = []
        for number, row in enumerate(grid.rows):
            cells = {
                f"{alpha:g}": grid.cells[row, column]
                for alpha in alphas
                if (row, column := (*other[:place], alpha, *other[place:])) in grid.cells
            }
            known = {x: cell for x, cell in cells.items() if not math.isnan(cell.mean)}
            y = [100 * cell.mean for cell in known.values()]
            spread = [100 * (cell.deviation or 0.0) for cell in known.values()]
            if y:
                series.append(Series(row, number, list(known), y, spread))
        panels.append(Panel(words(keys, other), series))
    return Chart(
        "alpha",
        "Accuracy against heterogeneity",
        "alpha (0: one class a client)",
        "accuracy (%), last 100 rounds",
        panels,
        [f"{alpha:g}" for alpha in alphas],
        "names",
    )


def to_target(grid: Grid, target: float) -> list[Chart]:
    """Return rounds, and seconds of training, to an accuracy; methods of which all seeds got there.

    ``target`` lies in [0, 1].
    """
    titles = [_heading(grid, column) or "all" for column in grid.columns]
    charts = []
    for which, unit in enumerate(("rounds", "seconds")):
        series = []
        for number, row in enumerate(grid.rows):
            x, y, spread = [], [], []
            for column, title in zip(grid.columns, titles, strict=True):
                cell = grid.cells.get((row, column))
                reached = [run.reaches(target) for run in cell.runs] if cell else []
                values = [pair[which] for pair in reached if pair]
                if values and len(values) == len(reached):
                    x.append(title)
                    y.append(mean(values))
                    spread.append(_deviation(values))
            if x:
                series.append(Series(row, number, x, y, spread))
        panels = [Panel("", series)] if series else []
        heading = f"{unit.capitalize()} to {target:.0%} accuracy"
        label = f"{unit} to {target:.0%} accuracy"
        charts.append(Chart(f"{unit}-to-target", heading, "", label, panels, titles, "names"))
    return charts


def partitions(grid: Grid) -> list[tuple[str, Run]]:
    """Return a run of each column, whose split stands for the others', and a title."""
    first: dict[tuple[Any, ...], Run] = {}
    for (_, column), cell in grid.cells.items():
        first.setdefault(column, cell.runs[0])
    several = len({run.config.seed for run in grid.runs}) > 1
    found = []
    for column in grid.columns:
        seed = f"seed {first[column].config.seed}" if several else ""
        found.append((", ".join(filter(None, [_heading(grid, column), seed])), first[column]))
    return found


def _heading(grid: Grid, column: tuple[Any, ...]) -> str:
    return words(grid.column_keys, column)


def _deviation(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0
