"""SAM: sharpness-aware minimisation (Foret et al., ICLR 2021), FedSAM's minimizer."""

import torch
from torch import Tensor

from fedsam.base.vector import unit
from fedsam.training.method import Ascent, Descend, Grad, Local, Vectors


class SAM(Ascent):
    """Descend along the gradient at the worst point of a ball of radius rho::

        e = rho g(w) / ||g(w)||
        w <- w - lr g(w + e)

    One l2 norm over ALL parameters, as in the code of Caldarola et al. (ECCV 2022). Weight decay
    is not in g: it acts at w (Google's SAM has it in the loss and so in both gradients).
    With a warm-up, as FedGloSS's clients have it, rho is reached in round warmup + 1::

        rho_t = rho_0 + min(1, (t - 1) / warmup) (rho - rho_0)            t: the round, from 1

    Passes a step: 2.

    Parameters
    ----------
    rho : float
        Radius of the ball, an l2 length in parameter space. CIFAR-10 in FedSAM: 0.1 at alpha 0
        and 0.05, 0.02 at alpha 100.
    rho_0 : float
        Radius in the first round of a warm-up. FedGloSS: 0.001.
    warmup : int
        Rounds (0: rho from the start). FedGloSS: 2000 of 10,000 on CIFAR-10.
    """

    def __init__(self, rho: float, rho_0: float = 0.0, warmup: int = 0) -> None:
        for name, value in (("rho_0", rho_0), ("warmup", warmup)):
            if value < 0:
                raise ValueError(f"{name}: must be at least 0, got {value}")
        self.rho = rho
        self.rho_0 = rho_0
        self.warmup = warmup

    def perturbation(self, w: Tensor, g: Tensor, local: Local) -> Tensor:
        """Return e (..., P) for the gradient ``g`` at ``w``."""
        u = unit(g)
        if not self.warmup:
            return self.rho * u
        ahead = torch.as_tensor(self.warmup + 1 - local.round).clamp(min=0)
        return self.rho * u - (self.rho - self.rho_0) * (u * ahead / self.warmup)

    def step(self, w: Tensor, grad: Grad, descend: Descend, local: Local) -> tuple[Tensor, Vectors]:
        """Return w after one mini-batch, and no state."""
        e = self.perturbation(w, grad(w), local)
        return descend(w, grad(w + e)), {}
