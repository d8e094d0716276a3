"""VaSSO (Li and Giannakis, NeurIPS 2023): SAM's ascent with less variance."""

from torch import Tensor

from fedsam.base.vector import unit
from fedsam.training.method import Descend, Grad, Local, Minimizer, Vectors


class VaSSO(Minimizer):
    """Ascend along a moving average of the mini-batch gradients::

        d_t = (1 - theta) d_{t-1} + theta g_t(w),    d_0 = g_0
        w <- w - lr g_t(w + rho unit(d_t))

    d starts anew in each round: clients are stateless. With theta = 1 it is SAM. Passes a step: 2.
    Kept in a round: P.

    Parameters
    ----------
    rho : float
        Radius (l2). The official script for WRN-28-10 on CIFAR-100: 0.2.
    theta : float
        Weight of the newest gradient. The official script: 0.9.
    """

    state = ("d",)

    def __init__(self, rho: float, theta: float = 0.9) -> None:
        if not 0 < theta <= 1:
            raise ValueError(f"theta: must be above 0 and at most 1, got {theta}")
        self.rho = rho
        self.theta = theta

    def step(self, w: Tensor, grad: Grad, descend: Descend, local: Local) -> tuple[Tensor, Vectors]:
        """Return w after one mini-batch, and d."""
        d, g = local.state["d"], grad(w)
        d = g + (1 - self.theta) * (d - g) * (local.step > 0)
        return descend(w, grad(w + self.rho * unit(d))), {"d": d}
