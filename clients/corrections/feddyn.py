"""FedDyn's client (Acar et al., ICLR 2021): dynamic regularisation."""

from torch import Tensor

from fedsam.training.method import Correction, Local, Vectors


class FedDyn(Correction):
    """Descend on f_i(w) - <h_i, w> + alpha/2 ||w - w_global||^2::

        g   <- g - h_i + alpha (w - w_global)
        h_i <- h_i - alpha (w - w_global)                   at the end of the round

    h_i becomes the gradient of f_i where the client's rounds end, so that all clients can agree on
    one minimum. The server's half is the strategy of this name. The correction acts where the base
    optimiser steps, at the unperturbed w. In the released code alpha is divided by the client's
    share of the images times the number of clients, which is 1 for balanced clients.

    A client keeps P numbers; P travel each way. Passes a step: the minimizer's.

    Parameters
    ----------
    alpha : float
        Strength. Released code, CIFAR-10: 0.01; FedGF's grid on the FedSAM benchmark: 0.1, 0.01,
        0.001; with SAM (FedSpeed, FedLESAM-D): 0.1.
    """

    memory = ("h_i",)

    def __init__(self, alpha: float = 0.01) -> None:
        if alpha < 0:
            raise ValueError(f"alpha: must be at least 0, got {alpha}")
        self.alpha = alpha

    def correct(self, w: Tensor, g: Tensor, local: Local) -> Tensor:
        """Return the gradient of the local objective at ``w``."""
        return g - local.memory["h_i"] + self.alpha * (w - local.anchor)

    def finish(self, w: Tensor, local: Local) -> Vectors:
        """Return the new h_i."""
        return {"h_i": local.memory["h_i"] - self.alpha * (w - local.anchor)}
