"""FedACG (Kim et al., CVPR 2024): clients start where the server's momentum leads."""

from collections.abc import Iterable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from torch import Tensor

from fedsam.messages import VectorRecord, layout_of, state_of

from .fedavg import FedAvg


class FedACG(FedAvg):
    """Send a lookahead, Nesterov's way; the model is the mean of what comes back::

        sent  = w + server_momentum m
        m    <- server_momentum m + (mean_k w_k - sent),    w <- w + m

    which is w <- mean_k w_k and m = the change of w. The paper's clients are FedProx's, whose
    anchor is what was sent. What is evaluated is w. The server keeps P numbers; P travel each way.
    Formula and value are from memory of the paper, not checked against its code.

    Parameters
    ----------
    server_momentum : float
        The paper's lambda, in [0, 1): 0.85. 0 is FedAvg.
    flower : keyword arguments
        Those of Flower's FedAvg.
    """

    def __init__(self, server_momentum: float = 0.85, **flower: Any) -> None:
        if not 0 <= server_momentum < 1:
            raise ValueError(f"server_momentum: must lie in [0, 1), got {server_momentum}")
        super().__init__(**flower)
        self.server_momentum = server_momentum
        self.last: Tensor | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the lookahead to the nodes."""
        layout = layout_of(arrays)
        w, P = state_of(arrays, layout), layout.trainable
        ahead = w.clone()
        if self.last is not None:
            ahead[:P] += self.server_momentum * (w[:P] - self.last[:P])
        self.last = w
        return super().configure_train(server_round, VectorRecord(layout, ahead), config, grid)
