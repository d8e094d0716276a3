"""A stranger's reply: checked whole, and made anew from what was checked.

Whatever a node sends goes through here before a strategy, a formula or a log line sees it. No
byte is unpickled or evaluated, nothing is decoded before its length is known to be right, and what
comes out has one form: the records ``arrays`` and ``metrics``, and ``exchanged`` where vectors
travel beside the model.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import QFedAvg, Strategy
from torch import Tensor

from fedsam.base.errors import one_line
from fedsam.base.vector import Layout
from fedsam.messages import (
    ARRAYS,
    CONFIG,
    EXAMPLES,
    EXCHANGED,
    LOSS,
    METRICS,
    NUMPY_FILE,
    PARTITION,
    STEPS,
    TensorArray,
    VectorRecord,
    vectors_record,
)
from fedsam.server.adapter import MethodStrategy
from fedsam.training.client import Asked

LONGEST = 200  # characters of what is said of a reply
MOST = 2**53  # examples or steps that a client may name where nobody knows how many it has
LARGEST = 1e6  # of a metric that a strategy computes with: its powers stay finite
MAGIC = b"\x93NUMPY\x01\x00"  # of a NumPy file of version 1.0, which all plain arrays have
HEADER = re.compile(
    rb"\{'descr': '([<|]\w{2,3})', 'fortran_order': (True|False), 'shape': \(([\d, ]*)\), \} *\n"
)

Bounds = Mapping[str, tuple[float, float]]
Read = TypeVar("Read")
Record = TypeVar("Record", ArrayRecord, ConfigRecord, MetricRecord)


class Form(NamedTuple):
    """What the replies of a round look like.

    Attributes
    ----------
    layout : Layout
        The model's.
    beside : collection of str
        Names of the vectors that travel beside the model.
    bounds : mapping
        Least and greatest value of the metrics that the strategy computes with, by name.
    """

    layout: Layout
    beside: Collection[str] = ()
    bounds: Bounds = MappingProxyType({})


def said(value: object) -> str:
    """Return what a stranger says as a part of one line: bounded, and safe to print."""
    return one_line(value[: 4 * LONGEST] if isinstance(value, str) else value, LONGEST)


def guarded(read: Callable[[], Read]) -> tuple[Read | None, str]:
    """Return what a reply holds, or why it cannot be used, in one bounded line.

    The one place for an ``except`` of everything: the content is a stranger's, and whatever it
    lets our code or a library raise (MemoryError and RecursionError too) may cost no more than the
    reply.
    """
    try:
        return read(), ""
    except Exception as error:  # noqa: BLE001
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        return None, said(f"{kind}{one_line(error, LONGEST)}")


def checked(content: RecordDict, form: Form, asked: Asked | None = None) -> RecordDict:
    """Return the content of a reply to a train message, made anew.

    Parameters
    ----------
    content : RecordDict
        A stranger's, or that of a client of this process, whose tensors are not copied.
    form : Form
        What it must look like.
    asked : Asked, optional
        What the client was asked for; None: nobody knows.

    Raises
    ------
    ValueError
        If a record, name, type, dtype, shape, length or number is not what it must be. That the
        vectors are finite is not looked at here: a whole cohort's are at once.
    Exception
        Whatever else odd content leads to.
    """
    _same_names("record", content, [ARRAYS, METRICS, *[EXCHANGED] * bool(form.beside)])
    told = _record(content, METRICS, MetricRecord)
    metrics = _metrics(told, form.bounds, asked)
    sent = _record(content, ARRAYS, ArrayRecord)
    model = _model(sent, form.layout)
    # of a client of this process: it is in that form
    same = model is sent and (type(content), type(told)) == (RecordDict, MetricRecord)
    if same and not form.beside and len(told) == len(metrics):
        return content
    made = RecordDict({ARRAYS: model, METRICS: MetricRecord({**metrics})})
    if form.beside:
        made[EXCHANGED] = vectors_record(_vectors(_record(content, EXCHANGED, ArrayRecord), form))
    return made


def partition_in(reply: Message) -> int:
    """Return the partition that a node says it holds, in its answer to the roll call.

    Raises
    ------
    ValueError
        If it is no number of a partition.
    Exception
        Whatever else odd content leads to.
    """
    _same_names("record", reply.content, [CONFIG])
    record = _record(reply.content, CONFIG, ConfigRecord)
    _same_names("value", record, [PARTITION])
    partition = record[PARTITION]
    if isinstance(partition, bool) or not isinstance(partition, int) or partition < 0:
        raise ValueError(f"{PARTITION} is {_short(partition)}, no number of a partition")
    return partition


def bounds_of(strategy: Strategy) -> Bounds:
    """Return the bounds of the metrics that a strategy computes with, by name.

    A client's loss may be NaN, where it has trained nothing; a formula's input may not.
    """
    bounds: dict[str, tuple[float, float]] = {}
    if isinstance(strategy, MethodStrategy):
        computed = set(strategy.method.takes) - {EXAMPLES, STEPS}
        bounds |= dict.fromkeys(computed, (-LARGEST, LARGEST))
    if isinstance(strategy, QFedAvg):  # it takes powers of it
        bounds[strategy.train_loss_key] = (0.0, LARGEST)
    inside = getattr(strategy, "strategy", None)
    return {**bounds, **bounds_of(inside)} if isinstance(inside, Strategy) else bounds


def _same_names(kind: str, names: Collection[str], wanted: Collection[str]) -> None:
    """Raise ValueError if what a stranger names is not exactly what is wanted."""
    for name in names:
        if name not in wanted:
            raise ValueError(f"it has the {kind} {_short(name)}, which nobody asked for")
    for name in wanted:
        if name not in names:
            raise ValueError(f"its {kind} {name!r} is missing")


def _record(content: RecordDict, key: str, kind: type[Record]) -> Record:
    """Return one of a message's records, if it is of its kind."""
    record = content[key]
    if not isinstance(record, kind):
        raise ValueError(f"its record {key!r} is a {type(record).__name__}")
    return record


