"""FedAdagrad (Reddi et al., ICLR 2021): Adagrad on the server."""

from collections.abc import Sequence

from torch import Tensor

from fedsam.base.strategy import ServerMethod, State
from fedsam.base.vector import weighted_mean


class FedAdagrad(ServerMethod):
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
        Adaptivity, in the units of an update; the paper's is 1e-3 (quoted in FedACG's code).
    """

    state = ("v",)

    def __init__(self, eta: float = 0.01, tau: float = 1e-3) -> None:
        self.eta = eta
        self.tau = tau

    def update(
        self, w: Tensor, W: Sequence[Tensor], n: Sequence[float], state: State, round: int
    ) -> tuple[Tensor, State]:
        """Return the new model (P,) and the new state."""
        d = weighted_mean(W, n) - w
        v = state["v"] + d**2
        return w + self.eta * d / (v.sqrt() + self.tau), {"v": v}
