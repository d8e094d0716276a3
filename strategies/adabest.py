"""AdaBest's server (Varno et al., ECCV 2022): go beyond the mean, as the means went."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fedsam.base.vector import weighted_mean

from .fedavg import FedAvg


class AdaBest(FedAvg):
    """Step from the plain mean along its change since the round before::

        h    <- beta (last - mean),    mean = mean_k w_k
        w    <- mean - h
        last <- mean                                          the first model, at first

    It goes with the client of this name. BatchNorm statistics are averaged. The server keeps P
    numbers. Formula and value are from memory of the paper, not checked against its code.

    Parameters
    ----------
    beta : float
        In [0, 1); 0 is FedAvg's mean of equal clients. Paper: tuned within 0.9 to 1, by data set.
    flower : keyword arguments
        Those of Flower's FedAvg.
    """

    def __init__(self, beta: float = 0.96, **flower: Any) -> None:
        if not 0 <= beta < 1:
            raise ValueError(f"beta: must lie in [0, 1), got {beta}")
        super().__init__(**flower)
        self.beta = beta
        self.last: Tensor | None = None

    def aggregate(self, w: Tensor, W: Sequence[Tensor], n: Sequence[float]) -> Tensor:
        """Return the new state (S,)."""
        new, P = super().aggregate(w, W, n), self.layout.trainable
        mean = weighted_mean([w_k[:P] for w_k in W], [1.0] * len(W))
        h = self.beta * ((w[:P] if self.last is None else self.last) - mean)
        self.last = mean
        new[:P] = mean - h
        return new
