"""What clients send back, looked at before it is averaged: nobody's reply can break a round."""

import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import NamedTuple, cast

import torch
from flwr.app import ArrayRecord, Message, MetricRecord
from torch import Tensor

from fedsam.messages import (
    ARRAYS,
    EXAMPLES,
    EXCHANGED,
    METRICS,
    VectorRecord,
    tensor_of,
    vectors_record,
)
from fedsam.server.replies import Bounds, Form, checked, guarded, said
from fedsam.training.client import Asked

log = logging.getLogger("fedsam")


@dataclass(frozen=True)
class Limits:
    """What a round takes.

    An update is a client's change of all that is averaged but counters: parameters and BatchNorm's
    statistics. A vector beside the model (a control variate, a dual) is in a unit
    of its own: it is scaled down where it is more times as long as the cohort's median one than
    the smaller limit is as long as the median update.

    Attributes
    ----------
    min_clients : int
        Usable replies below which a round is repeated with other clients.
    max_norm : float
        l2 norm of an update above which it is left out; 0 for none.
    clip_norm : float
        l2 norm to which longer updates are scaled down; 0 for none.
    timeout : float or None
        Seconds to wait for a client.
    equal : bool
        Let each client count the same, whatever number of examples it names.
    """

    min_clients: int = 1
    max_norm: float = 0.0
    clip_norm: float = 0.0
    timeout: float | None = None
    equal: bool = False

    @property
    def length(self) -> float:
        """The smaller of both norms; infinite where there is none."""
        return min(self.max_norm or math.inf, self.clip_norm or math.inf)


def usable(
    answers: Iterable[Message],
    nodes: Mapping[int, int],
    before: VectorRecord,
    number: int,
    *,
    limits: Limits | None = None,
    beside: Collection[str] = (),
    bounds: Bounds | None = None,
    asked: Mapping[int, Asked] | None = None,
) -> list[Message]:
    """Return the replies that may be averaged, by ascending client; warn of each other one.

    What they hold has been made anew, in one form.

    Parameters
    ----------
    answers : iterable of Message
        Whatever came.
    nodes : mapping
        From the cohort's node ids to its partition ids.
    before : VectorRecord
        The global model that was sent.
    number : int
        The round, for the warnings.
    limits : Limits, optional
        On the length of an update.
    beside : collection of str
        Names of the vectors that travel beside the model.
    bounds : mapping, optional
        Of the metrics that the strategy computes with.
    asked : mapping, optional
        From the cohort's clients to what they were asked for.
    """
    form = Form(before.layout, beside, bounds or {})
    good: list[Message] = []
    seen: set[int] = set()
    known = [reply for reply in answers if reply.metadata.src_node_id in nodes]
    for reply in sorted(known, key=lambda reply: nodes[reply.metadata.src_node_id]):
        client = nodes[reply.metadata.src_node_id]
        reason = why_unusable(reply, client in seen, form, asked[client] if asked else None)
        if reason:
            log.warning("round %d: client %d %s", number, client, reason)
            continue
        seen.add(client)
        good.append(reply)
    for client in sorted(set(nodes.values()) - {nodes[r.metadata.src_node_id] for r in known}):
        log.warning("round %d: client %d did not answer", number, client)
    return within(
        good, [nodes[r.metadata.src_node_id] for r in good], before, number, limits or Limits()
    )


def why_unusable(reply: Message, again: bool, form: Form, asked: Asked | None) -> str:
    """Return what is wrong with the form of a reply, or "": then its content is made anew."""
    if reply.has_error():
        return f"failed: {said(reply.error.reason)}"
    if again:
        return "left out: it answered twice"
    content, reason = guarded(lambda: checked(reply.content, form, asked))
    if content is None:
        return f"left out: {reason}"
    reply.content = content
    return ""


class Measures(NamedTuple):
    """What a reply's vectors are like.

    Attributes
    ----------
    sizes : list of float
        l2 norm of the model, then of each vector beside it.
    variance : float
        The least of BatchNorm's; not negative where it has none.
    length : float
        l2 norm of the update; of no meaning where nobody asks.
    """

    sizes: list[float]
    variance: float
    length: float


