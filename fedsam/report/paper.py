"""A report's charts on paper: PNG and PDF, by matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from fedsam.report.charts import Chart, Series, all_charts, partitions
from fedsam.report.table import ResultTable
from fedsam.runs.plots import bubbles

WIDE = 3  # panels side by side
LETTER = 0.085  # inches that one takes in a legend, with some air
TITLE = 46  # letters in a line over a panel


def draw_all(table: ResultTable, folder: Path, target: float | None = None) -> list[Path]:
    """Write every figure that the runs have data for, as PNG and PDF; return the PNGs."""
    import matplotlib as mpl  # half a second of import that only this needs

    written = []
    with mpl.rc_context({"text.parse_math": False}):  # a run's names are no formulas
        figures = {chart.name: draw(chart) for chart in all_charts(table, target)}
        figures["partition"] = draw_partitions(table)
        for name, figure in figures.items():
            for ending in ("png", "pdf"):
                figure.savefig(folder / f"{name}.{ending}", dpi=130)
            written.append(folder / f"{name}.png")
    return written


def draw(chart: Chart) -> Any:
    """Return a chart as a figure."""
    figure, panels = _panels(chart)
    if chart.kind == "values":
        for axes in panels[1:]:
            axes.sharex(panels[0])
    for axes, panel in zip(panels, chart.panels, strict=True):
        for series in panel.series:
            if chart.kind == "bands":
                _line(axes, series)
            elif chart.kind == "points":
                color = f"C{series.number % 10}"
                axes.scatter(series.x, series.y, s=22, color=color, label=series.label, alpha=0.8)
            else:
                _marks(axes, series, chart.categories)
        if chart.kind == "names":
            axes.set_xticks(range(len(chart.categories)), chart.categories)
            axes.set_xlim(-0.5, len(chart.categories) - 0.5)
        axes.set(xlabel=panel.x_label or chart.x_label, ylabel=panel.y_label)
    if chart.one_scale:
        panels[0].set_ylim(0, 1.05 * chart.top or 1)
        panels[0].set_ylabel(chart.y_label)
    handles: dict[str, Any] = {}
    for axes in panels:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    room = figure.get_figwidth() / (LETTER * (max(map(len, handles)) + 6))
    columns = max(1, min(4, 2 * len(panels), int(room)))
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False
    )
    return figure


def draw_partitions(table: ResultTable) -> Any:
    """Return which client holds how much of which class: a row of bubbles a column."""
    from matplotlib.figure import Figure

    shown = [(title, run.partition_counts()) for title, run in partitions(table)]
    heights = [0.6 + 0.2 * counts.shape[1] for _, counts in shown]
    figure = Figure(figsize=(11, sum(heights)), layout="constrained")
    rows = figure.subplots(len(shown), squeeze=False, height_ratios=heights)
    for (axes,), (title, counts) in zip(rows, shown, strict=True):
        bubbles(axes, counts, row=0.2)
        axes.set_title(": ".join(filter(None, [title, axes.get_title()])), fontsize="medium")
    return figure


def _line(axes: Any, series: Series) -> None:
    color = f"C{series.number % 10}"
    axes.plot(series.x, series.y, color=color, label=series.label, linewidth=1.3)
    low = [m - s for m, s in zip(series.y, series.spread, strict=True)]
    high = [m + s for m, s in zip(series.y, series.spread, strict=True)]
    axes.fill_between(series.x, low, high, color=color, alpha=0.18, linewidth=0)


def _marks(axes: Any, series: Series, categories: Sequence[str]) -> None:
    axes.errorbar(
        [categories.index(x) for x in series.x] if categories else series.x,
        series.y,
        series.spread,
        color=f"C{series.number % 10}",
        label=series.label,
        marker="o",
        capsize=3,
    )


def _panels(chart: Chart) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # a second of import that only this needs

    panels = chart.panels
    wide = min(WIDE, len(panels))
    high = -(-len(panels) // wide)
    figure = Figure(figsize=(4.2 * wide + 0.6, 3.3 * high + 0.7), layout="constrained")
    axes_grid = figure.subplots(high, wide, squeeze=False, sharey=chart.one_scale)
    every = [axes for line in axes_grid for axes in line]
    for axes in every[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(every, panels, strict=False):
        axes.set_title(fill(panel.title, TITLE), fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, every[: len(panels)]
