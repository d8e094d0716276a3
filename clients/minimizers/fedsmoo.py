"""FedSMOO's minimizer (Sun et al., ICML 2023): ascents that the clients agree on."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsam.base.vector import unit
from fedsam.training.method import Descend, Grad, Local, Minimizer, Vectors


class FedSMOO(Minimizer):
    """SAM whose ascent a dual variable pulls towards the server's s::

        e    = rho unit(g(w) - mu_i - s)
        mu_i <- mu_i + e - s                          in every step
        w    <- w - lr g(w + e)
        s    <- rho unit(mean_i mu_i)                 on the server, over the cohort

    With FedDyn's client and server it is FedSMOO. The paper's s has the last e of each client taken
    off mu_i; the authors' code leaves that out, and so does this. In the first round a client's
    first step is SAM's; later it is not, a newcomer's neither, as s is no longer 0.

    A client keeps P numbers, and P more travel each way. Passes a step: 2.

    Parameters
    ----------
    rho : float
        Radius of the ball, an l2 length in parameter space. The authors' code on CIFAR-10: 0.1.
    """

    memory = ("mu_i",)
    exchanged = ("s",)
    state = ("change",)  # of mu_i in this round

    def __init__(self, rho: float) -> None:
        self.rho = rho

    def step(self, w: Tensor, grad: Grad, descend: Descend, local: Local) -> tuple[Tensor, Vectors]:
        """Return w after one mini-batch, and the change."""
        s, change = local.sent["s"], local.state["change"]
        e = self.rho * unit(grad(w) - (local.memory["mu_i"] + change) - s)
        return descend(w, grad(w + e)), {"change": change + e - s}

    def finish(self, w: Tensor, local: Local) -> Vectors:
        """Return the new mu_i, which goes to the server, too."""
        mu_i = local.memory["mu_i"] + local.state["change"]
        return {"mu_i": mu_i, "s": mu_i}

    def fold(self, sent: Vectors, replies: Sequence[Vectors], share: float) -> Vectors:
        """Return the server's next s."""
        return {"s": self.rho * unit(torch.stack([reply["s"] for reply in replies]).mean(0))}
