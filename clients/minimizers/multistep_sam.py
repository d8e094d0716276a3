"""Multistep-SAM: several ascents, one descent; Lookbehind's baseline (Mordido et al., 2024)."""

from torch import Tensor

from fedsam.training.method import Descend, Grad, Local

from .lookbehind import ascent_of


class MultistepSAM:
    """Descend along the gradient at the end of k ascents that accumulate::

        a_0 = w
        a_j = a_{j-1} + e(a_{j-1}),    j = 1..k
        w <- w - lr g(a_k)

    e is SAM's or ASAM's perturbation; all passes see one mini-batch. With k = 1 it is SAM (or
    ASAM). The paper describes it, its code does not hold it. Passes a step: k + 1.

    Parameters
    ----------
    rho : float
        Radius of each ascent (l2); together they can go k rho far. Lookbehind on CIFAR: 0.05 for
        SAM, 0.5 for ASAM.
    eta : float
        ASAM's eta; not used when ``ascent`` is "sam".
    k : int
        Ascents a mini-batch. The paper's values: 2, 5, 10.
    ascent : str
        "sam" or "asam".
    """

    def __init__(self, rho: float, eta: float, k: int = 5, ascent: str = "sam") -> None:
        if k < 1:
            raise ValueError(f"k: must be at least 1, got {k}")
        self.k = k
        self.ascent = ascent_of(ascent, rho, eta)

    def step(self, w: Tensor, grad: Grad, descend: Descend, local: Local) -> Tensor:
        """Return w after one mini-batch."""
        a = w
        for _ in range(self.k):
            a = a + self.ascent.perturbation(a, grad(a), local)
        return descend(w, grad(a))
