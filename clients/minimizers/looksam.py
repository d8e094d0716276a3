"""LookSAM (Liu et al., CVPR 2022): SAM's second pass in every k-th step only."""

from torch import Tensor

from fedsam.base.vector import choose, dot, norm, unit
from fedsam.training.method import Descend, Grad, Local, Minimizer, Vectors


class LookSAM(Minimizer):
    """In between, add the part of SAM's gradient that changes slowly, as it was last seen::

        step t = 0, k, 2k, ...:    s = g(w + rho unit(g)),    v = s - <s, unit(g)> unit(g)
        other steps:               s = g + alpha ||g|| unit(v)
        w <- w - lr s

    v starts anew in each round: clients are stateless, and their first step is SAM's. With k = 1
    it is SAM, with k above 1 and alpha = 0 SGD in between. rho = 0 is not SGD: v is then 0 / 0.
    One norm over all parameters, where the ports take one a tensor (no code of the authors' is
    public); the paper's layer-wise scaling (for ViT) is left out. Passes a
    step: 1 + 1 / k, but 2 in a batched cohort, whose program is the same for all steps. Kept in a
    round: P.

    Parameters
    ----------
    rho : float
        Radius (l2), above 0.
    k : int
        Steps between second passes. As in every port that was read: 5.
    alpha : float
        Strength of v in between. As in every port that was read: 0.7.
    """

    state = ("v",)

    def __init__(self, rho: float, k: int = 5, alpha: float = 0.7) -> None:
        if k < 1:
            raise ValueError(f"k: must be at least 1, got {k}")
        self.rho = rho
        self.k = k
        self.alpha = alpha

    def step(self, w: Tensor, grad: Grad, descend: Descend, local: Local) -> tuple[Tensor, Vectors]:
        """Return w after one mini-batch, and v."""
        g, v = grad(w), local.state["v"]
        s = choose(
            local.step % self.k == 0,
            lambda: grad(w + self.rho * unit(g)),
            lambda: g + self.alpha * norm(g) * unit(v),
        )
        v = choose(local.step % self.k == 0, lambda: s - dot(s, unit(g)) * unit(g), lambda: v)
        return descend(w, s), {"v": v}
