"""Where the round went: time by phase as a table, and a profiler's trace of some rounds."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity

from fedsam.base.timers import Recorder
from fedsam.config.schema import TRACED
from fedsam.server.rounds import Round


class Phase(NamedTuple):
    """One row of the table: seconds without those of phases inside, summed over threads."""

    name: str
    calls: int
    seconds: float


def rows_of(recorder: Recorder) -> list[Phase]:
    """Return the phases, the longest first."""
    names = sorted(recorder.seconds, key=lambda name: -recorder.seconds[name])
    return [Phase(name, recorder.calls[name], recorder.seconds[name]) for name in names]


def save(phases: Sequence[Phase], path: Path) -> None:
    """Write the rows as JSON."""
    path.write_text(json.dumps([phase._asdict() for phase in phases], indent=2) + "\n")


def traced(turns: Iterable[Round], path: Path) -> Iterator[Round]:
    """Play rounds, and write a profiler trace of the third to the fifth to ``path``.

    Chrome's or Perfetto's viewer opens it; a run that ends earlier leaves what there was.
    """
    kinds = [ProfilerActivity.CPU]
    kinds += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    every_thread = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    profiler = torch.profiler.profile(activities=kinds, experimental_config=every_thread)
    running = False
    try:
        for turn in turns:
            yield turn
            if turn.number + 1 == TRACED.start:
                profiler.start()
                running = True
            elif turn.number + 1 == TRACED.stop:
                break
    finally:
        if running:
            profiler.stop()
            profiler.export_chrome_trace(str(path))
    yield from turns
