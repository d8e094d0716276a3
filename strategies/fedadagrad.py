"""FedAdagrad (Reddi et al., ICLR 2021): Adagrad on the server."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .fedavg import FedAvg


class FedAdagrad(FedAvg):
    """Adagrad, the cohort's update as its direction::

        d = mean_k w_k - w
        v <- v + d^2
        w <- w + eta d / (sqrt(v) + tau)

    The numbers of Flower's FedAdagrad, on the device; v starts at zero, as there. BatchNorm
    statistics, which are not descended on, are averaged. The server keeps P numbers.

    Parameters
    ----------
    eta : float
        The server's learning rate. In the paper tuned over powers of sqrt(10), by data set.
    tau : float
        Adaptivity, in the units of an update; the paper's default is 1e-3 (from memory).
    flower : keyword arguments
        Those of Flower's FedAvg.
    """

    def __init__(self, eta: float = 0.01, tau: float = 1e-3, **flower: Any) -> None:
        super().__init__(**flower)
        self.eta = eta
        self.tau = tau
        self.v: Tensor | float = 0.0

    def aggregate(self, w: Tensor, W: Sequence[Tensor], n: Sequence[float]) -> Tensor:
        """Return the new state (S,)."""
        new, P = super().aggregate(w, W, n), self.layout.trainable
        d = new[:P] - w[:P]
        self.v = self.v + d**2
        new[:P] = w[:P] + self.eta * d / (self.v.sqrt() + self.tau)
        return new
