"""Where the round went: time by phase, measured from outside, so that other runs pay nothing.

While it is on, the methods at the seams between phases are replaced by ones that read the clock.
"""

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
from flwr.serverapp.strategy import Strategy
from torch.profiler import ProfilerActivity

from fedsam.config.schema import TRACED
from fedsam.data.images import Images
from fedsam.engines.local import LocalGrid
from fedsam.engines.threads import ThreadExecutor
from fedsam.runs.folder import RunDir
from fedsam.server.rounds import Round
from fedsam.training.batched import Program
from fedsam.training.batched_gradient import Slots, Vmapped
from fedsam.training.client import Trainer
from fedsam.training.flat_module import FlatModule
from fedsam.training.method import Method

WAITING = "(waiting for the threads)"


class Phase(NamedTuple):
    """One row of the table: seconds without those of phases inside, summed over threads."""

    name: str
    calls: int
    seconds: float


class Phases:
    """Clocks at the seams between phases."""

    def __init__(self) -> None:
        self._inside = threading.local()  # seconds spent in phases within the present one
        self._lock = threading.Lock()
        self._calls: dict[str, int] = {}
        self._seconds: dict[str, float] = {}

    @contextmanager
    def watching(self, strategy: Strategy) -> Iterator[None]:
        """Measure what happens inside."""
        seams: list[tuple[type, str, str]] = [
            (Trainer, "plan", "draw plans"),
            (Images, "take", "gather and augment"),
            (FlatModule, "gradient", "forward and backward"),
            (Slots, "__call__", "forward and backward"),
            (Vmapped, "__call__", "forward and backward"),
            (Method, "step", "minimiser, client and SGD"),
            (Trainer, "train_client", "rest of local training"),
            (Program, "begin", "hand a cohort to the device"),
            (Program, "end", "wait for the device"),
            (type(strategy), "configure_train", "strategy sends"),
            (type(strategy), "aggregate_train", "strategy aggregates"),
            (LocalGrid, "send_and_receive", "messages"),
            (Trainer, "statistics", "evaluate"),
            (ThreadExecutor, "map", WAITING),
            (RunDir, "log", "write"),
        ]
        with ExitStack() as undo:
            for cls, name, phase in seams:
                method_of_class = getattr(cls, name)
                undo.callback(setattr, cls, name, method_of_class)
                setattr(cls, name, self._timed(method_of_class, phase))
            yield

    def _timed(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        @wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            outer = getattr(self._inside, "seconds", 0.0)
            self._inside.seconds = 0.0
            begin = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                whole = time.perf_counter() - begin
                with self._lock:
                    self._calls[phase] = self._calls.get(phase, 0) + 1
                    own = whole - self._inside.seconds
                    self._seconds[phase] = self._seconds.get(phase, 0.0) + own
                self._inside.seconds = outer + whole

        return timed

    def rows(self) -> list[Phase]:
        """Return the phases, the longest first."""
        names = sorted(self._seconds, key=lambda name: -self._seconds[name])
        return [Phase(name, self._calls[name], self._seconds[name]) for name in names]

    def save(self, path: Path) -> None:
        """Write the rows as JSON."""
        path.write_text(json.dumps([row._asdict() for row in self.rows()], indent=2) + "\n")


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
