"""FedMoSWA's client (Liu et al., ICML 2025): FedSWA with control variates that follow quickly."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsam.training.method import Correction, Local, Vectors


class FedMoSWA(Correction):
    """SCAFFOLD's correction in a cycle of falling rates, with momentum in the server's variate::

        g   <- (1 - (1 - rho_end) k / steps) (g - c_i + c)             k: the step, from 0
        c_i <- c_i - c + (w_global - w) / (steps lr (1 + rho_end) / 2)
        c   <- c + gamma mean_i (new c_i - c)

    SCAFFOLD's c moves by the change of c_i times the cohort's part of the population. Weight decay
    keeps lr. A client keeps P numbers, and P more travel each way. Passes a step: the minimizer's.

    Parameters
    ----------
    rho_end : float
        The paper's rho, in [0, 1]: the end of the cycle as a part of lr. Released code: 0.
    gamma : float
        In (0, 1]: how fast c follows. Released code: 0.4.
    """

    memory = ("c_i",)
    exchanged = ("c",)

    def __init__(self, rho_end: float = 0.0, gamma: float = 0.4) -> None:
        if not 0 <= rho_end <= 1:
            raise ValueError(f"rho_end: must lie in [0, 1], got {rho_end}")
        self.rho_end = rho_end
        self.gamma = gamma

    def correct(self, w: Tensor, g: Tensor, local: Local) -> Tensor:
        """Return the corrected gradient, shorter from step to step."""
        g = g - local.memory["c_i"] + local.sent["c"]
        return g - (1 - self.rho_end) * (local.step * g / local.steps)

    def finish(self, w: Tensor, local: Local) -> Vectors:
        """Return the new c_i, and how far it is from c, which goes to the server."""
        c_i, c = local.memory["c_i"], local.sent["c"]
        rate = local.lr * (1 + self.rho_end) / 2
        new = c_i - c + (local.anchor - w) / (local.steps * rate)
        return {"c_i": new, "c": new - c}

    def fold(self, sent: Vectors, replies: Sequence[Vectors], share: float) -> Vectors:
        """Return the server's next c."""
        return {"c": sent["c"] + self.gamma * torch.stack([r["c"] for r in replies]).mean(0)}
