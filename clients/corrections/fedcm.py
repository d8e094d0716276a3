"""FedCM's client (Xu et al., 2021): each step is mostly the cohort's last direction."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsam.training.method import Correction, Local, Vectors


class FedCM(Correction):
    """Mix every gradient with the mean direction of the last cohort::

        g     <- alpha g + (1 - alpha) Delta
        Delta <- mean_i (w_global - w_i) / (steps_i lr)      on the server

    Delta is zero in the first round. Weight decay is added to the mixed gradient. The model is
    averaged by whatever strategy is used; the paper's server rate of 1 is FedAvg's. With SAM as
    the minimizer it is MoFedSAM (Qu et al., ICML 2022).

    Nothing is kept by a client. 2P numbers travel each way: the paper sends P up, but its server
    divides by one number of steps and one rate for all; here each client divides by its own.

    Parameters
    ----------
    alpha : float
        Weight of the client's own gradient, in (0, 1]; 1 is FedAvg. FL-Simulator on CIFAR-10: 0.1
        for FedCM, 0.05 or 0.1 for MoFedSAM (its beta); FedGF's grid there: 0.1, 0.7, 0.9.
    """

    exchanged = ("Delta",)

    def __init__(self, alpha: float = 0.1) -> None:
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha: must lie in (0, 1], got {alpha}")
        self.alpha = alpha

    def correct(self, w: Tensor, g: Tensor, local: Local) -> Tensor:
        """Return the mixed gradient."""
        return self.alpha * g + (1 - self.alpha) * local.sent["Delta"]

    def finish(self, w: Tensor, local: Local) -> Vectors:
        """Return the client's mean direction, as a gradient."""
        return {"Delta": (local.anchor - w) / (local.steps * local.lr)}

    def fold(self, sent: Vectors, replies: Sequence[Vectors], share: float) -> Vectors:
        """Return the cohort's mean direction."""
        return {"Delta": torch.stack([reply["Delta"] for reply in replies]).mean(0)}
