"""EMA: the exponential moving average of the global model (Polyak averaging)."""

from torch import Tensor


class EMA:
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
        self.start = start
        self.decay = decay

    def rate(self, round: int, lr: float) -> float:
        """Return ``lr``: the clients' learning rate is left as it is."""
        return lr

    def collects(self, round: int) -> bool:
        """Return whether the model after ``round`` enters the average."""
        return round > self.start

    def average(self, average: Tensor, n: int, w: Tensor) -> Tensor:
        """Return the new average (S,)."""
        return self.decay * average + (1 - self.decay) * w
