"""SCAFFOLD with option I (Karimireddy et al., ICML 2020): gradients at the global model."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsam.training.method import Descend, Grad, Local, Minimizer, Vectors


class ScaffoldOne(Minimizer):
    """SGD corrected by the client's gradient at the model that the round started from::

        w   <- w - lr (g(w) - c_i + c)
        c_i <- mean over the round's mini-batches of g(w_global)         (option I)
        c   <- c + |cohort| / |population|  mean_i (new c_i - old c_i)

    The paper's option II, which needs no second pass, is the client ``scaffold``; this one needs
    the gradient, so it is a minimizer, for FedAvg's client. The paper leaves open on which images
    g(w_global) is taken; with whole epochs it is all of the client's, as augmented.

    A client keeps P numbers, and P more travel each way. Passes a step: 2.
    """

    memory = ("g_i",)  # not c_i: a run may have option II's client beside it
    exchanged = ("g",)
    state = ("sum",)

    def step(self, w: Tensor, grad: Grad, descend: Descend, local: Local) -> tuple[Tensor, Vectors]:
        """Return w after one mini-batch, and the sum."""
        g = grad(w) - local.memory["g_i"] + local.sent["g"]
        total = local.state["sum"] + grad(local.anchor)
        return descend(w, g), {"sum": total}

    def finish(self, w: Tensor, local: Local) -> Vectors:
        """Return the new c_i, and its change, which goes to the server."""
        c_i = local.state["sum"] / local.steps
        return {"g_i": c_i, "g": c_i - local.memory["g_i"]}

    def fold(self, sent: Vectors, replies: Sequence[Vectors], share: float) -> Vectors:
        """Return the server's next c."""
        return {"g": sent["g"] + share * torch.stack([reply["g"] for reply in replies]).mean(0)}
