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

from fedsam.base.errors import TrainingError
from fedsam.base.randomness import global_streams
from fedsam.base.system import Stop
from fedsam.base.timers import timed
from fedsam.base.vector import Layout
from fedsam.messages import FROZEN, LEARNING_RATE, ROUND, VectorRecord, of_kind, state_of
from fedsam.server.grids import CohortGrid
from fedsam.server.replies import bounds_of
from fedsam.server.screening import Limits, usable
from fedsam.server.side_vectors import SideVectors
from fedsam.training.client import Asked

log = logging.getLogger("fedsam")
ATTEMPTS = 3  # cohorts that are tried in a round


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
    sample: Callable[[int, int], list[int]],
    seed: int,
    lr: Callable[[int], float],
    node_of: Mapping[int, int] | Sequence[int],
    side_vectors: SideVectors | None = None,
    limits: Limits | None = None,
    asked: Callable[[int, int], Asked] | None = None,
    stop: Stop | None = None,
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
        From a round number and an attempt, from 0, to partition ids.
    seed : int
        The run's: what a strategy draws from global generators is a function of it and the round.
    lr : callable
        From a round number to the clients' learning rate, which a strategy may change.
    node_of : mapping or sequence
        From partition id to node id.
    side_vectors : SideVectors, optional
        What travels beside the model, where the clients' method has such.
    limits : Limits, optional
        What a round takes.
    asked : callable, optional
        From client and round to how much is trained: a reply that says otherwise is left out.
    stop : Stop, optional
        Asked by a strategy that waits for nodes.

    Yields
    ------
    Round
        After each aggregation.

    Raises
    ------
    TrainingError
        When too few clients' updates can be used, in every attempt; the model of the last yielded
        round is a good one.
    """
    limits, unread = limits or Limits(), frozenset[str]()
    bounds = bounds_of(strategy)
    digest = arrays.layout.digest
    frozen = {FROZEN: digest} if digest else {}
    for number in rounds:
        begin = time.perf_counter()
        for attempt in range(ATTEMPTS):
            clients = sample(number, attempt)
            nodes = {node_of[client]: client for client in clients}
            config = ConfigRecord({LEARNING_RATE: lr(number), **frozen})
            cohort = CohortGrid(grid, list(nodes), stop)
            # the streams not for longer: runs share them
            with global_streams(seed, "strategy", number, 0), timed("strategy sends"):
                messages = list(strategy.configure_train(number, arrays, config, cohort))
            unread = _warn_of_unread(messages, unread)
            if side_vectors is not None:
                side_vectors.attach(messages)
            answers = cohort.send_and_receive(messages, timeout=limits.timeout)
            beside = side_vectors.vectors if side_vectors is not None else ()
            replies = usable(
                *(answers, nodes, arrays, number),
                limits=limits,
                beside=beside,
                bounds=bounds,
                asked=asked and {client: asked(client, number) for client in clients},
            )
            if len(replies) >= limits.min_clients:
                break
            log.warning(
                "round %d: %d of %d updates can be used, --min-clients is %d",
                *(number, len(replies), len(nodes), limits.min_clients),
            )
        else:
            raise _too_few(number, len(replies), limits.min_clients)
        if side_vectors is not None:
            side_vectors.fold(replies)
        with global_streams(seed, "strategy", number, 1), timed("strategy aggregates"):
            new, metrics = strategy.aggregate_train(number, replies)
        before, arrays = arrays, _sound(new, arrays.layout, number)
        averaged = {nodes[reply.metadata.src_node_id] for reply in replies}
        left_out = [client for client in clients if client not in averaged]
        seconds = time.perf_counter() - begin
        train = _scalars(metrics)
        yield Round(number, clients, before, arrays, replies, train, left_out, seconds)


def _warn_of_unread(messages: Sequence[Message], known: frozenset[str]) -> frozenset[str]:
    """Say once what a strategy tells its clients that ours do not read; return all of it so far."""
    configs = [c for m in messages[:1] for c in of_kind(m.content, ConfigRecord).values()]
    sent = {key for config in configs for key in config}
    unread = sent - {FROZEN, LEARNING_RATE, ROUND}
    if new := sorted(unread - known):
        log.warning("the strategy sends %s, which fedsam's clients do not read", ", ".join(new))
    return known | unread


def _too_few(number: int, replies: int, wanted: int) -> TrainingError:
    """Return the error of a round that could not be played."""
    who = "no client" if not replies else f"only {replies} of --min-clients {wanted} clients"
    return TrainingError(
        f"round {number}: {who} returned a usable update, in {ATTEMPTS} attempts; the model of "
        "the round before is kept (the warnings before say why; where updates are not finite, a "
        "smaller --lr or --rho may help)"
    )


def _sound(new: ArrayRecord | None, layout: Layout, number: int) -> VectorRecord:
    """Return what the strategy made, if it is a model."""
    if new is None:
        raise TrainingError(f"round {number}: the strategy could not aggregate the replies")
    arrays = VectorRecord(layout, state_of(new, layout))
    # finite elements that overflow, beyond 1e38, are no model either
    if not bool(torch.isfinite(arrays.state.sum())):
        raise TrainingError(
            f"round {number}: the strategy's average is not finite; the model of the round "
            "before is kept"
        )
    return arrays


def _scalars(metrics: MetricRecord | None) -> dict[str, float]:
    """Return the scalar metrics of a record."""
    items = (metrics or {}).items()
    return {name: float(value) for name, value in items if isinstance(value, int | float)}
