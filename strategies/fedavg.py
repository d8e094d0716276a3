"""FedAvg's server (McMahan et al., AISTATS 2017): the average weighted by examples."""

from collections.abc import Sequence

from torch import Tensor

from fedsam.base.strategy import ServerMethod, State
from fedsam.base.vector import weighted_mean


class FedAvg(ServerMethod):
    """Average what comes back::

        w <- sum_k n_k w_k / sum_k n_k

    The server keeps nothing.
    """

    def update(
        self, w: Tensor, W: Sequence[Tensor], n: Sequence[float], state: State, round: int
    ) -> tuple[Tensor, State]:
        """Return the new model (P,) and the new state."""
        return weighted_mean(W, n), state
