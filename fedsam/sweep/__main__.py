"""``python -m fedsam.sweep FILE``: a grid of runs, and their report; started again, it goes on."""

import sys

from fedsam.base.system import end_at_once

if __name__ == "__main__":
    end_at_once()  # by a signal, while what follows is imported

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing
from pathlib import Path

from fedsam import cli
from fedsam.base.errors import UsageError
from fedsam.base.system import cores, expanded, raising, shown
from fedsam.cli import Parser, key_parser
from fedsam.report import __main__ as report
from fedsam.runs import files
from fedsam.runs.lock import Lock
from fedsam.runs.run import finished
from fedsam.sweep.forecast import forecast
from fedsam.sweep.grid import Sweep, SweepPoint, cells_of, read
from fedsam.sweep.live import LiveTable
from fedsam.sweep.queue import Failures, ProcessPool, RayTasks, jobs_of

Job = Sequence[SweepPoint]
LOOK = 1.0  # seconds between looks at the running cells


def flags() -> Parser:
    """Return the parser of the command's flags."""
    out = key_parser()
    out.prog = "python -m fedsam.sweep"
    out.description = (
        "Runs a grid of experiments, each in a process of its own, and reports on them. Started "
        "again with the same --out it leaves finished cells alone, or goes on with them if there "
        "are more --rounds. Flags override the file: a key of its grid gets other values, all "
        "others are set in every cell."
    )
    out.add_argument(
        "sweep",
        nargs="?",
        default="",
        help="a sweep's YAML file, or the name of a shipped one; none: the grid of the flags that "
        "list values, such as --alpha 0,0.05,0.5 --algorithm fedavg,fedasam --seed 0..2",
    )
    out.add_argument(
        "--dry-run",
        action="store_true",
        default=False,
        help="list the cells and how long they may take, by a few rounds of each method, and run "
        "none of them",
    )
    out.add_argument(
        "--parallel", type=int, default=1, help="processes at a time on this machine (default: 1)"
    )
    out.add_argument(
        "--ray",
        action="store_true",
        default=False,
        help="run cells as Ray tasks of --threads cores and --gpus-per-worker GPUs, on the cluster "
        "at --ray-address or on this machine",
    )
    out.add_argument(
        "--together",
        type=int,
        default=1,
        help="cells that train as one program, where they can: for a GPU (default: 1)",
    )
    out.add_argument(
        "--target",
        type=float,
        default=None,
        help="accuracy (or the task's headline) in [0, 1], for the report",
    )
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 1 (a cell failed), 2 (wrong input), 130 or 143."""
    with raising():
        return cli.run(
            lambda: sweep(arguments), interrupted="interrupted; the same command goes on"
        )


def sweep(arguments: Sequence[str] | None) -> int:
    """Run what is left of a sweep's cells, and report; return 1 if a cell failed, else 0."""
    given = flags().read(arguments)
    name, target, dry = (given.pop(key) for key in ("sweep", "target", "dry_run"))
    report.check_target(target)
    try:
        own = expanded(given.pop("out", ""))
    except UsageError as error:
        raise UsageError(f"--out: {error}") from error
    out = (Path(own) if own else Path("runs") / (Path(name).stem or "grid")).absolute()
    parallel, together, ray = (given.pop(key) for key in ("parallel", "together", "ray"))
    for flag, number in (("--parallel", parallel), ("--together", together)):
        if number < 1:
            raise UsageError(f"{flag} {number}: must be at least 1")
    # side by side, runs share the cores
    shares = {"threads": max(1, cores() // parallel)} if parallel > 1 else {}
    shares |= {"threads": 1} if ray else {}
    cells = cells_of(read(name) if name else Sweep(), out, shares | given)
    if ray and any(cell.config.engine == "ray" for cell in cells):
        raise UsageError("--engine ray: cells are Ray tasks themselves (--ray); leave out one")
    if dry:
        forecast(cells, parallel)
        return 0
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be made: {error.strerror}") from error
    with Lock(out):
        jobs = jobs_of([cell for cell in cells if not cell.done()], together)
        print(f"{len(cells)} cells, {len(cells) - sum(map(len, jobs))} done before", flush=True)
        failed = {}
        if jobs:
            place = RayTasks(jobs[0][0].config) if ray else ProcessPool(parallel)
            with closing(place):
                failed = run_all(jobs, place.submit)
        if len(failed) < len(cells):
            others = {folder.parent for folder in out.glob(f"*/{files.CONFIG}")}
            others -= {cell.folder for cell in cells}
            if others:
                print(f"{len(others)} runs in {shown(out)} are no cells of this grid: left out")
            folders = [cell.folder for cell in cells if cell.folder.is_dir()]
            report.write(folders, out / "report", target)
    return 1 if failed else 0


def run_all(jobs: Sequence[Job], submit: Callable[[Job], Future[Failures]]) -> Failures:
    """Run jobs, with a live table; return why which cells failed."""
    with LiveTable([cell for job in jobs for cell in job]) as board:
        futures = {submit(job): job for job in jobs}
        while futures:
            ended, _ = wait(futures, timeout=LOOK, return_when=FIRST_COMPLETED)
            for future in ended:
                cells = futures.pop(future)
                board.end(cells, failures_of(cells, future))
            board.look(job for future, job in futures.items() if future.running())
    return board.failed


def failures_of(cells: Job, future: Future[Failures]) -> Failures:
    """Return why which cells of a job that has ended failed."""
    if error := future.exception():  # its process died, or fedsam has a bug
        return dict.fromkeys((cell.name for cell in cells), str(error).strip().splitlines()[-1])
    lost = f"no result in {cells[0].folder.parent}: all nodes must share --out's file system"
    missing = {cell.name: lost for cell in cells if not finished(cell.folder)}
    return missing | future.result()


if __name__ == "__main__":
    sys.exit(main())
