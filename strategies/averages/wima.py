"""WiMA: window-based model averaging (Caldarola et al., ICCV Workshops 2023)."""

from collections import deque

from torch import Tensor

from fedsam.base.strategy import Average


class WiMA(Average):
    """Average the global models of the last W rounds::

        avg = mean of w_{r-W+1}, ..., w_r          after each round r > start

    It may start with the first round, when fewer than W models are averaged. Memory: W models.

    Parameters
    ----------
    start : int
        Rounds before the averaging begins.
    window : int
        W, in rounds; the paper uses 100.
    """

    def __init__(self, start: int, window: int = 100) -> None:
        if window < 1:
            raise ValueError(f"window: must be at least 1, got {window}")
        super().__init__(start)
        self.window = window
        self.models: deque[Tensor] = deque()
        self.total: Tensor | None = None

    def average(self, average: Tensor, n: int, w: Tensor) -> Tensor:
        """Return the mean of the window (S,) once ``w`` is in it."""
        # a running sum costs two additions a round whatever W is; in float64 it does not drift
        self.models.append(w.clone())
        self.total = w.double() if self.total is None else self.total + w.double()
        if len(self.models) > self.window:
            self.total = self.total - self.models.popleft().double()
        return (self.total / len(self.models)).to(w.dtype)
