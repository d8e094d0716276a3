"""FedNova (Wang et al., NeurIPS 2020): updates that count the same however many steps they took."""

from collections.abc import Sequence

from torch import Tensor

from fedsam.base.strategy import ServerMethod, State
from fedsam.base.vector import weighted_mean


class FedNova(ServerMethod):
    """Average the clients' mean directions, then go as far as the mean client went::

        a_k  = steps_k                                    without momentum
             = (steps_k - m (1 - m^steps_k) / (1 - m)) / (1 - m)     with the clients' momentum m
        w   <- w + (sum_k p_k a_k) sum_k p_k (w_k - w) / a_k           p_k = n_k / sum n

    Clients of one number of steps make it FedAvg. It knows the steps from the replies' metrics.
    The authors' code sums a_i step by step, which is the closed form above; its a_i for proximal
    clients is left out. The server keeps nothing; P numbers travel each way.

    Parameters
    ----------
    momentum : float
        m, of the clients' SGD; the run's.
    """

    takes = ("steps",)
    needs = ("momentum",)

    def __init__(self, momentum: float = 0.0) -> None:
        self.momentum = momentum

    def update(
        self,
        w: Tensor,
        W: Sequence[Tensor],
        n: Sequence[float],
        state: State,
        round: int,
        steps: Sequence[float] = (),
    ) -> tuple[Tensor, State]:
        """Return the new model (P,) and the new state; ``steps`` are those of the K clients."""
        m, total = self.momentum, sum(n)
        a = [(s - m * (1 - m**s) / (1 - m)) / (1 - m) for s in steps]
        if not any(a):
            return weighted_mean(W, n), state
        shares = [n_k / a_k if a_k else 0.0 for n_k, a_k in zip(n, a, strict=True)]
        length = sum(n_k * a_k for n_k, a_k in zip(n, a, strict=True)) / total
        d = weighted_mean(W, shares) - w
        return w + length * sum(shares) / total * d, state
