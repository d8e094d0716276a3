"""FedExP (Jhunjhunwala et al., ICLR 2023): a server step as long as the updates disagree."""

from collections.abc import Sequence

from torch import Tensor

from fedsam.base.strategy import ServerMethod, State
from fedsam.base.vector import norm, weighted_mean


class FedExP(ServerMethod):
    """Extrapolate: the more the clients' updates cancel each other, the longer the step::

        d_k  = w_k - w,    d = sum_k p_k d_k                p_k = n_k / sum n
        rate = max(1, sum_k p_k ||d_k||^2 / (2 (||d||^2 + epsilon)))
        w   <- w + rate d

    Equal updates make it FedAvg. The paper evaluates the mean of the last two models: ``--average
    wima --average-options '{window: 2}' --swa-start 0``. BatchNorm statistics are averaged. The
    server keeps nothing.

    The authors' code adds the cohort's size times epsilon, and lets epsilon fall by 0.998^2 a
    round, as the square of its learning rate does.

    Parameters
    ----------
    epsilon : float
        Squared length of an update below which rates do not grow. The authors' code for CIFAR: 1e-3
        times the cohort's size, so 0.01 for 10 clients a round and 0.005 for 5.
    """

    def __init__(self, epsilon: float = 1e-3) -> None:
        if epsilon <= 0:
            raise ValueError(f"epsilon: must be above 0, got {epsilon}")
        self.epsilon = epsilon

    def update(
        self, w: Tensor, W: Sequence[Tensor], n: Sequence[float], state: State, round: int
    ) -> tuple[Tensor, State]:
        """Return the new model (P,) and the new state."""
        d = weighted_mean(W, n) - w
        lengths = weighted_mean([norm(w_k - w) ** 2 for w_k in W], n)
        rate = (lengths / (2 * (norm(d) ** 2 + self.epsilon))).clamp(min=1)
        return w + rate * d, state
