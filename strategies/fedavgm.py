"""FedAvgM (Hsu et al., 2019): momentum on the server."""

from collections.abc import Sequence

from torch import Tensor

from fedsam.base.strategy import ServerMethod, State
from fedsam.base.vector import weighted_mean


class FedAvgM(ServerMethod):
    """SGD with momentum, the cohort's update as its gradient::

        v <- server_momentum v + (w - mean_k w_k)
        w <- w - server_learning_rate v

    The numbers of Flower's FedAvgM, on the device; its names too. BatchNorm statistics, which
    are not descended on, are averaged. The server keeps P numbers.

    Parameters
    ----------
    server_learning_rate : float
        Of the server's SGD; the paper's is 1.
    server_momentum : float
        In [0, 1). The paper's, from memory: 0.9 among others. 0 at rate 1 is FedAvg.
    """

    state = ("v",)

    def __init__(self, server_learning_rate: float = 1.0, server_momentum: float = 0.9) -> None:
        self.server_learning_rate = server_learning_rate
        self.server_momentum = server_momentum

    def update(
        self, w: Tensor, W: Sequence[Tensor], n: Sequence[float], state: State, round: int
    ) -> tuple[Tensor, State]:
        """Return the new model (P,) and the new state."""
        v = self.server_momentum * state["v"] + (w - weighted_mean(W, n))
        return w - self.server_learning_rate * v, {"v": v}
