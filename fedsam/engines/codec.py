"""Jobs and results of clients as Flower's messages and as bytes, and back."""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import RecordDict
from numpy.typing import NDArray
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

Bytes = NDArray[np.uint8]
LENGTH = 8  # bytes that say how long the text of packed bytes is
TENSOR = ""  # the name under which a tensor's dtype and shape stand in it: no vector has it


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


def pack(value: Any) -> Bytes:
    """Return a value as bytes: text that JSON can hold, and behind it the tensors, end to end.

    Parameters
    ----------
    value : Any
        Numbers, texts, None and tensors, in sequences and mappings of names.

    Returns
    -------
    ndarray
        Shape (B,), uint8.
    """
    tensors: list[NDArray[np.uint8]] = []

    def placed(part: Any) -> Any:
        """Return what JSON is to hold in place of a part that it knows not."""
        if isinstance(part, Mapping):
            return dict(part)
        if not isinstance(part, Tensor):
            raise TypeError(f"a {type(part).__name__} cannot be packed")
        flat = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        tensors.append(flat.numpy())
        return {TENSOR: [str(part.dtype).removeprefix("torch."), *part.shape]}

    text = json.dumps(value, default=placed).encode()
    head = np.frombuffer(len(text).to_bytes(LENGTH, "little") + text, np.uint8)
    return np.concatenate([head, *tensors])


def unpack(packed: Bytes | bytes, device: torch.device) -> Any:
    """Return what was packed, sequences as lists; tensors are copies, on a device."""
    data = np.frombuffer(packed, np.uint8)
    begin = LENGTH + int.from_bytes(data[:LENGTH].tobytes(), "little")

    def taken(part: dict[str, Any]) -> Any:
        """Return the next tensor, where one stands; JSON ends them in the order they came in."""
        nonlocal begin
        if TENSOR not in part:
            return part
        name, *shape = part[TENSOR]
        dtype: torch.dtype = getattr(torch, name)
        end = begin + math.prod(shape) * dtype.itemsize
        tensor = torch.tensor(data[begin:end], device=device).view(dtype).view(shape)
        begin = end
        return tensor

    return json.loads(data[LENGTH:begin].tobytes(), object_hook=taken)
