"""Strategies around any strategy: weight averages, and BatchNorm statistics of all clients."""

from collections.abc import Callable, Iterable
from copy import copy
from typing import TypeVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from fedsam.base.strategy import Average
from fedsam.base.vector import Layout, weighted_mean
from fedsam.messages import (
    LEARNING_RATE,
    VectorRecord,
    layout_of,
    model_of,
    of_kind,
    only_record,
    parameters_of,
    state_of,
    states_and_weights,
)
from fedsam.training import batchnorm

RecordType = TypeVar("RecordType", bound=ArrayRecord)


class Wrapped(Strategy):
    """Any strategy, passed on to; what differs is overridden.

    Parameters
    ----------
    strategy : Strategy
        The one inside: one of Flower's, or a method of ours in its adapter.
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
        """Return the strategy's model and metrics."""
        return self.strategy.aggregate_train(server_round, replies)

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


class Averaged(Wrapped):
    """Any strategy, with an average of its global models beside it.

    The strategy inside trains on as if nothing were there; from round ``start`` on the averaged
    model is what ``model`` returns and what Flower's own ``start()`` hands to its ``evaluate_fn``.
    BatchNorm statistics are averaged like the weights.

    Parameters
    ----------
    strategy : Strategy
        The one inside.
    rule : Average
        How to average.
    """

    def __init__(self, strategy: Strategy, rule: Average) -> None:
        super().__init__(strategy)
        self.rule = rule
        self.state: Tensor | None = None
        self.members = 0
        self.layout: Layout | None = None  # of the first model that is sent

    def model(self, arrays: RecordType) -> RecordType | VectorRecord:
        """Return the average in place of the global model ``arrays``, once there is one."""
        if self.state is None:
            return arrays
        return VectorRecord(self.layout or layout_of(arrays), self.state)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the strategy send its messages, with the round's learning rate."""
        self.layout = self.layout or layout_of(arrays)
        if server_round == self.rule.start + 1:
            self.state = state_of(arrays, self.layout).clone()
        config = ConfigRecord(dict(config))
        if LEARNING_RATE in config:
            lr = float(config[LEARNING_RATE])  # type: ignore[arg-type]
            config[LEARNING_RATE] = self.rule.rate(server_round, lr)
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the strategy's model; put a copy of it into the average when it is time."""
        arrays, metrics = super().aggregate_train(server_round, replies)
        if arrays is not None and self.state is not None and self.rule.collects(server_round):
            w = state_of(arrays, self.layout or layout_of(arrays))
            self.state = self.rule.average(self.state, self.members, w)
            self.members += 1
        return arrays, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the averaged model to be evaluated."""
        return super().configure_evaluate(server_round, self.model(arrays), config, grid)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run Flower's own loop; ``evaluate_fn`` sees the averaged model."""
        see = evaluate_fn and (lambda r, arrays: evaluate_fn(r, self.model(arrays)))
        return super().start(
            grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config, see
        )


class Statistics(Wrapped):
    """Any strategy, shown the parameters alone; what lies behind them is the clients' mean.

    A server's optimiser that took BatchNorm's variances for parameters would make them negative.
    Clients count by their examples, whatever the strategy does with the parameters.

    Parameters
    ----------
    strategy : Strategy
        The one inside.
    pooled : bool
        Let BatchNorm have the mean and variance of all the clients' images together.
    """

    def __init__(self, strategy: Strategy, *, pooled: bool) -> None:
        super().__init__(strategy)
        self.pooled = pooled

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the strategy send its messages; the rest of the model is added to each."""
        layout = layout_of(arrays)
        state, part = state_of(arrays, layout), parameters_of(layout)
        shown = VectorRecord(part, state[: layout.trainable])
        pairs: list[tuple[ArrayRecord, VectorRecord]] = []  # messages may share what they hold
        for message in super().configure_train(server_round, shown, config, grid):
            records = of_kind(message.content, ArrayRecord)
            sent, key = only_record(records), next(iter(records))
            whole = next((full for one, full in pairs if sent is one or sent is full), None)
            if whole is None:
                w = state_of(sent, part)
                whole = VectorRecord(layout, torch.cat([w, state[layout.trainable :]]))
                pairs.append((sent, whole))
            message.content[key] = whole
            yield message

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the strategy's model with the clients' statistics, and its metrics."""
        replies = list(replies)
        contents = [reply.content for reply in replies if not reply.has_error()]
        if not contents:
            return super().aggregate_train(server_round, replies)
        layout = layout_of(model_of(contents[0]))
        part, P = parameters_of(layout), layout.trainable
        states, n = states_and_weights(contents, layout)
        shown = [reply if reply.has_error() else _shown(reply, layout, part) for reply in replies]
        arrays, metrics = super().aggregate_train(server_round, shown)
        if arrays is None:
            return arrays, metrics
        state = torch.cat([state_of(arrays, part), weighted_mean([s[P:] for s in states], n)])
        if self.pooled:
            state = batchnorm.pooled(state, states, n, layout)
        return VectorRecord(layout, state), metrics


def _shown(reply: Message, layout: Layout, part: Layout) -> Message:
    """Return a reply with the parameters alone; what it holds beside them stays."""
    records = of_kind(reply.content, ArrayRecord)
    w, key = state_of(only_record(records), layout)[: layout.trainable], next(iter(records))
    changed = copy(reply)
    changed.content = RecordDict({**reply.content, key: VectorRecord(part, w)})
    return changed
