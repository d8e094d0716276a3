"""Charts of what was measured: sharpness against the gap, and anything against an option."""

import math
import re
from collections.abc import Callable
from itertools import groupby
from statistics import mean, stdev
from typing import Any

from fedsam.measured import GAPS, LIFELONG, Tau, scalars, sharpness, taus
from fedsam.panels import Chart, Panel, Series
from fedsam.results import Grid, Run, short

Settings = dict[str, Any]


def measured_charts(grid: Grid) -> list[Chart]:
    """Return every chart that the runs have data for."""
    return against_options(grid) + against_the_gap(grid)


def against_the_gap(grid: Grid) -> list[Chart]:
    """Return, for each measure of sharpness, its numbers against the generalisation gap."""
    charts = []
    every = sorted(taus(grid), key=lambda tau: (tau.scalar.measure, tau.gap))
    for measure, found in groupby(every, key=lambda tau: tau.scalar.measure):
        panels = [_scatter(grid, tau) for tau in found]
        heading = f"Generalisation gap against {measure}"
        charts.append(Chart(f"gap-{_slug(measure)}", heading, "", "", panels, kind="points"))
    return charts


def _scatter(grid: Grid, tau: Tau) -> Panel:
    series = []
    for number, row in enumerate(grid.rows):
        runs = [run for run in tau.runs if grid.row(run) == row]
        x, y = tau.points(runs)
        if x:
            series.append(Series(row, number, x, y, [0.0] * len(y)))
    several = len({run.config.dataset for run in grid.runs}) > 1
    dataset = f"{tau.dataset}, " if several else ""
    title = f"{dataset}{tau.scalar.name}: {tau}"
    return Panel(title, series, str(tau.scalar), GAPS[tau.gap].label)


def against_options(grid: Grid) -> list[Chart]:
    """Return accuracy and all that was measured against each number in which like runs differ.

    A number is a config key (rho) or an entry of its options (the ``start`` of a late phase). A
    line is what the runs have in common otherwise; it needs two numbers at least.
    """
    settings = {run.path: _settings(grid, run) for run in grid.runs}
    keys = sorted({key for values in settings.values() for key in values})
    measured = [s for s in scalars(grid) if s in sharpness(grid) or s.measure == LIFELONG]
    charts = []
    for key in keys:
        if key == "alpha" and not measured:  # accuracy against alpha has a chart of its own
            continue
        lines = _lines(grid, settings, key)
        panels = [Panel("", _values(lines, _percent), key, "accuracy (%)")]
        panels += [Panel("", _values(lines, scalar.of), key, str(scalar)) for scalar in measured]
        drawn = [panel for panel in panels if any(len(one.x) > 1 for one in panel.series)]
        if drawn:
            heading = f"Accuracy{' and what was measured' if measured else ''} against {key}"
            charts.append(Chart(f"option-{_slug(key)}", heading, key, "", drawn, kind="values"))
    return charts


def _settings(grid: Grid, run: Run) -> Settings:
    """Return in what a run may differ from others of its method, options entry by entry."""
    found: Settings = {}
    for key in (*grid.column_keys, *grid.row_keys):
        value, name = getattr(run.config, key), key.replace("_", " ")
        if isinstance(value, dict):
            found |= {f"{name}: {entry}": held for entry, held in value.items()}
        else:
            found[name] = value
    return found


def _lines(
    grid: Grid, settings: dict[Any, Settings], key: str
) -> dict[str, dict[float, list[Run]]]:
    """Return the runs by line, and by the number at ``key``; others take no part."""
    settings = {path: values for path, values in settings.items() if _is_number(values.get(key))}
    differing = {
        other
        for other in {name for values in settings.values() for name in values}
        if other != key and len({repr(values.get(other)) for values in settings.values()}) > 1
    }
    lines: dict[str, dict[float, list[Run]]] = {}
    for run in grid.runs:
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
    return None if math.isnan(run.accuracy) else 100 * run.accuracy


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
