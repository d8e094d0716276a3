"""``python -m fedsam.sweep FILE``: a grid of runs, and their report; started again, it goes on."""

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from fedsam import report
from fedsam.cells import Cell, cells_of, read
from fedsam.errors import UsageError
from fedsam.machine import cores
from fedsam.simulate import parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 1 (a cell failed), 2 (wrong input) or 130."""
    flags = parser()
    flags.prog = "python -m fedsam.sweep"
    flags.description = (
        "Runs a grid of experiments, each in a process of its own, and reports on them. Started "
        "again with the same --out it leaves finished cells alone. Flags stand before the file's "
        "keys, for every cell."
    )
    flags.add_argument("sweep", help="a sweep's YAML file, or the name of a shipped one")
    flags.add_argument("--parallel", type=int, default=1, help="runs at a time (default: 1)")
    try:
        given = flags.read(arguments)
        parallel, name = given.pop("parallel"), given.pop("sweep")
        out = Path(given.pop("out", "") or Path("runs") / Path(name).stem)
        if parallel < 1:
            raise UsageError(f"--parallel {parallel}: must be at least 1")
        if given.pop("config", ""):
            raise UsageError("--config: a sweep names its own")
        # side by side, runs share the cores
        shares = {"threads": max(1, cores() // parallel)} if parallel > 1 else {}
        cells = cells_of(read(name), out, shares | given)
        failed = run_all(cells, parallel)
        if len(failed) < len(cells):
            report.write([out], out / "report", None)
    except UsageError as error:
        print(f"fedsam: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fedsam: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 1 if failed else 0


def run_all(cells: Sequence[Cell], parallel: int) -> dict[str, str]:
    """Run the cells that are not done, with a live line; return why which of them failed."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console, errors = Console(), Console(stderr=True)
    open_cells = [cell for cell in cells if not cell.done()]
    failed: dict[str, str] = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console.print(
        f"{len(cells)} cells, {len(cells) - len(open_cells)} done before", highlight=False
    )
    with (
        Progress(*columns, console=console, disable=not console.is_terminal) as bar,
        ThreadPoolExecutor(parallel, "fedsam-cell") as pool,
    ):
        task = bar.add_task("cells", total=len(open_cells))
        futures = {pool.submit(cell.run): cell for cell in open_cells}
        try:
            for number, future in enumerate(as_completed(futures), 1):
                cell, words = futures[future], future.result()
                if words:
                    failed[cell.name] = words
                    errors.print(f"failed: {cell.name}: {words}", highlight=False, markup=False)
                else:
                    said = f"{number}/{len(open_cells)}  {cell.name}"
                    console.print(said, highlight=False, markup=False)
                bar.update(task, completed=number, description=f"cells, {len(failed)} failed")
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


if __name__ == "__main__":
    sys.exit(main())
