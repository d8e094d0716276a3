"""EMA: the exponential moving average of the global model (Polyak averaging)."""

from torch import Tensor

from fedsam.base.strategy import Average


class EMA(Average):
    """Forget old models geometrically::

        avg <- decay avg + (1 - decay) w          after each round r > start

    Parameters
    ----------
    start : int
        Rounds before the averaging begins; the model there is the first average.
    decay : float
        In [0, 1), a round: 0.99 remembers about 100 rounds.
    """

    def __init__(self, start: int, decay: float = 0.99) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay: must lie in [0, 1), got {decay}")
        super().__init__(start)
        self.decay = decay

    def average(self, average: Tensor, n: int, w: Tensor) -> Tensor:
        """Return the new average (S,)."""
        return self.decay * average + (1 - self.decay) * w
