"""Multistep-SAM: several ascents, one descent; Lookbehind's baseline (Mordido et al., 2024)."""

from typing import ClassVar

from torch import Tensor

from fedsam.training.method import Ascent, Descend, Grad, Local, Minimizer, Vectors


class MultistepSAM(Minimizer):
    """Descend along the gradient at the end of k ascents that accumulate::

        a_0 = w
        a_j = a_{j-1} + e(a_{j-1}),    j = 1..k
        w <- w - lr g(a_k)

    e is another minimizer's, SAM's or ASAM's; all passes see one mini-batch. With k = 1 it is SAM
    (or ASAM). The paper describes it, its code does not hold it. Passes a step: k + 1.

    Parameters
    ----------
    ascent : Ascent
        Whose e it is; by name: sam or asam. k ascents of radius rho can go k rho far. Lookbehind
        on CIFAR: 0.05 for SAM, 0.5 for ASAM.
    k : int
        Ascents a mini-batch. The paper's values: 2, 5, 10.
    """

    minimizers: ClassVar = {"ascent": "sam"}

    def __init__(self, ascent: Minimizer, k: int = 5) -> None:
        if not isinstance(ascent, Ascent):
            raise ValueError(f"ascent: must be sam or asam, got {type(ascent).__name__}")
        if k < 1:
            raise ValueError(f"k: must be at least 1, got {k}")
        self.k = k
        self.ascent = ascent

    def step(self, w: Tensor, grad: Grad, descend: Descend, local: Local) -> tuple[Tensor, Vectors]:
        """Return w after one mini-batch, and no state."""
        a = w
        for _ in range(self.k):
            a = a + self.ascent.perturbation(a, grad(a), local)
        return descend(w, grad(a)), {}
