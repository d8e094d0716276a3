"""When a run stops early, and when its checkpoints are due."""

import re
import time
from dataclasses import dataclass

from fedsam.tasks import HEADLINE


@dataclass
class EarlyStop:
    """When to end before the last round.

    Attributes
    ----------
    target : float
        Value of the headline that is enough; 0 for none.
    patience : int
        Evaluations without a better one that are too many; 0 for any number.
    best, since : float, int
        The best value so far, and the evaluations after it.
    headline : str
        What the number is called.
    """

    target: float
    patience: int
    best: float = -1.0
    since: int = 0
    headline: str = HEADLINE

    def reason(self, value: float) -> str:
        """Return why to stop after an evaluation with this value of the headline, or ""."""
        self.since = 0 if value > self.best else self.since + 1
        self.best = max(self.best, value)
        return self.met

    @property
    def met(self) -> str:
        """Why to stop by the evaluations so far, or ""."""
        if self.target and self.best >= self.target:
            return f"reached --target-accuracy {self.target:g}"
        if self.patience and self.since >= self.patience:
            return f"--patience {self.patience}: no better {self.headline} since {self.best:.4f}"
        return ""


class Due:
    """When the next checkpoint is written.

    Parameters
    ----------
    every : str
        Rounds ("100") or seconds ("60s"); "0" for never.
    """

    def __init__(self, every: str) -> None:
        number, seconds = re.fullmatch(r"(\d+)(s?)", every).groups()  # type: ignore[union-attr]
        self.ever = int(number) > 0
        self._every = int(number)
        self._seconds = bool(seconds)
        self._last = time.monotonic()

    def now(self, round: int) -> bool:
        """Return whether one is due after this round."""
        if not self.ever or not self._seconds:
            return self.ever and round % self._every == 0
        if time.monotonic() - self._last < self._every:
            return False
        self._last = time.monotonic()
        return True
