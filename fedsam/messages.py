"""Tensors <-> Flower records: parameters that stay tensors, and all keys of our messages.

Flower's own strategies see an ordinary ``ArrayRecord`` of the usual ``state_dict`` names. Ours
look at ``VectorRecord.state``, the flat vector behind it, which is never copied or serialised
unless somebody asks for bytes: a SuperLink that must send them, or a NumPy aggregation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, reduce, wraps
from io import BytesIO
from typing import Any, Self, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from fedsam.base.errors import UsageError
from fedsam.base.vector import Entry, Layout

ARRAYS = "arrays"  # Flower's default keys of the records of a message ...
CONFIG = "config"
METRICS = "metrics"
EXCHANGED = "exchanged"  # the record of the vectors that travel beside the model ...
MEMORY = "memory"  # ... and of those that a node keeps in its context
EXAMPLES = "num-examples"  # ... and of the weight of a reply
ROUND = "server-round"
LEARNING_RATE = "lr"
LOSS = "loss"
STEPS = "steps"
FROZEN = "frozen"  # what the frozen parameters must be that a node holds: their digest
PARTITION = "partition-id"  # Flower's key in a node's config

NUMPY_FILE = "numpy.ndarray"  # how Flower names the serialisation of its arrays

Record = TypeVar("Record")


class TensorArray(Array):
    """A Flower ``Array`` around a part of a state vector, serialised when somebody asks for bytes.

    Parameters
    ----------
    entry : Entry
        Which part.
    state : Tensor
        Shape (S,), on its device; never changed.
    """

    def __init__(self, entry: Entry, state: Tensor) -> None:  # the parent's would serialise
        self.entry = entry
        self.state = state
        self.dtype = str(entry.dtype).removeprefix("torch.")
        self.shape = entry.shape
        self.stype = NUMPY_FILE

    @property
    def tensor(self) -> Tensor:
        """The array as a tensor: a view of the state where the dtypes agree."""
        return self.entry.read(self.state)

    def numpy(self) -> NDArray[Any]:
        """Return a C-contiguous NumPy copy: Flower's strategies may change it in place."""
        return np.array(self.tensor.cpu().numpy(), order="C")

    @cached_property
    def data(self) -> bytes:  # type: ignore[override]
        """The bytes of a NumPy file, as Flower sends them."""
        buffer = BytesIO()
        np.save(buffer, self.numpy(), allow_pickle=False)
        return buffer.getvalue()


class VectorRecord(ArrayRecord):
    """An ``ArrayRecord`` that is one flat state vector under its ``state_dict`` names.

    Its arrays are made when somebody looks at them: most rounds nobody does.

    Parameters
    ----------
    layout : Layout
        What lies where.
    state : Tensor
        Shape (S,); must not change afterwards, the record's arrays are views of it.
    """

    def __init__(self, layout: Layout, state: Tensor) -> None:
        super().__init__()  # with arrays it would copy them
        self.layout = layout
        self._state = state
        self._made = False
        self._replaced: dict[str, Array] = {}  # what its user put in place of our arrays

    @property
    def state(self) -> Tensor:
        """The vector (S,), with what was put in place of an array; one taken out stays in it.

        Raises
        ------
        ValueError
            If the layout has no array of that name and shape.
        """
        if self._replaced:
            arrays = self.layout.read(self._state)
            arrays |= {name: tensor_of(array) for name, array in self._replaced.items()}
            self._state, self._replaced = self.layout.write(arrays), {}
        return self._state

    def copy(self) -> Self:
        """Return a record of the same state, which never changes."""
        return type(self)(self.layout, self.state)

    def _make(self) -> None:
        if not self._made:
            self._made = True
            for entry in self.layout.entries:
                super().__setitem__(entry.name, TensorArray(entry, self._state))

    def __setitem__(self, key: str, value: Array) -> None:
        self._make()
        self._replaced[key] = value
        super().__setitem__(key, value)


def _made_first(name: str) -> Callable[..., Any]:
    """Return a method of ``ArrayRecord`` that looks at the arrays, for ``VectorRecord``."""
    inherited = getattr(ArrayRecord, name)

    @wraps(inherited)
    def method(self: VectorRecord, *arguments: Any) -> Any:
        self._make()
        return inherited(self, *arguments)

    return method


for _name in ("getitem", "delitem", "iter", "len", "contains", "eq", "repr"):
    setattr(VectorRecord, f"__{_name}__", _made_first(f"__{_name}__"))
for _name in ("keys", "values", "items"):
    setattr(VectorRecord, _name, _made_first(_name))


def state_of(record: ArrayRecord, layout: Layout) -> Tensor:
    """Return the state vector (S,) of a record, without a copy where it holds one.

    Raises
    ------
    ValueError
        If its names or shapes are not the layout's.
    """
    if isinstance(record, VectorRecord) and record.layout == layout:
        return record.state
    return layout.write({name: tensor_of(array) for name, array in record.items()})


def tensor_of(array: Array) -> Tensor:
    """Return an array as a tensor, without a copy where it is one."""
    if isinstance(array, TensorArray):
        return array.tensor
    return torch.from_numpy(np.array(array.numpy(), order="C"))  # 0-d stays 0-d


def vectors_record(vectors: Mapping[str, Tensor]) -> ArrayRecord:
    """Return an ``ArrayRecord`` of vectors (P,) by name, which stay tensors."""
    record = ArrayRecord()
    for name, vector in vectors.items():
        record[name] = TensorArray(Entry(name, tuple(vector.shape), vector.dtype, 0), vector)
    return record


