"""A table of results as a table: for the terminal, Markdown, LaTeX and CSV."""

import csv
import io
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from fedsam.base.errors import plain
from fedsam.report.correlation import Correlation
from fedsam.report.scalars import scalars, tables, taus
from fedsam.report.table import Cell, ResultTable
from fedsam.runs import metrics

WIDEST = 200  # characters of a name in a table
FORMULA = ("=", "+", "-", "@", "\\t", "\\r")  # what plain leaves of a tab is its escape
LATEX = {ord(sign): f"\\{sign}" for sign in "_%&#${}"} | {
    ord("\\"): r"\textbackslash{}",
    ord("~"): r"\textasciitilde{}",
    ord("^"): r"\textasciicircum{}",
}
TAU_NOTE = (
    "Tau-b between a measure and the gap, over the runs; 95% interval by bootstrap over the runs, "
    "which takes them for independent, as seeds of one method are not quite."
)


def note(table: ResultTable) -> str:
    """Return what the table's numbers are."""
    return (
        f"{metrics.heading(table.headline)} in percent, mean of the last 100 rounds' evaluations; "
        "mean and sample standard deviation over seeds."
    )


def terminal(table: ResultTable) -> Table:
    """Return a table for rich, the best of each column bold."""
    printed = Table("method", caption=note(table), caption_justify="left")
    for column in table.columns:
        printed.add_column(Text(plain(table.title(column), WIDEST)), justify="right")
    for row in table.rows:
        cells = [(_cell(table, row, column), row in table.best(column)) for column in table.columns]
        printed.add_row(
            Text(plain(row, WIDEST)), *(Text(cell, "bold" if best else "") for cell, best in cells)
        )
    return printed


def markdown(table: ResultTable) -> str:
    """Return a Markdown table, the best of each column bold."""
    lines = [
        ["method", *(_in_markdown(table.title(column)) for column in table.columns)],
        ["---", *["---:" for _ in table.columns]],
    ]
    lines += [
        [_in_markdown(row), *(_cell(table, row, column, "**{}**") for column in table.columns)]
        for row in table.rows
    ]
    return f"{_piped(lines)}\n\n{note(table)}\n{_measures(table)}"


def _piped(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _measures(table: ResultTable) -> str:
    """Return what was measured beside the headline, by column, and how it goes with the gap."""
    parts = []
    for title, head, rows in tables(table):
        rule = ["---", *["---:" for _ in head[1:]]]
        cells = [[_in_markdown(cell) for cell in line] for line in (head, *rows)]
        above = f"{_in_markdown(title)}\n\n" if title else ""
        parts.append(above + _piped([cells[0], rule, *cells[1:]]))
    if lines := [[_in_markdown(t.dataset), str(t.scalar), t.gap, str(t)] for t in taus(table)]:
        heads = ["data set", "measure", "gap", "Kendall's tau"]
        parts.append(f"{_piped([heads, ['---'] * 4, *lines])}\n\n{TAU_NOTE}")
    return "".join(f"\n{part}\n" for part in parts)


def correlations(table: ResultTable) -> str:
    """Return a CSV line for every Kendall's tau that the runs have data for."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["dataset", "measure", "scalar", "gap", *Correlation._fields])
    for tau in taus(table):
        writer.writerow([_in_csv(tau.dataset), *tau.scalar, tau.gap, *tau.correlation])
    return out.getvalue()


def latex(table: ResultTable) -> str:
    """Return a LaTeX tabular (package booktabs), the best of each column bold."""
    lines = [r"\begin{tabular}{l" + "r" * len(table.columns) + "}", r"\toprule"]
    titles = [_in_latex(title) for title in ["method", *map(table.title, table.columns)]]
    lines += [" & ".join(titles) + r" \\", r"\midrule"]
    for row in table.rows:
        cells = [
            _cell(table, row, column, r"\textbf{{{}}}").replace("±", r"$\pm$")
            for column in table.columns
        ]
        lines.append(" & ".join([_in_latex(row), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def comma_separated(table: ResultTable, target: float | None = None) -> str:
    """Return one line a run: what it was, how well it did, when it reached ``target``."""
    keys = ["method", *table.row_keys, *table.column_keys, "seed"]
    finals = [key for headline in table.headlines for key in metrics.finals(headline)]
    results = [*finals, metrics.ROUNDS, metrics.SECONDS]
    reached = ["rounds_to_target", "seconds_to_target"] if target is not None else []
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    measured = scalars(table)
    writer.writerow([*keys, *results, *reached, *map(str, measured), "run"])
    for run in sorted(table.runs, key=lambda r: (table.row(r), table.column(r), r.config.seed)):
        first: list[Any] = [run.method] + [getattr(run.config, key) for key in keys[1:]]
        when: Sequence[Any] = () if target is None else run.reaches(target) or ("", "")
        more = ["" if (value := s.of(run)) is None else value for s in measured]
        numbers = (run.summary.get(name, "") for name in results)
        writer.writerow(map(_in_csv, [*first, *numbers, *when, *more, str(run.path)]))
    return out.getvalue()


def _cell(table: ResultTable, row: str, column: tuple[Any, ...], bold: str = "{}") -> str:
    cell = table.cells.get((row, column))
    if cell is None:
        return "-"
    return bold.format(number_of(cell)) if row in table.best(column) else number_of(cell)


def number_of(cell: Cell) -> str:
    """Return mean and deviation of a cell in percent."""
    if cell.deviation is None:
        return f"{100 * cell.mean:.2f}"
    return f"{100 * cell.mean:.2f} ± {100 * cell.deviation:.2f}"


def _in_markdown(text: str) -> str:
    """Return a text that was read from a run as Markdown shows it, with no markup or HTML."""
    shown = plain(text, WIDEST).translate({ord(sign): f"\\{sign}" for sign in "\\`*[]|"})
    return shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _in_latex(text: str) -> str:
    """Return a text that was read from a run as LaTeX sets it, with no commands."""
    return plain(text, WIDEST).translate(LATEX)


def _in_csv(cell: Any) -> Any:
    """Return a cell that no spreadsheet takes for a formula: such a text has a quote before it."""
    if not isinstance(cell, str):
        return cell
    text = plain(cell)
    return f"'{text}" if text.startswith(FORMULA) else text
