"""FedYogi (Reddi et al., ICLR 2021): Yogi on the server."""

from collections.abc import Sequence

from torch import Tensor

from fedsam.base.strategy import ServerMethod, State
from fedsam.base.vector import weighted_mean


class FedYogi(ServerMethod):
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
        How much of m is kept; the paper's is 0.9 (quoted in FedACG's code, as those below).
    beta_2 : float
        How much of v is kept; the paper's is 0.99.
    tau : float
        Adaptivity, in the units of an update; the paper's default is 1e-3.
    """

    state = ("m", "v")

    def __init__(
        self,
        eta: float = 0.01,
        beta_1: float = 0.9,
        beta_2: float = 0.99,
        tau: float = 1e-3,
    ) -> None:
        self.eta = eta
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.tau = tau

    def update(
        self, w: Tensor, W: Sequence[Tensor], n: Sequence[float], state: State, round: int
    ) -> tuple[Tensor, State]:
        """Return the new model (P,) and the new state."""
        d = weighted_mean(W, n) - w
        m = self.beta_1 * state["m"] + (1 - self.beta_1) * d
        v = state["v"] - (1 - self.beta_2) * d**2 * (state["v"] - d**2).sign()
        return w + self.eta * m / (v.sqrt() + self.tau), {"m": m, "v": v}
