"""SCAFFOLD (Karimireddy et al., ICML 2020): control variates against client drift."""

from collections.abc import Sequence

from torch import Tensor

from fedsam.training.method import Correction, Local, Vectors


class Scaffold(Correction):
    """Correct each gradient by what the client's own direction differs from everybody's::

        g   <- g - c_i + c
        c_i <- c_i - c + (w_global - w) / (steps lr)        (option II)
        c   <- c + |cohort| / |population|  mean_i (new c_i - old c_i)

    The model is averaged by whatever strategy is used; the paper's server rate of 1 is FedAvg's.
    With momentum (w_global - w) / (steps lr) is no mean gradient any more, and c_i grows with it.
    A client keeps P numbers, and P more travel each way.
    """

    memory = ("c_i",)
    exchanged = ("c",)

    def correct(self, w: Tensor, g: Tensor, local: Local) -> Tensor:
        """Return the corrected gradient."""
        return g - local.memory["c_i"] + local.sent["c"]

    def finish(self, w: Tensor, local: Local) -> Vectors:
        """Return the new c_i, and its change, which goes to the server."""
        c_i, c = local.memory["c_i"], local.sent["c"]
        new = c_i - c + (local.anchor - w) / (local.steps * local.lr)
        return {"c_i": new, "c": new - c_i}

    def fold(self, sent: Vectors, replies: Sequence[Vectors], share: float) -> Vectors:
        """Return the server's next c."""
        return {"c": sent["c"] + share * sum(reply["c"] for reply in replies) / len(replies)}
