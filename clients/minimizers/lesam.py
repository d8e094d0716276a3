"""LESAM: perturb along the global direction (Fan et al., ICML 2024), FedLESAM's minimizer."""

import torch
from torch import Tensor

from fedsam.base.vector import norm, unit
from fedsam.training.method import Descend, Grad, Local, Minimizer, Vectors


class LESAM(Minimizer):
    """SAM whose ascent is the way that the global model came, so that it costs no pass::

        e = rho unit(w_old - w_global)       w_old: the global model of the client's last round
        w <- w - lr g(w + e)

    e is zero when a client trains first. With SCAFFOLD's client it is FedLESAM-S, with FedDyn's
    client and server FedLESAM-D.

    This is the paper's formula; the released ascent is another. Its server sends its last update,
    a flat vector, and the optimiser takes that vector's idx-th NUMBER for the update of the idx-th
    tensor: all elements of a tensor move alike, by rho times this number over the sum of the
    numbers' sizes. On a ResNet-18 at rho 0.5 that moves w by 36, across the global direction
    (cosine 0.04); here it moves by 0.5. So no rho of that code, nor of baselines that copy it,
    carries over.

    A client keeps P numbers; P travel each way. Passes a step: 1.

    Parameters
    ----------
    rho : float
        Radius of the ball, an l2 length in parameter space. No published value is known for this
        formula (released, for the other: 0.1, and 0.5 for FedLESAM-S on CIFAR-10, to be tuned).
        The presets have FedSAM's 0.1, whose ball is the same.
    """

    memory = ("w_old",)

    def __init__(self, rho: float) -> None:
        self.rho = rho

    def perturbation(self, w: Tensor, g: Tensor, local: Local) -> Tensor:
        """Return e (..., P), the same at every ``w`` and ``g`` of the round."""
        w_old = local.memory["w_old"]
        return torch.where(norm(w_old) > 0, self.rho * unit(w_old - local.anchor), 0.0)

    def step(self, w: Tensor, grad: Grad, descend: Descend, local: Local) -> tuple[Tensor, Vectors]:
        """Return w after one mini-batch, and no state."""
        return descend(w, grad(w + self.perturbation(w, w, local))), {}

    def finish(self, w: Tensor, local: Local) -> Vectors:
        """Return the global model that the round started from."""
        return {"w_old": local.anchor}
