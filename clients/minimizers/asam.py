"""ASAM: adaptive sharpness-aware minimisation (Kwon et al., ICML 2021), FedASAM's minimizer."""

from torch import Tensor

from fedsam.base.vector import TINY, norm
from fedsam.training.method import Ascent, Descend, Grad, Local, Vectors


class ASAM(Ascent):
    """SAM in a ball that is stretched along each weight by its own size::

        T = |w| + eta  on weights,  1  elsewhere
        e = rho T^2 g / ||T g||        (p = 2)
        e = rho T sign(g)              (p = inf)
        w <- w - lr g(w + e)

    Filter-wise, |w| becomes the l2 norm of the convolution filter that holds w, if one does.

    With eta = 0 the perturbed loss does not change under rescalings of the weights that leave the
    network the same. What is a weight is decided by name, as in the official code; biases are
    perturbed with T = 1 and count in the norm. rho is not portable to implementations that scale
    every parameter (there, 2.0 does what 0.5 does here). Passes a step: 2.

    Parameters
    ----------
    rho : float
        Radius in the stretched l2 norm. FedASAM on CIFAR-10: 0.7 at alpha 0 and 0.05, 0.05 at 100.
    eta : float
        Added to |w|, in units of the weights. FedASAM: 0.2. Kwon et al.: 0.01, the
        default of their code's class; its command for CIFAR-10 runs 0.
    all_parameters : bool
        Let T = |w| + eta on every parameter, as in the common PyTorch port.
    filterwise : bool
        One T a convolution filter. Kwon et al. found little difference, and use element-wise.
    p : int or str
        Norm of the ball: 2 or "inf". With inf a bias moves by rho, a weight by rho (|w| + eta).
    """

    def __init__(
        self,
        rho: float,
        eta: float,
        all_parameters: bool = False,
        filterwise: bool = False,
        p: int | str = 2,
    ) -> None:
        if p not in (2, "inf"):
            raise ValueError(f"p: must be 2 or inf, got {p}")
        self.rho = rho
        self.eta = eta
        self.all_parameters = all_parameters
        self.filterwise = filterwise
        self.p = p

    def perturbation(self, w: Tensor, g: Tensor, local: Local) -> Tensor:
        """Return e (..., P) for the gradient ``g`` at ``w``."""
        T = local.layout.adaptive_scale(
            w, self.eta, weights_only=not self.all_parameters, filterwise=self.filterwise
        )
        if self.p == "inf":
            return self.rho * T * g.sign()
        Tg = T * g
        return T * Tg * (self.rho / (norm(Tg) + TINY))

    def step(self, w: Tensor, grad: Grad, descend: Descend, local: Local) -> tuple[Tensor, Vectors]:
        """Return w after one mini-batch, and no state."""
        e = self.perturbation(w, grad(w), local)
        return descend(w, grad(w + e)), {}
