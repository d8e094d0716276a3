"""SWA: stochastic weight averaging (Izmailov et al., UAI 2018) of the global model."""

from torch import Tensor

from fedsam.base.strategy import Average


class SWA(Average):
    """Average the models at the ends of learning-rate cycles, all with one weight::

        t(r)  = ((r - start - 1) mod c + 1) / c          rounds r > start, counted from 1
        lr(r) = (1 - t) lr + t lr_end                    high at a cycle's start, low at its end
        avg  <- (n avg + w) / (n + 1)                    after each round with t = 1

    As Caldarola et al. (ECCV 2022) use it on the server: clients train with lr(r), training goes
    on from the plain model. Until the first cycle ends the average is the model at ``start``,
    which is not a member of the average afterwards.

    Parameters
    ----------
    start : int
        Rounds before the averaging begins (paper: 0.75 of all).
    cycle : int
        c, in rounds (CIFAR-10: 10). With 1 the learning rate stays constant.
    lr : float
        lr_end, the learning rate at the end of a cycle (paper: 1e-4).
    phase : str
        "end" collects at the lowest learning rate, as the paper means it; "official" one round
        later, at the highest, as its released code does where ``start`` is a multiple of c.
    """

    needs = ("cycle", "lr")

    def __init__(self, start: int, cycle: int = 10, lr: float = 1e-4, phase: str = "end") -> None:
        if phase not in ("end", "official"):
            raise ValueError(f"phase: must be 'end' or 'official', got {phase!r}")
        super().__init__(start)
        self.cycle = cycle
        self.lr = lr
        self.phase = phase

    def rate(self, round: int, lr: float) -> float:
        """Return the clients' learning rate in ``round``, given their usual one."""
        if self.cycle == 1 or round <= self.start:
            return lr
        # the official code counts its cycles from the first round of training
        since = round - 1 - (self.start if self.phase == "end" else 0)
        t = (since % self.cycle + 1) / self.cycle
        return (1 - t) * lr + t * self.lr

    def collects(self, round: int) -> bool:
        """Return whether the model after ``round`` is a member of the average."""
        since = round - self.start - (0 if self.phase == "end" else 1)
        return since > 0 and since % self.cycle == 0

    def average(self, average: Tensor, n: int, w: Tensor) -> Tensor:
        """Return the mean of n + 1 models from that of n and one more, (S,)."""
        return (n * average + w) / (n + 1)
