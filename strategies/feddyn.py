"""FedDyn's server (Acar et al., ICLR 2021): the average, moved by all updates so far."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fedsam.base.vector import weighted_mean

from .fedavg import FedAvg


class FedDyn(FedAvg):
    """Add to the plain mean the sum of all updates that the clients ever made::

        h <- h - 1/N sum_{k in cohort} (w_k - w)
        w <- mean_k w_k - h

    h is the paper's h / alpha, so that the server does not need alpha; it goes with
    the client of this name. Every client of the cohort counts the same. BatchNorm statistics, which
    are not descended on, are averaged. The server keeps P numbers.

    Parameters
    ----------
    clients : int
        N, the population; the run's.
    flower : keyword arguments
        Those of Flower's FedAvg.
    """

    def __init__(self, clients: int, **flower: Any) -> None:
        super().__init__(**flower)
        self.clients = clients
        self.h: Tensor | float = 0.0

    def aggregate(self, w: Tensor, W: Sequence[Tensor], n: Sequence[float]) -> Tensor:
        """Return the new state (S,)."""
        new, P = super().aggregate(w, W, n), self.layout.trainable
        mean = weighted_mean([w_k[:P] for w_k in W], [1.0] * len(W))
        self.h = self.h - len(W) / self.clients * (mean - w[:P])
        new[:P] = mean - self.h
        return new