def within(
    replies: Sequence[Message],
    clients: Sequence[int],
    before: VectorRecord,
    number: int,
    limits: Limits,
) -> list[Message]:
    """Return the replies whose vectors are sound and not too long, clipped where that is asked."""
    if not replies:
        return []
    limited = limits.length < math.inf
    # one look at the device for the whole cohort: a GPU is waited for only once
    measured = [_measured(reply, before, limited) for reply in replies]
    rows = torch.stack([number for one in measured for number in one]).view(len(replies), -1)
    sound: list[tuple[Message, int, Measures]] = []
    for reply, client, row in zip(replies, clients, rows.tolist(), strict=True):
        variance, length, *sizes = row
        if reason := _unsound(sizes, variance, before.layout.dtype):
            log.warning("round %d: client %d left out: %s", number, client, reason)
        else:
            sound.append((reply, client, Measures(sizes, variance, length)))
    most = _most_beside([measures for _, _, measures in sound], limits)
    taken = []
    for reply, client, measures in sound:
        length = measures.length
        if limits.max_norm and length > limits.max_norm:
            log.warning(
                "round %d: client %d left out: its update is %.3g long", number, client, length
            )
            continue
        if limits.clip_norm and length > limits.clip_norm:
            clip(reply, before, limits.clip_norm / length)
        _clip_beside(reply, measures.sizes[1:], most)
        if limits.equal:
            cast(MetricRecord, reply.content[METRICS])[EXAMPLES] = 1
        taken.append(reply)
    return taken


def _unsound(sizes: Sequence[float], variance: float, dtype: torch.dtype) -> str:
    """Return what is wrong with numbers that no model can have, or ""."""
    if not all(map(math.isfinite, sizes)):
        return "its update is not finite"
    # a strategy may square it, and multiply that by its own factors
    if max(sizes) > math.sqrt(torch.finfo(_wide(dtype)).max) / 1000:
        return f"its update is {max(sizes):.3g} long"
    return f"a BatchNorm's variance is {variance:.3g}" if variance < 0 else ""


def _most_beside(cohort: Sequence[Measures], limits: Limits) -> list[float]:
    """Return how long each vector beside the model may be, in its own unit."""
    median = median_low([one.length for one in cohort]) if cohort else 0.0
    if limits.length == math.inf or not median:
        return []
    names = zip(*(one.sizes[1:] for one in cohort), strict=True)
    return [limits.length / median * median_low(sizes) for sizes in names]


def _measured(reply: Message, before: VectorRecord, limited: bool) -> list[Tensor]:
    """Return a reply's least variance, length and sizes, scalars on its device."""
    layout, state = before.layout, _model(reply).state
    _, variances = layout.statistics
    sizes = [_size(v) for v in (state, *_vectors(reply).values())]
    nothing = sizes[0]  # where nobody asks, any number does
    least = state[variances].min().to(nothing.dtype) if len(variances) else nothing
    return [least, update_length(state, before) if limited else nothing, *sizes]


def update_length(state: Tensor, before: VectorRecord) -> Tensor:
    """Return the l2 norm of a model's change, parameters and what is carried beside them."""
    layout, P = before.layout, before.layout.trainable
    length = _size(state[:P] - before.state[:P])
    where = layout.carried
    if not len(where):
        return length
    return torch.hypot(length, _size(state[where] - before.state[where]))


def clip(reply: Message, before: VectorRecord, factor: float) -> None:
    """Let a reply hold w + factor (w_k - w), and so what is carried; a variance stays one."""
    layout, P = before.layout, before.layout.trainable
    state = _model(reply).state.clone()
    for where in (slice(P), layout.carried):
        state[where] = before.state[where] + factor * (state[where] - before.state[where])
    reply.content[ARRAYS] = VectorRecord(layout, state)


def _clip_beside(reply: Message, sizes: Sequence[float], most: Sequence[float]) -> None:
    """Scale down those vectors beside a reply's model that are too long."""
    if not any(size > limit for size, limit in zip(sizes, most, strict=False)):
        return
    vectors = _vectors(reply)
    reply.content[EXCHANGED] = vectors_record(
        {
            name: vector * (limit / size) if size > limit else vector
            for (name, vector), size, limit in zip(vectors.items(), sizes, most, strict=True)
        }
    )


def _model(reply: Message) -> VectorRecord:
    """Return the model of a reply that was made anew."""
    return cast(VectorRecord, reply.content[ARRAYS])


def _vectors(reply: Message) -> dict[str, Tensor]:
    """Return the vectors (P,) beside the model of a reply that was made anew, by name."""
    record = cast(ArrayRecord, reply.content.get(EXCHANGED, ArrayRecord()))
    return {name: tensor_of(array) for name, array in record.items()}


def _size(v: Tensor) -> Tensor:
    """Return the l2 norm of ``v`` (P,), a scalar; that of half precision as float32."""
    return torch.linalg.vector_norm(v, dtype=_wide(v.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
