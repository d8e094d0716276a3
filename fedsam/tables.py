"""A grid of results as a table: for the terminal, Markdown, LaTeX and CSV."""

import csv
import io
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from fedsam.results import Cell, Grid

NOTE = (
    "Accuracy in percent, mean of the last 100 rounds' evaluations; mean and sample standard "
    "deviation over seeds."
)


def terminal(grid: Grid) -> Table:
    """Return a table for rich, the best of each column bold."""
    table = Table("method", caption=NOTE, caption_justify="left")
    for column in grid.columns:
        table.add_column(grid.title(column), justify="right")
    for row in grid.rows:
        table.add_row(
            row, *(_cell(grid, row, column, "[bold]{}[/bold]") for column in grid.columns)
        )
    return table


def markdown(grid: Grid) -> str:
    """Return a Markdown table, the best of each column bold."""
    lines = [["method", *map(grid.title, grid.columns)], ["---", *["---:" for _ in grid.columns]]]
    lines += [
        [row, *(_cell(grid, row, column, "**{}**") for column in grid.columns)] for row in grid.rows
    ]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{text}\n\n{NOTE}\n"


def latex(grid: Grid) -> str:
    """Return a LaTeX tabular (package booktabs), the best of each column bold."""
    lines = [r"\begin{tabular}{l" + "r" * len(grid.columns) + "}", r"\toprule"]
    titles = [_escaped(title) for title in ["method", *map(grid.title, grid.columns)]]
    lines += [" & ".join(titles) + r" \\", r"\midrule"]
    for row in grid.rows:
        cells = [
            _cell(grid, row, column, r"\textbf{{{}}}").replace("±", r"$\pm$")
            for column in grid.columns
        ]
        lines.append(" & ".join([_escaped(row), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def comma_separated(grid: Grid, target: float | None = None) -> str:
    """Return one line a run: what it was, how well it did, when it reached ``target``."""
    keys = ["method", *grid.row_keys, *grid.column_keys, "seed"]
    results = ["final_accuracy", "last_accuracy", "best_accuracy", "rounds", "seconds"]
    reached = ["rounds_to_target", "seconds_to_target"] if target is not None else []
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*keys, *results, *reached, "run"])
    for run in sorted(grid.runs, key=lambda r: (grid.row(r), grid.column(r), r.config.seed)):
        first: list[Any] = [run.method] + [getattr(run.config, key) for key in keys[1:]]
        when: Sequence[Any] = () if target is None else run.reaches(target) or ("", "")
        writer.writerow([*first, *(run.summary[name] for name in results), *when, run.path])
    return out.getvalue()


def _cell(grid: Grid, row: str, column: tuple[Any, ...], bold: str) -> str:
    cell = grid.cells.get((row, column))
    if cell is None:
        return "-"
    return bold.format(number_of(cell)) if row in grid.best(column) else number_of(cell)


def number_of(cell: Cell) -> str:
    """Return mean and deviation of a cell in percent."""
    if cell.deviation is None:
        return f"{100 * cell.mean:.2f}"
    return f"{100 * cell.mean:.2f} ± {100 * cell.deviation:.2f}"


def _escaped(text: str) -> str:
    for sign in "_%&#":
        text = text.replace(sign, f"\\{sign}")
    return text
