"""What a run's names say is text in every table, file and line: no markup, formula or command."""

import csv
import io
import logging
import re

import pytest
from run_folders import measure, write_run

from fedsam.cli import console
from fedsam.report import formats
from fedsam.report.__main__ import main
from fedsam.report.table import ResultTable
from fedsam.runs.run import load_all
from fedsam.simulate.progress import PlainLines

NASTY = [
    "=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(1)", "\t=1", "[bold]x[/bold]", "a[/b]", ":smiley:",
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "a|b", "[x](javascript:alert(1))",
    "`code`", r"\input{/etc/passwd}", r"$\frac$", "a_b^c~d", "50% & #1 {x}", "\x1b[31mred", "a\nb",
    "\u202eevil", "x" * 5000, "\\", "$", "\x00",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs a name: as their data set, which makes columns, and as their model: rows."""
    folder = tmp_path_factory.mktemp("nasty") / "runs"
    for number, name in enumerate(NASTY):
        run = write_run(folder / f"a{number}", [0.5], dataset=name)
        write_run(folder / f"b{number}", [0.6], model=name, dataset="digits")
        measure(run, 0.9, 0.8, trace={"trace": 1.0})
    return ResultTable(load_all([folder]))


def test_csv_cells_are_no_formulas(runs):
    for text in (formats.comma_separated(runs), formats.correlations(runs)):
        for line in csv.reader(io.StringIO(text)):
            for cell in line:
                assert not cell.startswith(("+", "=", "@", "\t", "\r")), cell
                assert not cell.startswith("-") or float(cell) < 0
                assert cell.isprintable()
                assert len(cell) <= 1001
    assert "'=cmd|' /C calc'!A0" in formats.comma_separated(runs)


def test_markdown_has_no_html_markup_or_further_cells(runs):
    text = formats.markdown(runs)
    assert "<" not in text
    assert "javascript" in text
    assert "](" not in text.replace(r"\](", "")
    assert all(line.isprintable() for line in text.splitlines())
    lines = [line for line in text.split("\n\n")[0].splitlines()]
    cells = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
    assert cells == {len(runs.columns) + 2}
    assert max(map(len, text.replace("\\", "").split("|"))) < 1500


def test_latex_has_only_our_commands(runs):
    text = formats.latex(runs)
    known = {"begin", "end", "toprule", "midrule", "bottomrule", "textbf", "pm"}
    known |= {"textbackslash", "textasciitilde", "textasciicircum"}
    assert set(re.findall(r"\\([a-zA-Z]+)", text)) <= known
    rows = [line for line in text.splitlines() if line.endswith(r" \\")]
    assert len(rows) == len(runs.rows) + 1
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(runs.columns)}


def test_the_terminal_shows_what_is_there(runs, capsys):
    shown = console()
    shown.width = 40_000
    shown.print(formats.terminal(runs), soft_wrap=False)
    shown.print("a[/b] [bold]x[/bold] :smiley: [link=x]")
    said = capsys.readouterr().out
    for name in ("[bold]x[/bold]", "a[/b]", ":smiley:", r"\x1b[31mred", r"a\nb", r"\u202eevil"):
        assert name in said
    assert "\x1b" not in said.replace("\x1b[1m", "").replace("\x1b[0m", "")
    assert "a[/b] [bold]x[/bold] :smiley: [link=x]\n" in said


def test_a_log_line_is_one_line():
    reason = "\x1b[2J\nround 9: all fine"
    record = logging.LogRecord("fedsam", 30, "", 1, "client %s", (reason,), None)
    assert PlainLines().format(record) == r"client \x1b[2J\nround 9: all fine"


def test_the_command_draws_names_that_are_no_formulas(tmp_path, capsys):
    for number, name in enumerate([r"$\frac$", "a[/b]", "<script>", "\x1b[31m"]):
        write_run(tmp_path / "runs" / f"{number}[/b]", [0.5, 0.6], dataset=name)
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "a[/b]")]) == 0
    said = capsys.readouterr().out
    assert "\x1b[31m" not in said
    assert "a[/b]" in said.replace("\n", "")
    assert "<script>alert" not in (tmp_path / "a[/b]" / "report.html").read_text()
