"""BatchNorm statistics of all clients together, around any strategy (``--bn pooled``)."""

from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedsam.messages import VectorRecord, layout_of, model_of, state_of, states_and_weights
from fedsam.training.batchnorm import pooled


class Pooled(Strategy):
    """Any strategy, with the variance of the mixture where it averaged BatchNorm's variances.

    Clients count by their examples, whatever the strategy does with the parameters.

    Parameters
    ----------
    strategy : Strategy
        One of Flower's or ours.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the strategy send its messages."""
        return self.strategy.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the strategy's model with the pooled statistics, and its metrics."""
        replies = list(replies)
        arrays, metrics = self.strategy.aggregate_train(server_round, replies)
        contents = [reply.content for reply in replies if not reply.has_error()]
        if arrays is None or not contents:
            return arrays, metrics
        layout = layout_of(model_of(contents[0]))
        states, n = states_and_weights(contents, layout)
        state = pooled(state_of(arrays, layout), states, n, layout)
        return VectorRecord(layout, state), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the strategy send its messages."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return the strategy's evaluation metrics."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """Log the strategy's summary."""
        self.strategy.summary()
