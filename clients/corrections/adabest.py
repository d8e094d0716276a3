"""AdaBest's client (Varno et al., ECCV 2022): bias estimates that fade."""

from torch import Tensor

from fedsam.training.method import Correction, Local, Vectors


class AdaBest(Correction):
    """Correct by an estimate of the client's bias that is forgotten while it does not train::

        g   <- g - h_i
        h_i <- h_i / (t - t_i) + mu (w_global - w)           t: this round, t_i: its last one

    The server's half is the strategy of this name. A client keeps 2P numbers (t_i as a vector: all
    that is kept has the shape of w); P travel each way. Passes a step: the minimizer's. The first
    author's code scales mu by about 1 / steps of an epoch.

    Parameters
    ----------
    mu : float
        Strength of an update of h_i, per unit of w. The paper's, from memory: 0.02. The
        first author's code: 0.1 by default, so 0.0125 at 8 steps.
    """

    memory = ("h_i", "t_i")

    def __init__(self, mu: float = 0.02) -> None:
        if mu < 0:
            raise ValueError(f"mu: must be at least 0, got {mu}")
        self.mu = mu

    def correct(self, w: Tensor, g: Tensor, local: Local) -> Tensor:
        """Return the corrected gradient."""
        return g - local.memory["h_i"]

    def finish(self, w: Tensor, local: Local) -> Vectors:
        """Return the new h_i, and this round."""
        h_i, t_i = local.memory["h_i"], local.memory["t_i"]
        h_i = h_i / (local.round - t_i) + self.mu * (local.anchor - w)
        return {"h_i": h_i, "t_i": 0 * t_i + local.round}
