"""FedACG (Kim et al., CVPR 2024): clients start where the server's momentum leads."""

from collections.abc import Sequence

from torch import Tensor

from fedsam.base.strategy import ServerMethod, State
from fedsam.base.vector import weighted_mean


class FedACG(ServerMethod):
    """Send a lookahead, Nesterov's way; the model is the mean of what comes back::

        sent  = w + server_momentum m
        m    <- server_momentum m + (mean_k w_k - sent),    w <- w + m

    which is w <- mean_k w_k and m = the change of w. The paper's clients are FedProx's, whose
    anchor is what was sent; the released beta of 1e-3 lacks FedProx's half, so mu is 0.002. What is
    evaluated is w. The server keeps P numbers; P travel each way.

    Parameters
    ----------
    server_momentum : float
        The paper's lambda, in [0, 1): 0.85. 0 is FedAvg.
    """

    state = ("m",)

    def __init__(self, server_momentum: float = 0.85) -> None:
        if not 0 <= server_momentum < 1:
            raise ValueError(f"server_momentum: must lie in [0, 1), got {server_momentum}")
        self.server_momentum = server_momentum

    def send(self, w: Tensor, state: State, round: int) -> Tensor:
        """Return the lookahead (P,)."""
        return w + self.server_momentum * state["m"]

    def update(
        self, w: Tensor, W: Sequence[Tensor], n: Sequence[float], state: State, round: int
    ) -> tuple[Tensor, State]:
        """Return the new model (P,) and the new state."""
        new = weighted_mean(W, n)
        return new, {"m": new - w}
