"""Lookbehind-SAM (Mordido et al., ICML 2024): several ascents behind, several descents ahead."""

from typing import ClassVar

from torch import Tensor

from fedsam.base.vector import TINY
from fedsam.training.method import Ascent, Descend, Grad, Local, Minimizer, Vectors


class Lookbehind(Minimizer):
    """k ascents that accumulate, k descents of the fast weights, one slow step between them::

        a_0 = f_0 = w
        a_j = a_{j-1} + e(a_{j-1}),    f_j = descend(f_{j-1}, g(a_j)),    j = 1..k
        w <- w + step (f_k - w)

    e is another minimizer's, SAM's or ASAM's. All passes see one mini-batch. g(a_j) is both the
    descent gradient of step j and the ascent gradient of step j + 1, so k + 1 passes do the work
    of the official code's 2k. With k = 1 and step = 1 it is SAM (or ASAM).

    Parameters
    ----------
    ascent : Ascent
        Whose e it is; by name: sam or asam. k ascents of radius rho can go k rho far.
    k : int
        Ascents and descents a mini-batch. The paper's values: 2, 5, 10.
    slow : float
        The paper's alpha, the fraction of the way from w to f_k: 0.2, 0.5 or 0.8. A negative value
        chooses it for each parameter tensor from the angle between the first and the whole
        displacement: alpha = (cos(f_1 - w, f_k - w) + 1) / 2, 0.5 where either is zero.
    """

    minimizers: ClassVar = {"ascent": "sam"}

    def __init__(self, ascent: Minimizer, k: int = 5, slow: float = 0.5) -> None:
        if not isinstance(ascent, Ascent):
            raise ValueError(f"ascent: must be sam or asam, got {type(ascent).__name__}")
        if k < 1:
            raise ValueError(f"k: must be at least 1, got {k}")
        if slow > 1:
            raise ValueError(f"slow: must be at most 1 (negative: adaptive), got {slow}")
        self.k = k
        self.slow = slow
        self.ascent = ascent

    def step(self, w: Tensor, grad: Grad, descend: Descend, local: Local) -> tuple[Tensor, Vectors]:
        """Return w after one mini-batch, and no state."""
        behind = fast = w
        g = grad(w)
        for j in range(self.k):
            behind = behind + self.ascent.perturbation(behind, g, local)
            g = grad(behind)
            fast = descend(fast, g)
            if j == 0:
                first = fast
        alpha = self.slow if self.slow >= 0 else adaptive_alpha(first - w, fast - w, local)
        return w + alpha * (fast - w), {}


def adaptive_alpha(first: Tensor, total: Tensor, local: Local) -> Tensor:
    """Return (cos + 1) / 2 for each parameter tensor, spread over its elements, (..., P)."""
    sums = local.layout.sum_by_tensor
    lengths = (sums(first**2).sqrt() + TINY) * (sums(total**2).sqrt() + TINY)
    cosine = sums(first * total) / lengths
    return local.layout.spread((cosine + 1) / 2)
