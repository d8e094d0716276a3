"""``python -m fedsam.report RUN...``: tables and figures of finished runs."""

import sys

from fedsam.base.system import end_at_once

if __name__ == "__main__":
    end_at_once()  # by a signal, while what follows is imported

from collections.abc import Sequence
from pathlib import Path

from fedsam import cli
from fedsam.base.errors import UsageError, plain
from fedsam.cli import Parser, path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, or 2 for wrong input."""
    parser = Parser(prog="python -m fedsam.report", description="Tables and figures of runs.")
    parser.add_argument(
        "runs", nargs="+", type=path, help="folders of finished runs, or folders that hold such"
    )
    parser.add_argument(
        "--out", type=path, default=Path("report"), help="folder for the files (default: report)"
    )
    parser.add_argument(
        "--target",
        type=float,
        help="accuracy (or the task's headline) in [0, 1]: the report says when each run "
        "reached it first",
    )

    def act() -> None:
        options = parser.read(arguments)
        check_target(options["target"])
        write(options["runs"], options["out"], options["target"])

    return cli.run(act)


def check_target(target: float | None) -> None:
    """Raise UsageError if this lies not in [0, 1]."""
    if target is not None and not 0 <= target <= 1:
        raise UsageError(f"--target {target:g}: must lie in [0, 1]")


def write(paths: Sequence[Path], out: Path, target: float | None) -> None:
    """Print the table of runs; write the page, table.md, table.tex, runs.csv and the figures."""
    from fedsam.report import formats
    from fedsam.report.page import html
    from fedsam.report.paired import verdicts
    from fedsam.report.paper import draw_all
    from fedsam.report.scalars import taus, why_no_tau
    from fedsam.report.table import ResultTable
    from fedsam.runs.files import folders_below
    from fedsam.runs.run import finished, load_all

    table = ResultTable(load_all(paths))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be made: {error.strerror}") from error
    (out / "table.md").write_text(formats.markdown(table))
    (out / "table.tex").write_text(formats.latex(table))
    (out / "runs.csv").write_text(formats.comma_separated(table, target))
    written = ["report.html", "table.md", "table.tex", "runs.csv"]
    if taus(table):
        (out / "tau.csv").write_text(formats.correlations(table))
        written.append("tau.csv")
    (out / "report.html").write_text(html(table, target))
    pictures = draw_all(table, out, target)
    console = cli.console()
    for printed in (formats.terminal(table), *formats.terminal_by_domain(table)):
        console.print(printed, soft_wrap=False)
    for line in verdicts(table):
        console.print(plain(line), soft_wrap=False)
    written += [picture.name for picture in pictures]
    console.print(plain(f"{len(table.runs)} runs; {', '.join(written)} in {out}"))
    if reason := why_no_tau(table):
        console.print(reason)
    if left_out := sum(not finished(folder) for path in paths for folder in folders_below(path)):
        console.print(f"left out: {left_out} runs that are not finished")


if __name__ == "__main__":
    sys.exit(main())
