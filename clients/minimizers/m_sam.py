"""m-SAM: a perturbation for each m examples (Foret et al., ICLR 2021)."""

from functools import reduce
from operator import add

from torch import Tensor

from fedsam.base.vector import unit
from fedsam.training.method import Descend, Grad, Local, Minimizer, Vectors


class MSAM(Minimizer):
    """Part the mini-batch; each part climbs its own loss by itself::

        e_i = rho unit(g_i(w)),    i: the parts, of m examples
        w <- w - lr sum_i (m_i / n) g_i(w + e_i)

    Google's SAM does so across accelerators, one part on each. With m of the mini-batch's size or
    more it is SAM, as every client's mini-batch then is its own m. Passes a step: 2, each in n / m
    parts.

    Parameters
    ----------
    rho : float
        Radius (l2) of each part's perturbation.
    m : int
        Examples a part; the last of a mini-batch may be smaller. Foret et al. find that a
        smaller m generalises better (unverified); the value is free.
    """

    def __init__(self, rho: float, m: int = 16) -> None:
        if m < 1:
            raise ValueError(f"m: must be at least 1, got {m}")
        self.rho = rho
        self.m = m

    def step(self, w: Tensor, grad: Grad, descend: Descend, local: Local) -> tuple[Tensor, Vectors]:
        """Return w after one mini-batch, and no state."""
        parts = grad.parts(self.m)
        g = reduce(add, (n * g(w + self.rho * unit(g(w))) for n, g in parts))
        return descend(w, g), {}
