"""A grid of results as a table: for the terminal, Markdown, LaTeX and CSV."""

import csv
import io
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from fedsam.report.correlation import Correlation
from fedsam.report.scalars import scalars, tables, taus
from fedsam.report.table import Cell, ResultTable
from fedsam.runs import metrics

NOTE = (
    "Accuracy in percent, mean of the last 100 rounds' evaluations; mean and sample standard "
    "deviation over seeds."
)


TAU_NOTE = (
    "Tau-b between a measure and the gap, over the runs; 95% interval by bootstrap over the runs, "
    "which takes them for independent, as seeds of one method are not quite."
)


def terminal(grid: ResultTable) -> Table:
    """Return a table for rich, the best of each column bold."""
    table = Table("method", caption=NOTE, caption_justify="left")
    for column in grid.columns:
        table.add_column(grid.title(column), justify="right")
    for row in grid.rows:
        table.add_row(
            row, *(_cell(grid, row, column, "[bold]{}[/bold]") for column in grid.columns)
        )
    return table


def markdown(grid: ResultTable) -> str:
    """Return a Markdown table, the best of each column bold."""
    lines = [["method", *map(grid.title, grid.columns)], ["---", *["---:" for _ in grid.columns]]]
    lines += [
        [row, *(_cell(grid, row, column, "**{}**") for column in grid.columns)] for row in grid.rows
    ]
    return f"{_piped(lines)}\n\n{NOTE}\n{_measures(grid)}"


def _piped(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _measures(grid: ResultTable) -> str:
    """Return what was measured beside accuracy, by column, and how it goes with the gap."""
    parts = []
    for title, head, rows in tables(grid):
        rule = ["---", *["---:" for _ in head[1:]]]
        parts.append((f"{title}\n\n" if title else "") + _piped([head, rule, *rows]))
    if found := [[t.dataset, str(t.scalar), t.gap, str(t)] for t in taus(grid)]:
        heads = ["data set", "measure", "gap", "Kendall's tau"]
        parts.append(f"{_piped([heads, ['---'] * 4, *found])}\n\n{TAU_NOTE}")
    return "".join(f"\n{part}\n" for part in parts)


def correlations(grid: ResultTable) -> str:
    """Return a CSV line for every Kendall's tau that the runs have data for."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["dataset", "measure", "scalar", "gap", *Correlation._fields])
    for tau in taus(grid):
        writer.writerow([tau.dataset, *tau.scalar, tau.gap, *tau.found])
    return out.getvalue()


def latex(grid: ResultTable) -> str:
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


def comma_separated(grid: ResultTable, target: float | None = None) -> str:
    """Return one line a run: what it was, how well it did, when it reached ``target``."""
    keys = ["method", *grid.row_keys, *grid.column_keys, "seed"]
    results = [*metrics.ACCURACIES, metrics.ROUNDS, metrics.SECONDS]
    reached = ["rounds_to_target", "seconds_to_target"] if target is not None else []
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    measured = scalars(grid)
    writer.writerow([*keys, *results, *reached, *map(str, measured), "run"])
    for run in sorted(grid.runs, key=lambda r: (grid.row(r), grid.column(r), r.config.seed)):
        first: list[Any] = [run.method] + [getattr(run.config, key) for key in keys[1:]]
        when: Sequence[Any] = () if target is None else run.reaches(target) or ("", "")
        more = ["" if (value := s.of(run)) is None else value for s in measured]
        writer.writerow([*first, *(run.summary[name] for name in results), *when, *more, run.path])
    return out.getvalue()


def _cell(grid: ResultTable, row: str, column: tuple[Any, ...], bold: str) -> str:
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
