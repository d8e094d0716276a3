"""FedDyn's server (Acar et al., ICLR 2021): the average, moved by all updates so far."""

from collections.abc import Sequence

from torch import Tensor

from fedsam.base.strategy import ServerMethod, State
from fedsam.base.vector import mean


class FedDyn(ServerMethod):
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
    """

    state = ("h",)

    def __init__(self, clients: int) -> None:
        self.clients = clients

    def update(
        self, w: Tensor, W: Sequence[Tensor], n: Sequence[float], state: State, round: int
    ) -> tuple[Tensor, State]:
        """Return the new model (P,) and the new state."""
        mean_w = mean(W)
        h = state["h"] - len(W) / self.clients * (mean_w - w)
        return mean_w - h, {"h": h}