def _short(value: object) -> str:
    """Return a stranger's value as a part of a line, without a copy of all that it may hold."""
    if isinstance(value, str | bytes):
        return repr(value[:40])
    return f"a {type(value).__name__}" if isinstance(value, list) else repr(value)


def _model(record: ArrayRecord, layout: Layout) -> VectorRecord:
    """Return a model as one vector, which it is where a client of this process sends it."""
    if isinstance(record, VectorRecord) and (record.layout is layout or record.layout == layout):
        return record
    entries = {entry.name: entry for entry in layout.entries}
    _same_names("array", record, entries)
    state = torch.empty(layout.size, dtype=layout.dtype, device=layout.device)
    for name, entry in entries.items():
        entry.view(state).copy_(_decoded(name, record[name], entry.shape, entry.dtype))
    return VectorRecord(layout, state)


def _vectors(record: ArrayRecord, form: Form) -> dict[str, Tensor]:
    """Return the vectors (P,) beside a model, by name."""
    layout, P = form.layout, form.layout.trainable
    _same_names("vector", record, form.beside)
    return {
        name: _decoded(name, record[name], (P,), layout.dtype).to(layout.device)
        for name in form.beside
    }


def _decoded(name: str, array: Array, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return an array that is of this shape and dtype, without a copy where it is a tensor."""
    wanted = str(dtype).removeprefix("torch.")
    if array.stype != NUMPY_FILE:
        raise ValueError(f"{name!r} is serialised as {_short(array.stype)}, not {NUMPY_FILE!r}")
    if array.shape != shape or array.dtype != wanted:
        raise ValueError(
            f"{name!r} is {_short(array.dtype)} {_short(array.shape[: len(shape) + 1])}, "
            f"the model's is {wanted} {shape}"
        )
    if isinstance(array, TensorArray):
        return array.tensor
    data, kind = array.data, np.dtype(wanted)
    begin, fortran = _header(name, data, shape, kind)
    size = math.prod(shape) * kind.itemsize
    if len(data) != begin + size:
        raise ValueError(f"{name!r} has {len(data)} bytes, {begin + size} were expected")
    flat = np.frombuffer(data, kind, math.prod(shape), begin)
    if dtype is torch.bool:  # bytes that are neither 0 nor 1
        flat = np.not_equal(flat.view(np.uint8), 0)
    whole = flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)
    return torch.from_numpy(np.array(whole, order="C"))


def _header(name: str, data: bytes, shape: Sequence[int], kind: np.dtype[Any]) -> tuple[int, bool]:
    """Return where a NumPy file's elements begin and if they lie in Fortran's order.

    Read as text: NumPy's own reader evaluates it as Python.
    """
    begin = len(MAGIC) + 2
    text = b""
    if data[: len(MAGIC)] == MAGIC:
        length = int.from_bytes(data[len(MAGIC) : begin], "little")
        text, begin = data[begin : begin + length], begin + length
    if not (found := HEADER.fullmatch(text)):
        raise ValueError(f"{name!r} is no NumPy file of a plain array")
    descr, fortran, numbers = found.groups()
    told = tuple(int(number) for number in numbers.replace(b",", b" ").split()[: len(shape) + 1])
    if descr.decode() != kind.str or told != tuple(shape):
        raise ValueError(
            f"{name!r} is {_short(descr.decode())} {_short(told)}, not what it says it is"
        )
    return begin, fortran == b"True"


def _metrics(record: MetricRecord, bounds: Bounds, asked: Asked | None) -> dict[str, int | float]:
    """Return the metrics of a reply by name, each a number that it may be."""
    names = dict.fromkeys([EXAMPLES, STEPS, LOSS, *(n for n in bounds if n in record)])
    _same_names("metric", record, names)
    made = {name: _number(name, record[name]) for name in names}
    if asked is not None:
        for name, wanted in ((EXAMPLES, asked.examples), (STEPS, asked.steps)):
            if made[name] != wanted:
                raise ValueError(f"{name} is {made[name]}, it was asked for {wanted}")
    if not 0 < made[EXAMPLES] <= MOST:
        raise ValueError(f"{EXAMPLES} is {made[EXAMPLES]}")
    if not (0 <= made[STEPS] <= MOST and made[STEPS] == int(made[STEPS])):
        raise ValueError(f"{STEPS} is {made[STEPS]}, no number of steps")
    if math.isinf(made[LOSS]):
        raise ValueError(f"{LOSS} is {made[LOSS]}")
    for name, (least, most) in bounds.items():
        if name in made and not least <= made[name] <= most:
            raise ValueError(
                f"{name} is {made[name]}: the strategy computes with {least:g} to {most:g}"
            )
    return made


def _number(name: str, value: object) -> int | float:
    """Return a metric that is one number, of a size that computers compute with."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {_short(value)}, no number")
    if isinstance(value, int) and abs(value) > 2**62:
        raise ValueError(f"{name} is an integer of {value.bit_length()} bits")
    return value
