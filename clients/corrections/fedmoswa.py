"""FedMoSWA's client (Liu et al., ICML 2025): FedSWA with control variates that follow quickly."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedsam.base.vector import norm
from fedsam.training.method import Correction, Local, Vectors

from .fedswa import falling, part_of_lr


class FedMoSWA(Correction):
    """SCAFFOLD's correction in a cycle of falling rates, with momentum in the server's variate::

        g      <- g - c_i + c
        rate_k =  lr (1 - (1 - rho_end) k / steps)              k: the step, from 0
        c_i    <- c_i - c + (w_global - w) / sum_k rate_k
        c      <- c + gamma mean_i (new c_i - c)                in the first round: mean_i c_i

    SCAFFOLD's c moves by the change of c_i times the cohort's part of the population. A client
    keeps P numbers, and P more travel each way. Passes a step: the minimizer's.

    Values are the paper's, as two independent notes quote them. What is released differs: it
    divides by steps times the mean of both ends of the cycle, so that a new c_i is too long, by
    1/steps at rho_end 0, and it clips g before c and c_i are added. In May 2025 rho_end is a flag,
    by default 0.1, and gamma 0.1; in November 2025 and 2026 it is 0 and 0.4, but ``--alg
    MoFedSWA`` runs another function: SCAFFOLD at a constant rate, with c + 0.4 mean.

    Parameters
    ----------
    rho_end : float
        The paper's rho, in [0, 1]: the end of the cycle as a part of lr. The paper's: 0.1.
    gamma : float
        In (0, 1]: how fast c follows. The paper's: 0.2.
    """

    memory = ("c_i",)
    exchanged = ("c",)

    def __init__(self, rho_end: float = 0.1, gamma: float = 0.2) -> None:
        self.rho_end = part_of_lr(rho_end)
        self.gamma = gamma

    def correct(self, w: Tensor, g: Tensor, local: Local) -> Tensor:
        """Return the corrected gradient."""
        return g - local.memory["c_i"] + local.sent["c"]

    def rate(self, local: Local) -> float | Tensor:
        """Return the learning rate of the step."""
        return falling(local, self.rho_end)

    def finish(self, w: Tensor, local: Local) -> Vectors:
        """Return the new c_i, and how far it is from c, which goes to the server."""
        c_i, c = local.memory["c_i"], local.sent["c"]
        first, last = local.lr, falling(replace(local, step=local.steps - 1), self.rho_end)
        new = c_i - c + (local.anchor - w) / (local.steps * (first + last) / 2)
        return {"c_i": new, "c": new - c}

    def fold(self, sent: Vectors, replies: Sequence[Vectors], share: float) -> Vectors:
        """Return the server's next c."""
        change = torch.stack([reply["c"] for reply in replies]).mean(0)
        return {"c": torch.where(norm(sent["c"]) > 0, sent["c"] + self.gamma * change, change)}
