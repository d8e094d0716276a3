"""Figures of many runs: curves with a band over seeds, and accuracy against alpha."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from fedsam.results import Cell, Grid

WIDE = 3  # panels side by side


def draw_all(grid: Grid, folder: Path) -> list[Path]:
    """Write every figure that the runs have data for, as PNG and PDF; return the PNGs."""
    figures = {name: curves(grid, name) for name in ("accuracy", "loss")}
    if "alpha" in grid.column_keys:
        figures["alpha"] = against_alpha(grid)
    written = []
    for name, figure in figures.items():
        for ending in ("png", "pdf"):
            figure.savefig(folder / f"{name}.{ending}", dpi=130)
        written.append(folder / f"{name}.png")
    return written


def curves(grid: Grid, name: str) -> Any:
    """Return a figure of a test metric over rounds: a panel a column, a line a method.

    Lines are means over seeds, at the rounds that all seeds evaluated; bands one sample standard
    deviation to either side.
    """
    figure, panels = _panels([grid.title(column) for column in grid.columns])
    percent = 100 if name == "accuracy" else 1
    for panel, column in zip(panels, grid.columns, strict=True):
        for number, row in enumerate(grid.rows):
            if (cell := grid.cells.get((row, column))) is None:
                continue
            rounds, middle, spread = over_seeds(cell, name)
            middle, spread = [percent * v for v in middle], [percent * v for v in spread]
            color = f"C{number % 10}"
            panel.plot(rounds, middle, color=color, label=row, linewidth=1.3)
            low = [m - s for m, s in zip(middle, spread, strict=True)]
            high = [m + s for m, s in zip(middle, spread, strict=True)]
            panel.fill_between(rounds, low, high, color=color, alpha=0.18, linewidth=0)
        panel.set(xlabel="round")
        panel.set_ylim(bottom=0)
    panels[0].set_ylabel("test accuracy (%)" if name == "accuracy" else "test loss (nats)")
    _legend(figure, panels)
    return figure


def over_seeds(cell: Cell, name: str) -> tuple[list[int], list[float], list[float]]:
    """Return the rounds that all runs measured, and mean and deviation of a metric at them."""
    found = [run.curve(name) for run in cell.runs]
    rounds = sorted(set.intersection(*map(set, found)))
    values = [[curve[r] for curve in found] for r in rounds]
    return rounds, [mean(v) for v in values], [stdev(v) if len(v) > 1 else 0.0 for v in values]


def against_alpha(grid: Grid) -> Any:
    """Return a figure of final accuracy against alpha: a panel for each other setting."""
    place = grid.column_keys.index("alpha")
    alphas = sorted({column[place] for column in grid.columns})
    others = sorted({(*c[:place], *c[place + 1 :]) for c in grid.columns})
    keys = (*grid.column_keys[:place], *grid.column_keys[place + 1 :])
    titles = [", ".join(f"{k} {v}" for k, v in zip(keys, other, strict=True)) for other in others]
    figure, panels = _panels(titles)
    for panel, other in zip(panels, others, strict=True):
        for number, row in enumerate(grid.rows):
            cells = {
                i: grid.cells[row, column]
                for i, alpha in enumerate(alphas)
                if (row, column := (*other[:place], alpha, *other[place:])) in grid.cells
            }
            panel.errorbar(
                list(cells),
                [100 * cell.mean for cell in cells.values()],
                [100 * (cell.deviation or 0.0) for cell in cells.values()],
                color=f"C{number % 10}",
                label=row,
                marker="o",
                capsize=3,
            )
        panel.set_xticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
        panel.set(xlabel="alpha (0: one class a client)")
    panels[0].set_ylabel("accuracy (%), last 100 rounds")
    _legend(figure, panels)
    return figure


def _panels(titles: Sequence[str]) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # a second of import that only this needs

    wide = min(WIDE, len(titles))
    high = -(-len(titles) // wide)
    figure = Figure(figsize=(4.2 * wide + 0.6, 3.3 * high + 0.7), layout="constrained")
    grid = figure.subplots(high, wide, squeeze=False, sharey=True)
    panels = [panel for line in grid for panel in line]
    for panel in panels[len(titles) :]:
        panel.set_visible(False)
    for panel, title in zip(panels, titles, strict=False):
        panel.set_title("" if title == "accuracy" else title, fontsize=10)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels[: len(titles)]


def _legend(figure: Any, panels: Sequence[Any]) -> None:
    handles: dict[str, Any] = {}
    for panel in panels:
        handles |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False
    )
