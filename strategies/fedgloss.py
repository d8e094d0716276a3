"""FedGloSS's server (Caldarola et al., CVPR 2025): SAM on the server, without a second round."""

from collections.abc import Iterable, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from torch import Tensor

from fedsam.base.vector import unit, weighted_mean
from fedsam.messages import VectorRecord, layout_of, state_of

from .feddyn import FedDyn


class FedGloSS(FedDyn):
    """Let clients start at the server's worst point near w, as the last round's update shows it::

        e     = rho_t unit(g)         g: the pseudo-gradient of the round before, at first 0
        sent  = w + e
        g    <- sent - mean_k w_k
        w    <- (FedDyn's w from sent) - e

    rho_t goes linearly from rho_0 to rho over ``warmup`` rounds. It goes with FedDyn's client,
    whose alpha is 1 / beta of the paper, and SAM as the minimiser. The released code divides the
    server's correction by the cohort's size once more than FedDyn's formula, which is used here,
    and lets the clients' rho grow by the same schedule; here it is constant. With rho = 0 it is
    FedDyn. The server keeps 3P numbers; P travel each way.

    Parameters
    ----------
    clients : int
        Population size; the run's.
    rho : float
        Radius on the server (l2). CIFAR-10: 0.15; CIFAR-100: 0.01.
    rho_0 : float
        Radius in the first round: 0.001.
    warmup : int
        Rounds. CIFAR-10: 2000 of 10,000; CIFAR-100: 15,000 of 20,000. 0: rho from the start.
    flower : keyword arguments
        Those of Flower's FedAvg.
    """

    def __init__(
        self,
        clients: int,
        rho: float = 0.15,
        rho_0: float = 0.001,
        warmup: int = 0,
        **flower: Any,
    ) -> None:
        super().__init__(clients, **flower)
        self.rho, self.rho_0, self.warmup = rho, rho_0, warmup
        self.g: Tensor | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the perturbed model to the nodes."""
        layout = layout_of(arrays)
        w, P = state_of(arrays, layout).clone(), layout.trainable
        done = min(1.0, (server_round - 1) / self.warmup) if self.warmup else 1.0
        rho = self.rho_0 + done * (self.rho - self.rho_0)
        self.e = 0 * w[:P] if self.g is None else rho * unit(self.g)
        w[:P] += self.e
        return super().configure_train(server_round, VectorRecord(layout, w), config, grid)

    def aggregate(self, w: Tensor, W: Sequence[Tensor], n: Sequence[float]) -> Tensor:
        """Return the new state (S,)."""
        new, P = super().aggregate(w, W, n), self.layout.trainable
        self.g = w[:P] - weighted_mean([w_k[:P] for w_k in W], [1.0] * len(W))
        new[:P] -= self.e
        return new
