"""FedAvg's server (McMahan et al., AISTATS 2017): the average weighted by examples."""

from collections.abc import Iterable, Sequence

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from torch import Tensor

from fedsam.base.vector import weighted_mean
from fedsam.messages import VectorRecord, layout_of, state_of, states_and_weights


class FedAvg(FlowerFedAvg):
    """Flower's FedAvg on tensors::

        w <- sum_k n_k w_k / sum_k n_k

    It takes Flower's arguments and works on every Grid. States stay tensors on their device, and
    where the clients ran in this process nothing is copied. A strategy that differs in its
    formula overrides ``aggregate``; it has the model's ``layout`` and the ``round``, from 1.
    """

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the global model to the nodes, and remember it."""
        self.layout = layout_of(arrays)
        self.state = state_of(arrays, self.layout)
        self.round = server_round
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the new global model and the weighted mean of the train metrics."""
        contents = [reply.content for reply in replies if not reply.has_error()]
        if not contents:
            return None, None
        W, n = states_and_weights(contents, self.layout, self.weighted_by_key)
        new = VectorRecord(self.layout, self.aggregate(self.state, W, n))
        return new, self.train_metrics_aggr_fn(contents, self.weighted_by_key)

    def aggregate(self, w: Tensor, W: Sequence[Tensor], n: Sequence[float]) -> Tensor:
        """Return the new state (S,).

        Parameters
        ----------
        w : Tensor
            The state that was sent, (S,).
        W : sequence of Tensor
            The K clients' states, (S,) each.
        n : sequence of float
            Their weights, by default their numbers of examples (``weighted_by_key``).
        """
        return weighted_mean(W, n)
