"""FedYogi (Reddi et al., ICLR 2021): Yogi on the server."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .fedavg import FedAvg


class FedYogi(FedAvg):
    """Yogi, the cohort's update as its direction::

        m <- beta_1 m + (1 - beta_1) d,     d = mean_k w_k - w
        v <- v - (1 - beta_2) d^2 sign(v - d^2)
        w <- w + eta m / (sqrt(v) + tau)

    The numbers of Flower's FedYogi, on the device; v starts at zero, as there. BatchNorm
    statistics, which are not descended on, are averaged. The server keeps 2P numbers.

    Parameters
    ----------
    eta : float
        The server's learning rate. In the paper tuned over powers of sqrt(10), by data set.
    beta_1 : float
        How much of m is kept; the paper's is 0.9 (from memory, as the values below).
    beta_2 : float
        How much of v is kept; the paper's is 0.99.
    tau : float
        Adaptivity, in the units of an update; the paper's default is 1e-3.
    flower : keyword arguments
        Those of Flower's FedAvg.
    """

    def __init__(
        self,
        eta: float = 0.01,
        beta_1: float = 0.9,
        beta_2: float = 0.99,
        tau: float = 1e-3,
        **flower: Any,
    ) -> None:
        super().__init__(**flower)
        self.eta = eta
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.tau = tau
        self.m: Tensor | float = 0.0
        self.v: Tensor | float = 0.0

    def aggregate(self, w: Tensor, W: Sequence[Tensor], n: Sequence[float]) -> Tensor:
        """Return the new state (S,)."""
        new, P = super().aggregate(w, W, n), self.layout.trainable
        d = new[:P] - w[:P]
        self.m = self.beta_1 * self.m + (1 - self.beta_1) * d
        self.v = self.v - (1 - self.beta_2) * d**2 * (self.v - d**2).sign()
        new[:P] = w[:P] + self.eta * self.m / (self.v.sqrt() + self.tau)
        return new
