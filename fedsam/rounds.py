"""The round loop on Flower's ``Strategy``: what Flower's own ``start()`` leaves out.

Clients are sampled by key over partition ids, replies are sorted by client, updates that are not
finite are left out of any strategy's average, and the loop is a generator: whoever iterates may
evaluate, log, stop early or go on later.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedsam import wire
from fedsam.engines.view import CohortGrid
from fedsam.errors import TrainingError
from fedsam.exchange import Exchange
from fedsam.randomness import global_streams
from fedsam.wire import VectorRecord

log = logging.getLogger("fedsam")


@dataclass(frozen=True)
class Round:
    """One communication round as it went.

    Attributes
    ----------
    number : int
        From 1.
    clients : list of int
        The cohort's partition ids, ascending.
    before, arrays : VectorRecord
        The global model before and after the round.
    replies : list of Message
        Those that were averaged, by ascending client.
    metrics : dict
        The clients' train metrics as the strategy aggregated them.
    left_out : list of int
        Clients that failed or whose update was not finite.
    seconds : float
        Wall-clock time of the round.
    """

    number: int
    clients: list[int]
    before: VectorRecord
    arrays: VectorRecord
    replies: list[Message]
    metrics: dict[str, float]
    left_out: list[int]
    seconds: float


def play(
    strategy: Strategy,
    grid: Grid,
    arrays: VectorRecord,
    *,
    rounds: Iterable[int],
    sample: Callable[[int], list[int]],
    seed: int,
    lr: float,
    node_of: Mapping[int, int] | Sequence[int],
    exchange: Exchange | None = None,
    timeout: float | None = None,
) -> Iterator[Round]:
    """Run rounds of federated learning, one at each iteration.

    Parameters
    ----------
    strategy : Strategy
        Any of Flower's or ours; it should train all nodes that it is shown.
    grid : Grid
        Any engine's.
    arrays : VectorRecord
        The model to start from.
    rounds : iterable of int
        Round numbers, e.g. ``range(1, 101)``.
    sample : callable
        From a round number to that round's partition ids.
    seed : int
        The run's: what a strategy draws from global generators is a function of it and the round.
    lr : float
        The clients' learning rate, which a strategy may change.
    node_of : mapping or sequence
        From partition id to node id.
    exchange : Exchange, optional
        What travels beside the model, where the clients' method has such.
    timeout : float, optional
        Seconds to wait for a round's replies.

    Yields
    ------
    Round
        After each aggregation.

    Raises
    ------
    TrainingError
        When no client's update can be used; the model of the last yielded round is a good one.
    """
    layout = arrays.layout
    for number in rounds:
        begin = time.perf_counter()
        clients = sample(number)
        nodes = {node_of[client]: client for client in clients}
        cohort = CohortGrid(grid, list(nodes))
        config = ConfigRecord({wire.LEARNING_RATE: lr})
        with global_streams(seed, "strategy", number, 0):
            messages = list(strategy.configure_train(number, arrays, config, cohort))
        if exchange is not None:
            exchange.attach(messages)
        answers = cohort.send_and_receive(messages, timeout=timeout)
        replies = usable(answers, nodes, layout, number)
        kept = {nodes[reply.metadata.src_node_id] for reply in replies}
        if exchange is not None:
            exchange.fold(replies)
        with global_streams(seed, "strategy", number, 1):
            new, metrics = strategy.aggregate_train(number, replies)
        before, arrays = arrays, _sound(new, layout, number)
        left_out = [client for client in clients if client not in kept]
        seconds = time.perf_counter() - begin
        train = _scalars(metrics)
        yield Round(number, clients, before, arrays, replies, train, left_out, seconds)


def usable(
    answers: Iterable[Message], nodes: Mapping[int, int], layout: wire.Layout, number: int
) -> list[Message]:
    """Return the replies that may be averaged, by ascending client; warn of each other one.

    Raises
    ------
    TrainingError
        If there is none.
    """
    replies = sorted(answers, key=lambda reply: nodes[reply.metadata.src_node_id])
    whole = [reply for reply in replies if not reply.has_error()]
    # one look at the device for the whole cohort: a GPU is waited for only once
    sums = [
        torch.stack([element_sum(r) for r in reply.content.array_records.values()]).sum()
        for reply in whole
    ]
    finite = torch.isfinite(torch.stack(sums)).tolist() if sums else []
    good = [reply for reply, usable in zip(whole, finite, strict=True) if usable]
    kept = set(map(id, good))
    for reply in replies:
        client = nodes[reply.metadata.src_node_id]
        if reply.has_error():
            log.warning("round %d: client %d failed: %s", number, client, reply.error.reason)
        elif id(reply) not in kept:
            log.warning("round %d: client %d left out: its update is not finite", number, client)
    if not good:
        raise TrainingError(
            f"round {number}: no client returned a finite update; the model of the round "
            "before is kept (a smaller --lr or --rho may help)"
        )
    return good


def _sound(new: ArrayRecord | None, layout: wire.Layout, number: int) -> VectorRecord:
    """Return what the strategy made, if it is a model."""
    if new is None:
        raise TrainingError(f"round {number}: the strategy could not aggregate the replies")
    arrays = VectorRecord(layout, wire.state_of(new, layout))
    if not bool(torch.isfinite(element_sum(arrays))):
        raise TrainingError(
            f"round {number}: the strategy's average is not finite; the model of the round "
            "before is kept"
        )
    return arrays


def element_sum(record: ArrayRecord) -> Tensor:
    """Return the sum of all elements, which is finite only if each of them is.

    One pass without a temporary. (Finite elements that overflow, beyond 1e38, are no model either.)
    """
    if isinstance(record, VectorRecord):
        return record.state.sum()
    return torch.stack([wire.tensor_of(array).double().sum() for array in record.values()]).sum()


def _scalars(metrics: MetricRecord | None) -> dict[str, float]:
    """Return the scalar metrics of a record."""
    items = (metrics or {}).items()
    return {name: float(value) for name, value in items if isinstance(value, int | float)}
