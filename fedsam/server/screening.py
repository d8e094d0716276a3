"""What clients send back, looked at before it is averaged: nobody's reply can break a round."""

import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from flwr.app import ArrayRecord, Message
from torch import Tensor

from fedsam.messages import (
    EXAMPLES,
    EXCHANGED,
    VectorRecord,
    check_vectors,
    checked_state,
    model_of,
    number_in,
    only_record,
    state_of,
    tensor_of,
)

log = logging.getLogger("fedsam")


@dataclass(frozen=True)
class Limits:
    """What a round takes.

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


def usable(
    answers: Iterable[Message],
    nodes: Mapping[int, int],
    before: VectorRecord,
    number: int,
    *,
    limits: Limits | None = None,
    beside: Collection[str] = (),
) -> list[Message]:
    """Return the replies that may be averaged, by ascending client; warn of each other one.

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
    """
    limits = limits or Limits()
    good: list[Message] = []
    seen: set[int] = set()
    known = [reply for reply in answers if reply.metadata.src_node_id in nodes]
    for reply in sorted(known, key=lambda reply: nodes[reply.metadata.src_node_id]):
        client = nodes[reply.metadata.src_node_id]
        if reason := why_unusable(reply, client in seen, before, beside):
            log.warning("round %d: client %d %s", number, client, reason)
            continue
        seen.add(client)
        good.append(reply)
    for client in sorted(set(nodes.values()) - {nodes[r.metadata.src_node_id] for r in known}):
        log.warning("round %d: client %d did not answer", number, client)
    return within(good, [nodes[r.metadata.src_node_id] for r in good], before, number, limits)


def why_unusable(reply: Message, again: bool, before: VectorRecord, beside: Collection[str]) -> str:
    """Return what is wrong with the form of a reply, or ""; its model is made a vector."""
    if reply.has_error():
        return f"failed: {reply.error.reason}"
    if again:
        return "left out: it answered twice"
    try:
        records = reply.content.array_records
        key = only_record([key for key in records if key != EXCHANGED])
        state = checked_state(records[key], before.layout)
        if not isinstance(records[key], VectorRecord):
            reply.content[key] = VectorRecord(before.layout, state)
        check_vectors(reply.content, before.layout, beside)
        examples = number_in(only_record(reply.content.metric_records), EXAMPLES)
        if not (math.isfinite(examples) and examples > 0):
            raise ValueError(f"{EXAMPLES} is {examples}")
    except (ValueError, TypeError, KeyError, EOFError, OSError) as error:
        return f"left out: {' '.join(str(error).split())}"
    return ""


def within(
    replies: Sequence[Message],
    clients: Sequence[int],
    before: VectorRecord,
    number: int,
    limits: Limits,
) -> list[Message]:
    """Return the replies whose update is finite and not too long, clipped where that is asked."""
    if not replies:
        return []
    # one look at the device for the whole cohort: a GPU is waited for only once
    sums = [
        torch.stack([element_sum(r) for r in reply.content.array_records.values()]).sum()
        for reply in replies
    ]
    finite = torch.stack(sums).isfinite().tolist()
    longest = limits.max_norm or math.inf
    lengths = [0.0] * len(replies)
    if limits.max_norm or limits.clip_norm:
        lengths = torch.stack([update(reply, before).norm() for reply in replies]).tolist()
    taken = []
    for reply, client, whole, length in zip(replies, clients, finite, lengths, strict=True):
        if not whole:
            said = "its update is not finite"
            log.warning("round %d: client %d left out: %s", number, client, said)
        elif length > longest:
            said = f"its update is {length:.3g} long"
            log.warning("round %d: client %d left out: %s", number, client, said)
        else:
            if limits.clip_norm and length > limits.clip_norm:
                clip(reply, before, limits.clip_norm / length)
            if limits.equal:
                only_record(reply.content.metric_records)[EXAMPLES] = 1
            taken.append(reply)
    return taken


def update(reply: Message, before: VectorRecord) -> Tensor:
    """Return w_k - w, (P,)."""
    P = before.layout.trainable
    return state_of(model_of(reply.content), before.layout)[:P] - before.state[:P]


def clip(reply: Message, before: VectorRecord, factor: float) -> None:
    """Let a reply hold w + factor (w_k - w)."""
    layout, P = before.layout, before.layout.trainable
    key = only_record([key for key in reply.content.array_records if key != EXCHANGED])
    state = state_of(reply.content.array_records[key], layout).clone()
    state[:P] = before.state[:P] + factor * update(reply, before)
    reply.content[key] = VectorRecord(layout, state)


def element_sum(record: ArrayRecord) -> Tensor:
    """Return the sum of all elements, which is finite only if each of them is.

    One pass without a temporary. (Finite elements that overflow, beyond 1e38, are no model either.)
    """
    if isinstance(record, VectorRecord):
        return record.state.sum()
    return torch.stack([tensor_of(array).double().sum() for array in record.values()]).sum()