def vectors_of(content: RecordDict, layout: Layout, key: str = EXCHANGED) -> dict[str, Tensor]:
    """Return the vectors under a key, on the layout's device; {} if there are none."""
    record = content.get(key)
    if not isinstance(record, ArrayRecord):
        return {}
    return {n: tensor_of(array).to(layout.device, layout.dtype) for n, array in record.items()}


def model_of(content: RecordDict) -> ArrayRecord:
    """Return the one record of a message that holds a model."""
    records = of_kind(content, ArrayRecord).items()
    return only_record({key: record for key, record in records if key != EXCHANGED})


def plain_record(record: ArrayRecord) -> ArrayRecord:
    """Return the record in Flower's own classes, serialised: what leaves this process."""
    return ArrayRecord({name: Array(array.numpy()) for name, array in record.items()})


def plain_content(content: RecordDict, made: dict[int, ArrayRecord] | None = None) -> RecordDict:
    """Return a message's content with plain records; ``made`` holds those made before, by id."""
    made = {} if made is None else made
    out = RecordDict()
    for key, record in content.items():
        if isinstance(record, ArrayRecord) and id(record) not in made:
            made[id(record)] = plain_record(record)
        out[key] = made.get(id(record), record)
    return out


def parameters_of(layout: Layout) -> Layout:
    """Return the layout of a model's parameters alone."""
    entries = [entry for entry in layout.entries if entry.offset < layout.trainable]
    return Layout(entries, layout.trainable, layout.dtype, layout.device)


def layout_of(record: ArrayRecord) -> Layout:
    """Return a layout for a record that somebody else built: floating arrays are trainable.

    Raises
    ------
    ValueError
        If it holds no floating array.
    """
    if isinstance(record, VectorRecord):
        return record.layout
    arrays = {name: tensor_of(array) for name, array in record.items()}
    floating = [name for name, tensor in arrays.items() if tensor.is_floating_point()]
    if not floating:
        raise ValueError("the record holds no floating-point array")
    offsets, end = {}, 0
    for name in floating + [name for name in arrays if name not in floating]:
        offsets[name] = end
        end += arrays[name].numel()
    trainable = sum(arrays[name].numel() for name in floating)
    entries = [Entry(n, tuple(t.shape), t.dtype, offsets[n]) for n, t in arrays.items()]
    dtype = reduce(torch.promote_types, (arrays[name].dtype for name in floating))
    return Layout(entries, trainable, dtype)


def of_kind(content: RecordDict, kind: type[Record]) -> dict[str, Record]:
    """Return a message's records of one kind by key.

    Flower's own properties (``array_records``, ...) make synchronised dictionaries, at each look.
    """
    return {key: record for key, record in content.items() if isinstance(record, kind)}


def only_record(records: Mapping[str, Record]) -> Record:
    """Return the one record of its kind in a message, under whatever key a strategy gave it.

    Raises
    ------
    ValueError
        If there is none or more than one.
    """
    if len(records) != 1:
        raise ValueError(f"expected one record of its kind in the message, got {list(records)}")
    return next(iter(records.values()))


def number_in(record: ConfigRecord | MetricRecord, key: str) -> float:
    """Return a number out of a record.

    Raises
    ------
    ValueError
        If it is missing or no number.
    """
    value = record.get(key)
    if not isinstance(value, int | float):
        raise ValueError(f"expected a number under {key!r} in the message, got {value!r}")
    return value


def train_instruction(content: RecordDict) -> tuple[ArrayRecord, int, float]:
    """Return global arrays, round (from 1) and learning rate of a train message."""
    config = only_record(of_kind(content, ConfigRecord))
    return model_of(content), int(number_in(config, ROUND)), number_in(config, LEARNING_RATE)


def check_frozen(content: RecordDict, layout: Layout) -> None:
    """Raise UsageError if the server of a train message holds other frozen parameters."""
    wanted = only_record(of_kind(content, ConfigRecord)).get(FROZEN, layout.digest)
    if wanted != layout.digest:
        raise UsageError(
            "the frozen parameters are not the server's: give every node the same --weights file, "
            "--model and --seed"
        )


def train_reply(
    arrays: ArrayRecord,
    examples: int,
    steps: int,
    loss: float,
    vectors: Mapping[str, Tensor] | None = None,
) -> RecordDict:
    """Return the content of a client's reply to a train message."""
    metrics = MetricRecord({EXAMPLES: examples, STEPS: steps, LOSS: loss})
    content = RecordDict({ARRAYS: arrays, METRICS: metrics})
    if vectors:
        content[EXCHANGED] = vectors_record(vectors)
    return content


def evaluate_reply(metrics: dict[str, float], examples: int) -> RecordDict:
    """Return the content of a client's reply to an evaluate message."""
    return RecordDict({METRICS: MetricRecord({EXAMPLES: examples, **metrics})})


def states_and_weights(
    replies: Sequence[RecordDict], layout: Layout, weight: str = EXAMPLES
) -> tuple[list[Tensor], list[float]]:
    """Return the states, K times (S,), and weights of the replies to a train message."""
    states = [state_of(only_record(of_kind(reply, ArrayRecord)), layout) for reply in replies]
    metrics = [only_record(of_kind(reply, MetricRecord)) for reply in replies]
    return states, [number_in(record, weight) for record in metrics]
