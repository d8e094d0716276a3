"""A server method as a Flower Strategy: the formula gets vectors, Flower its messages."""

from collections.abc import Iterable
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from fedsam.base.errors import TrainingError, UsageError
from fedsam.base.strategy import ServerMethod
from fedsam.base.vector import weighted_mean
from fedsam.messages import (
    VectorRecord,
    layout_of,
    number_in,
    of_kind,
    only_record,
    state_of,
    states_and_weights,
)


class MethodStrategy(FedAvg):
    """A Flower Strategy that samples as Flower's FedAvg does and updates as a method says.

    It works with every Grid and every ClientApp. States stay tensors on their device, and those of
    clients that ran in this process are not copied. What lies behind the parameters (BatchNorm's
    statistics) is averaged by the clients' weights.

    Parameters
    ----------
    method : ServerMethod
        The formula.
    flower : keyword arguments
        Those of Flower's FedAvg: ``fraction_train``, ``weighted_by_key``, ...

    Raises
    ------
    UsageError
        If it is no server method.
    """

    def __init__(self, method: ServerMethod, **flower: Any) -> None:
        if not isinstance(method, ServerMethod):
            raise UsageError(
                f"{method!r} is neither an object of a class that extends "
                "fedsam.base.strategy.ServerMethod nor a Flower Strategy"
            )
        super().__init__(**{"train_metrics_aggr_fn": mean_metrics, **flower})
        self.method = method
        self.vectors: dict[str, Tensor] = {}  # the method's state, (P,) by name

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send to the nodes what the method sends, and remember the global model."""
        self.layout = layout_of(arrays)
        self.state = state_of(arrays, self.layout)
        w, rest = self._parted(self.state)
        if not self.vectors:
            self.vectors = dict(self.method.start(w))
        sent = self.method.send(w, self.vectors, server_round)
        if sent is not w:
            arrays = self._whole(sent, rest)
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the new global model and the weighted mean of the train metrics."""
        contents = [reply.content for reply in replies if not reply.has_error()]
        if not contents:
            return None, None
        states, n = states_and_weights(contents, self.layout, self.weighted_by_key)
        W, rests = zip(*map(self._parted, states), strict=True)
        metrics = [only_record(of_kind(content, MetricRecord)) for content in contents]
        taken = {name: [number_in(m, name) for m in metrics] for name in self.method.takes}
        w, _ = self._parted(self.state)
        new, vectors = self.method.update(w, W, n, self.vectors, server_round, **taken)
        if new.shape != w.shape or set(vectors) != set(self.method.state):
            raise TrainingError(
                f"{type(self.method).__name__}.update: returned a model {tuple(new.shape)} with "
                f"the state {sorted(vectors)}, not {tuple(w.shape)} with "
                f"{sorted(self.method.state)}"
            )
        self.vectors = dict(vectors)
        record = self._whole(new, weighted_mean(rests, n))
        return record, self.train_metrics_aggr_fn(contents, self.weighted_by_key)

    def _parted(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the parameters (P,) and what lies behind them (S - P,) as views."""
        return state[: self.layout.trainable], state[self.layout.trainable :]

    def _whole(self, w: Tensor, rest: Tensor) -> VectorRecord:
        """Return the record of a model in two parts; without a copy where the second is empty."""
        return VectorRecord(self.layout, torch.cat([w, rest]) if len(rest) else w)


def mean_metrics(contents: list[RecordDict], weight: str) -> MetricRecord:
    """Return the weighted means of the metrics of replies, as Flower's own function does.

    Its numbers, but in a hundredth of a millisecond a reply: it looks at each record anew.
    """
    metrics = [only_record(of_kind(content, MetricRecord)) for content in contents]
    numbers = [number_in(record, weight) for record in metrics]
    total = sum(numbers)
    shares = [number / total for number in numbers]
    means: dict[str, Any] = {}
    for record, share in zip(metrics, shares, strict=True):
        for name, value in record.items():
            scaled = [v * share for v in value] if isinstance(value, list) else value * share
            if name == weight:
                continue
            if name not in means:
                means[name] = scaled
            elif isinstance(scaled, list):
                means[name] = [a + b for a, b in zip(means[name], scaled, strict=True)]
            else:
                means[name] += scaled
    return MetricRecord(means)
