"""Time by phase, measured at the seams: where nobody records, a seam costs one look-up.

Who records is a context variable, so several runs in one process record each for itself; threads
that work for a run enter its context by ``carried``.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from functools import wraps
from types import TracebackType
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
WAITING = "(waiting for the threads)"  # no work: the threads' own phases count meanwhile


class Recorder:
    """Calls and seconds of each phase, from any number of threads.

    Parameters
    ----------
    clock : callable
        Returns seconds.

    Attributes
    ----------
    calls : Counter
        By phase.
    seconds : dict
        By phase, without those of phases inside it, summed over threads.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.calls: Counter[str] = Counter()
        self.seconds: dict[str, float] = {}
        self._clock = clock
        self._lock = threading.Lock()
        self._inside = threading.local()  # seconds spent in phases within the present one

    def begin(self) -> tuple[float, float]:
        """Begin a phase on this thread; return what ``end`` wants."""
        outer = getattr(self._inside, "seconds", 0.0)
        self._inside.seconds = 0.0
        return outer, self._clock()

    def end(self, phase: str, begun: tuple[float, float]) -> None:
        """End the phase that was begun last on this thread."""
        outer, begin = begun
        whole = self._clock() - begin
        own = whole - self._inside.seconds
        with self._lock:
            self.calls[phase] += 1
            self.seconds[phase] = self.seconds.get(phase, 0.0) + own
        self._inside.seconds = outer + whole


_recorder: ContextVar[Recorder | None] = ContextVar("fedsam_recorder", default=None)


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Record what this thread does inside, and others in what it ``carried`` to them."""
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)


def carried(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function that other threads call in this one's context, if it is recorded.

    Each call has a copy of its own, as a context can be entered by one thread at a time.
    """
    if _recorder.get() is None:
        return function
    context = copy_context()

    def call(*arguments: P.args, **named: P.kwargs) -> R:
        return context.copy().run(function, *arguments, **named)

    return call


class timed:  # noqa: N801  (used as a decorator and in with, as a function would be)
    """A phase: a decorator of what is one, or a context."""

    def __init__(self, phase: str) -> None:
        self.phase = phase

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Return the function, each call of it a phase."""
        phase = self.phase

        @wraps(function)
        def call(*arguments: P.args, **named: P.kwargs) -> R:
            recorder = _recorder.get()
            if recorder is None:
                return function(*arguments, **named)
            begun = recorder.begin()
            try:
                return function(*arguments, **named)
            finally:
                recorder.end(phase, begun)

        return call

    def __enter__(self) -> None:
        self._recorder = _recorder.get()
        if self._recorder is not None:
            self._begun = self._recorder.begin()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._recorder is not None:
            self._recorder.end(self.phase, self._begun)
