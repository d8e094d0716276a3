"""Jobs and results of clients as Flower's messages and as NumPy arrays, and back."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import RecordDict
from torch import Tensor

from fedsam.base.vector import Layout
from fedsam.messages import (
    VectorRecord,
    check_frozen,
    state_of,
    train_instruction,
    train_reply,
    vectors_of,
)
from fedsam.training.client import ClientJob, Result
from fedsam.training.method import Vectors


def job_of(content: RecordDict, layout: Layout, client: int, memory: Vectors | None) -> ClientJob:
    """Return what a train message asks of a client, which kept ``memory`` from its last round.

    Raises
    ------
    UsageError
        If the server holds other frozen parameters than the layout's.
    """
    check_frozen(content, layout)
    arrays, round, lr = train_instruction(content)
    state = state_of(arrays, layout)
    return ClientJob(client, state, round, lr, memory, vectors_of(content, layout))


def reply_of(layout: Layout, result: Result) -> RecordDict:
    """Return the content of a client's reply to a train message; its memory stays with it."""
    record = VectorRecord(layout, result.state)
    return train_reply(record, result.examples, result.steps, result.loss, result.reply)


def to_arrays(value: Any) -> Any:
    """Return a value, or a mapping of values by name, with NumPy arrays in place of tensors."""
    if isinstance(value, Mapping):
        return {name: to_arrays(one) for name, one in value.items()}
    return value.cpu().numpy() if isinstance(value, Tensor) else value


def to_tensors(value: Any, device: torch.device) -> Any:
    """Return what ``to_arrays`` made with tensors again, copies on a device."""
    if isinstance(value, Mapping):
        return {name: to_tensors(one, device) for name, one in value.items()}
    return torch.tensor(value, device=device) if isinstance(value, np.ndarray) else value
