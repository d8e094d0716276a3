"""FedProx's client (Li et al., MLSys 2020): stay near the global model."""

from torch import Tensor

from fedsam.training.method import Correction, Local


class FedProx(Correction):
    """Add the proximal term mu/2 ||w - w_global||^2 to the local objective::

        g <- g + mu (w - w_global)

    The term acts where the base optimiser steps, at the unperturbed w, whatever the minimizer.

    Parameters
    ----------
    mu : float
        Strength; searched in {0.001, 0.01} on CIFAR-10 by the FedGF benchmark. 0 is FedAvg.
    """

    def __init__(self, mu: float = 0.01) -> None:
        if mu < 0:
            raise ValueError(f"mu: must be at least 0, got {mu}")
        self.mu = mu

    def correct(self, w: Tensor, g: Tensor, local: Local) -> Tensor:
        """Return the gradient of the local objective at ``w``."""
        return g + self.mu * (w - local.anchor)
