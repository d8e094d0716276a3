"""What a sweep would run, and for how long, by a few rounds of each of its methods."""

import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

from fedsam.base.errors import plain
from fedsam.cli import console, hush_flower
from fedsam.config.schema import Config
from fedsam.sweep.grid import SweepPoint

ROUNDS = 3  # of a trial
NOT_TIMED = {"seed", "split_seed", "alpha", "rho", "eta", "lr", "rounds", "swa_start", "out"}


def forecast(cells: Sequence[SweepPoint], parallel: int) -> None:
    """Print each cell, whether it is done, and about how long the others will take."""
    out = console()
    left = [cell for cell in cells if not cell.done()]
    for cell in cells:
        out.print(plain(f"{'to run' if cell in left else 'done  '}  {cell.name}"))
    hush_flower()
    seconds_by_kind: dict[str, tuple[float, float]] = {}
    for cell in left:
        if (kind := _kind(cell.config)) not in seconds_by_kind:
            seconds_by_kind[kind] = _trial(cell.config)
    total = 0.0
    for cell in left:
        start, a_round = seconds_by_kind[_kind(cell.config)]
        total += start + a_round * cell.config.rounds
    took = timedelta(seconds=round(total / min(parallel, max(len(left), 1))))
    out.print(
        f"{len(cells)} cells, {len(left)} to run: about {took}, {parallel} at a time, by "
        f"{len(seconds_by_kind)} trials of {ROUNDS} rounds"
    )


def _kind(config: Config) -> str:
    """Return what says how long a round takes."""
    return repr(config.model_dump(exclude=NOT_TIMED))


def _trial(config: Config) -> tuple[float, float]:
    """Return the seconds before a run's first round, and of a round, evaluations among them."""
    from fedsam.simulate.run import run

    lines: list[float] = []
    with TemporaryDirectory() as folder:
        changes = {"rounds": max(ROUNDS, config.lifelong), "out": str(Path(folder) / "trial")}
        changes |= {"track": "", "swa": False, "average": "none", "quiet": True, "trace": False}
        began = time.perf_counter()
        run(config.model_copy(update=changes), lambda line: lines.append(time.perf_counter()))
    return lines[0] - began, (lines[-1] - lines[0]) / (len(lines) - 1)
