"""SAM: sharpness-aware minimisation (Foret et al., ICLR 2021), FedSAM's minimizer."""

from torch import Tensor

from fedsam.base.vector import unit
from fedsam.training.method import Ascent, Descend, Grad, Local, Vectors


class SAM(Ascent):
    """Descend along the gradient at the worst point of a ball of radius rho::

        e = rho g(w) / ||g(w)||
        w <- w - lr g(w + e)

    One l2 norm over ALL parameters, as in the code of Caldarola et al. (ECCV 2022). Weight decay
    is not in g: it acts at w (Google's SAM has it in the loss and so in both gradients).
    Passes a step: 2.

    Parameters
    ----------
    rho : float
        Radius of the ball, an l2 length in parameter space. CIFAR-10 in FedSAM: 0.1 at alpha 0
        and 0.05, 0.02 at alpha 100.
    """

    def __init__(self, rho: float) -> None:
        self.rho = rho

    def perturbation(self, w: Tensor, g: Tensor, local: Local) -> Tensor:
        """Return e (..., P) for the gradient ``g`` at ``w``."""
        return self.rho * unit(g)

    def step(self, w: Tensor, grad: Grad, descend: Descend, local: Local) -> tuple[Tensor, Vectors]:
        """Return w after one mini-batch, and no state."""
        e = self.perturbation(w, grad(w), local)
        return descend(w, grad(w + e)), {}
