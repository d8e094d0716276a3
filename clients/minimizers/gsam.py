"""GSAM: surrogate gap guided SAM (Zhuang et al., ICLR 2022)."""

from torch import Tensor

from fedsam.base.vector import dot, unit
from fedsam.training.method import Descend, Grad, Local, Minimizer, Vectors


class GSAM(Minimizer):
    """SAM's descent, less what lowers the loss at w but not the perturbed loss::

        g = g(w),    p = g(w + rho unit(g))
        v = g - <g, unit(p)> unit(p)        (the part of g orthogonal to p)
        w <- w - lr (p - alpha v)

    It also lowers the gap between both losses. The paper lets rho fall with the learning rate;
    here it is constant, as the rate is within a round. With alpha = 0 it is SAM. The first
    author's PyTorch code (the paper's is in JAX) updates BatchNorm statistics in the first pass
    only: ``--bn-first-pass``. Passes a step: 2.

    Parameters
    ----------
    rho : float
        Radius (l2).
    alpha : float
        Strength of the orthogonal part. The CIFAR-10 script of the first author's PyTorch code:
        0.4 (0.2 before), with an adaptive ascent of rho 2.
    """

    def __init__(self, rho: float, alpha: float = 0.4) -> None:
        self.rho = rho
        self.alpha = alpha

    def step(self, w: Tensor, grad: Grad, descend: Descend, local: Local) -> tuple[Tensor, Vectors]:
        """Return w after one mini-batch, and no state."""
        g = grad(w)
        p = grad(w + self.rho * unit(g))
        v = g - dot(g, unit(p)) * unit(p)
        return descend(w, p - self.alpha * v), {}
