"""AdaBest's server (Varno et al., ECCV 2022): go beyond the mean, as the means went."""

from collections.abc import Sequence

from torch import Tensor

from fedsam.base.strategy import ServerMethod, State
from fedsam.base.vector import mean


class AdaBest(ServerMethod):
    """Step from the plain mean along its change since the round before::

        h    <- beta (last - mean),    mean = mean_k w_k
        w    <- mean - h
        last <- mean                                          the first model, at first

    It goes with the client of this name. BatchNorm statistics are averaged. The server keeps P
    numbers.

    Parameters
    ----------
    beta : float
        In [0, 1); 0 is FedAvg's mean of equal clients. The paper's, from memory: 0.9 to 1, by
        data set. The first author's code: 0.85 by default.
    """

    state = ("last",)

    def __init__(self, beta: float = 0.96) -> None:
        if not 0 <= beta < 1:
            raise ValueError(f"beta: must lie in [0, 1), got {beta}")
        self.beta = beta

    def start(self, w: Tensor) -> State:
        """Return the state before the first round, given the first model (P,)."""
        return {"last": w}

    def update(
        self, w: Tensor, W: Sequence[Tensor], n: Sequence[float], state: State, round: int
    ) -> tuple[Tensor, State]:
        """Return the new model (P,) and the new state."""
        mean_w = mean(W)
        h = self.beta * (state["last"] - mean_w)
        return mean_w - h, {"last": mean_w}
