"""FedAdam (Reddi et al., ICLR 2021): Adam on the server."""

import math
from collections.abc import Sequence

from torch import Tensor

from fedsam.base.strategy import ServerMethod, State
from fedsam.base.vector import weighted_mean


class FedAdam(ServerMethod):
    """Adam, the cohort's update as its direction::

        m <- beta_1 m + (1 - beta_1) d,     d = mean_k w_k - w
        v <- beta_2 v + (1 - beta_2) d^2
        w <- w + eta_t m / (sqrt(v) + tau)
        eta_t = eta sqrt(1 - beta_2^(t+1)) / (1 - beta_1^(t+1))       t: the round, from 1

    The paper has eta_t = eta; the correction for the first rounds is Flower's. The numbers of
    Flower's FedAdam, on the device; v starts at zero, as there. BatchNorm statistics, which are
    not descended on, are averaged. The server keeps 2P numbers.

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
        v = self.beta_2 * state["v"] + (1 - self.beta_2) * d**2
        t = round + 1  # as in Flower's
        eta = self.eta * math.sqrt(1 - self.beta_2**t) / (1 - self.beta_1**t)
        return w + eta * m / (v.sqrt() + self.tau), {"m": m, "v": v}
