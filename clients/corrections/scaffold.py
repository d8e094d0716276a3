"""SCAFFOLD (Karimireddy et al., ICML 2020): control variates against client drift."""

from collections.abc import Sequence

from torch import Tensor

from fedsam.base.vector import along
from fedsam.training.method import Correction, Local, Vectors


class Scaffold(Correction):
    """Correct each gradient by what the client's own direction differs from everybody's::

        g   <- g + strength (c - c_i)
        c_i <- c_i - c + (w_global - w) / (steps lr)        (option II)
        c   <- c + |cohort| / |population|  mean_i (new c_i - old c_i)

    The model is averaged by whatever strategy is used; the paper's server rate of 1 is FedAvg's.
    With momentum (w_global - w) / (steps lr) is no mean gradient any more, and c_i grows with it.
    A client keeps P numbers, and P more travel each way.

    Parameters
    ----------
    strength : float
        Of the correction: 1. The released code of FedLESAM-S: 0.1, with c_i as above.
    """

    memory = ("c_i",)
    exchanged = ("c",)

    def __init__(self, strength: float = 1.0) -> None:
        if strength < 0:
            raise ValueError(f"strength: must be at least 0, got {strength}")
        self.strength = strength

    def correct(self, w: Tensor, g: Tensor, local: Local) -> Tensor:
        """Return the corrected gradient."""
        c_i, c = local.memory["c_i"], local.sent["c"]
        return along(along(g, -self.strength, c_i), self.strength, c)

    def finish(self, w: Tensor, local: Local) -> Vectors:
        """Return the new c_i, and its change, which goes to the server."""
        c_i, c = local.memory["c_i"], local.sent["c"]
        new = c_i - c + (local.anchor - w) / (local.steps * local.lr)
        return {"c_i": new, "c": new - c_i}

    def fold(self, sent: Vectors, replies: Sequence[Vectors], share: float) -> Vectors:
        """Return the server's next c."""
        return {"c": sent["c"] + share * sum(reply["c"] for reply in replies) / len(replies)}
