"""Friendly SAM (Li et al., CVPR 2024): ascend only along what is particular to a mini-batch."""

from torch import Tensor

from fedsam.base.vector import unit
from fedsam.training.method import Descend, Grad, Local, Minimizer, Vectors


class FriendlySAM(Minimizer):
    """Leave the part of g out of the ascent that is common to mini-batches, a moving average::

        d = g_t(w) - sigma m_{t-1}
        m_t = lam m_{t-1} + (1 - lam) g_t(w),    m_0 = g_0
        w <- w - lr g_t(w + rho unit(d))

    As in the official code, whose first step is SAM's. The paper writes d = g_t - sigma m_t, for
    sigma = 1 the same direction. m starts anew in each round: clients are stateless. With
    sigma = 0 it is SAM. Passes a step: 2. Kept in a round: P.

    Parameters
    ----------
    rho : float
        Radius (l2). The official script for ResNet-18 on CIFAR-100: 0.2.
    sigma : float
        How much of the common part is left out: 1.
    lam : float
        What the average keeps a step. The official script: 0.6 since October 2024, 0.95 before
        (logs of both are released); its class's default: 0.9.
    """

    state = ("m",)

    def __init__(self, rho: float, sigma: float = 1.0, lam: float = 0.9) -> None:
        if not 0 <= lam < 1:
            raise ValueError(f"lam: must be at least 0 and below 1, got {lam}")
        self.rho = rho
        self.sigma = sigma
        self.lam = lam

    def step(self, w: Tensor, grad: Grad, descend: Descend, local: Local) -> tuple[Tensor, Vectors]:
        """Return w after one mini-batch, and m."""
        m, g = local.state["m"], grad(w)
        w = descend(w, grad(w + self.rho * unit(g - self.sigma * m)))
        return w, {"m": g + self.lam * (m - g) * (local.step > 0)}
