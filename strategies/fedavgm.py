"""FedAvgM (Hsu et al., 2019): momentum on the server."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .fedavg import FedAvg


class FedAvgM(FedAvg):
    """SGD with momentum, the cohort's update as its gradient::

        v <- server_momentum v + (w - mean_k w_k)
        w <- w - server_learning_rate v

    The numbers of Flower's FedAvgM, on the device; its arguments too. BatchNorm statistics, which
    are not descended on, are averaged. The server keeps P numbers.

    Parameters
    ----------
    server_learning_rate : float
        Of the server's SGD; the paper's is 1.
    server_momentum : float
        In [0, 1). The paper's, from memory: 0.9 among others. 0 at rate 1 is FedAvg.
    flower : keyword arguments
        Those of Flower's FedAvg.
    """

    def __init__(
        self, server_learning_rate: float = 1.0, server_momentum: float = 0.9, **flower: Any
    ) -> None:
        super().__init__(**flower)
        self.server_learning_rate = server_learning_rate
        self.server_momentum = server_momentum
        self.v: Tensor | float = 0.0

    def aggregate(self, w: Tensor, W: Sequence[Tensor], n: Sequence[float]) -> Tensor:
        """Return the new state (S,)."""
        new, P = super().aggregate(w, W, n), self.layout.trainable
        self.v = self.server_momentum * self.v + (w[:P] - new[:P])
        new[:P] = w[:P] - self.server_learning_rate * self.v
        return new
