"""FedNova (Wang et al., NeurIPS 2020): updates that count the same however many steps they took."""

from collections.abc import Iterable, Sequence
from typing import Any

from flwr.app import ArrayRecord, Message, MetricRecord
from torch import Tensor

from fedsam.base.vector import weighted_mean
from fedsam.messages import STEPS, states_and_weights

from .fedavg import FedAvg


class FedNova(FedAvg):
    """Average the clients' mean directions, then go as far as the mean client went::

        a_k  = steps_k                                    without momentum
             = (steps_k - m (1 - m^steps_k) / (1 - m)) / (1 - m)     with the clients' momentum m
        w   <- w + (sum_k p_k a_k) sum_k p_k (w_k - w) / a_k           p_k = n_k / sum n

    Clients of one number of steps make it FedAvg. It knows the steps from the replies' metrics.
    BatchNorm statistics are averaged. The server keeps nothing; P numbers travel each way.
    The formula is from memory of the paper, not checked against its code.

    Parameters
    ----------
    momentum : float
        m, of the clients' SGD; the run's.
    flower : keyword arguments
        Those of Flower's FedAvg.
    """

    needs = ("momentum",)

    def __init__(self, momentum: float = 0.0, **flower: Any) -> None:
        super().__init__(**flower)
        self.momentum = momentum
        self.steps: list[float] = []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the new global model and the weighted mean of the train metrics."""
        good = [reply for reply in replies if not reply.has_error()]
        self.steps = states_and_weights([reply.content for reply in good], self.layout, STEPS)[1]
        return super().aggregate_train(server_round, good)

    def aggregate(self, w: Tensor, W: Sequence[Tensor], n: Sequence[float]) -> Tensor:
        """Return the new state (S,)."""
        new, P, m = super().aggregate(w, W, n), self.layout.trainable, self.momentum
        a = [(s - m * (1 - m**s) / (1 - m)) / (1 - m) for s in self.steps]
        if any(a):
            shares = [n_k / a_k if a_k else 0.0 for n_k, a_k in zip(n, a, strict=True)]
            length = sum(n_k * a_k for n_k, a_k in zip(n, a, strict=True)) / sum(n)
            d = weighted_mean([w_k[:P] for w_k in W], shares) - w[:P]
            new[:P] = w[:P] + length * sum(shares) / sum(n) * d
        return new
