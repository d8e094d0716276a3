"""Checkpoints: what a run needs to go on, as two files that are there whole or not at all.

``round-00000150.safetensors`` holds tensors, ``round-00000150.json`` all else, the checksum of the
first and one of its own. The JSON is written last: without it there is no checkpoint.

An object's state (a strategy's, Flower's too) becomes a JSON tree, in which a tensor stands as its
name, and tensors by name: numbers, texts, tensors, arrays, records and containers of such. Nothing
is pickled, and nothing is made on the way back but these: an object of the strategy's own is
filled where the config made it.
"""

import hashlib
import json
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial, singledispatch
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from fedsam.base.errors import TrainingError
from fedsam.base.system import write_whole
from fedsam.base.vector import Layout
from fedsam.messages import VectorRecord, tensor_of
from fedsam.runs.files import CHECKPOINTS, checkpoints
from fedsam.runs.seals import own_seal

log = logging.getLogger("fedsam")
KEPT = 2
DTYPES = {  # as safetensors calls them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Snapshot:
    """A run after a round.

    Attributes
    ----------
    round : int
        The last one that is done.
    tree : dict
        What JSON can hold.
    tensors : dict
        By name, as they were when it was taken.
    newest : str
        The last checkpoint that there was when it was read.
    """

    round: int
    tree: dict[str, Any]
    tensors: dict[str, Tensor]
    newest: str = ""


def save(run: Path, snapshot: Snapshot) -> None:
    """Write a checkpoint into a run's folder; the one before is kept, older ones are not."""
    folder = run / CHECKPOINTS
    folder.mkdir(exist_ok=True)
    name = f"round-{snapshot.round:08d}"
    seal = hashlib.sha256()

    def sealing() -> Iterator[bytes | memoryview]:
        for part in parts_of(snapshot.tensors):
            seal.update(part)
            yield part

    write_whole(folder / f"{name}.safetensors", sealing())
    body = {"round": snapshot.round, "tensors": seal.hexdigest(), "tree": snapshot.tree}
    _write(folder, name, body)
    for old in checkpoints(run)[:-KEPT]:
        (folder / f"{old}.json").unlink()
        (folder / f"{old}.safetensors").unlink(missing_ok=True)


def parts_of(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield a safetensors file part by part: its header, then a tensor at a time, without a copy.

    The package's own writer copies all of them before; what a thousand clients keep is gigabytes.

    Source: https://github.com/huggingface/safetensors#format
    """
    header, end = {}, 0
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # aligned
    for name in order:
        tensor, begin = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        kind, shape = DTYPES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        whole = tensors[name].detach().cpu().contiguous()
        flat = whole.as_strided((whole.numel(),), (1,))  # also of one element, with a stride of 0
        yield flat.view(torch.uint8).numpy().data


def load(run: Path) -> Snapshot | None:
    """Return a run's newest checkpoint that is not damaged; warn of those that are."""
    names = checkpoints(run)
    for name in reversed(names):
        try:
            return replace(_read(run / CHECKPOINTS, name), newest=names[-1])
        except (OSError, ValueError, KeyError) as error:
            log.warning("checkpoint %s is damaged (%s); the one before is used", name, error)
    return None


def accept(run: Path, file: str, seal: str) -> None:
    """Let each checkpoint go with another content of a file, too, before that is written."""
    folder = run / CHECKPOINTS
    for name in checkpoints(run):
        try:
            body = _body(folder, name)
        except (OSError, ValueError, KeyError):  # damaged: it goes with nothing
            continue
        seals = body["tree"]["seals"]
        seals[file] = [*seals[file], seal]
        _write(folder, name, body)


def _read(folder: Path, name: str) -> Snapshot:
    from safetensors import SafetensorError, safe_open

    body, path = _body(folder, name), folder / f"{name}.safetensors"
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != body["tensors"]:
            raise ValueError("its tensors have another checksum")
    try:
        with safe_open(path, "pt") as tensors:  # of a file that may go: copies
            held = {name: tensors.get_tensor(name).clone() for name in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    return Snapshot(body["round"], body["tree"], held)


def _body(folder: Path, name: str) -> dict[str, Any]:
    body = json.loads((folder / f"{name}.json").read_bytes())
    if not isinstance(body, dict):
        raise ValueError("its JSON is no mapping")
    if body.pop("self") != own_seal(body):
        raise ValueError("its JSON has another checksum")
    return body


def _write(folder: Path, name: str, body: dict[str, Any]) -> None:
    write_whole(folder / f"{name}.json", json.dumps(body | {"self": own_seal(body)}))


Tensors = dict[str, Tensor]
DEEP = 8  # objects in objects: deeper, one of them holds itself
# the same in every run of one config
CODE = FunctionType, MethodType, BuiltinFunctionType, partial, type, ModuleType, logging.Logger


@singledispatch
def flatten(value: object, name: str, tensors: Tensors) -> Any:
    """Return the JSON tree of a value; its tensors go into ``tensors``, by reference.

    Parameters
    ----------
    value : object
        What is kept. Arrays are copied, tensors are not: they must not be written into later.
    name : str
        Of the value, below which its tensors are named.
    tensors : dict
        Filled.

    Raises
    ------
    TrainingError
        If there is something in it that cannot be kept.
    """
    if isinstance(value, CODE):
        return {"code": type(value).__name__}
    if hasattr(value, "__dict__") and name.count(".") < DEEP:
        return {"object": {k: flatten(v, f"{name}.{k}", tensors) for k, v in vars(value).items()}}
    raise TrainingError(
        f"{name} is a {type(value).__name__}, which no checkpoint can hold: keep numbers, tensors, "
        "arrays, lists or dicts, or give --checkpoint-every 0"
    )


@flatten.register(bool | int | float | str | None)
def _(value: Any, name: str, tensors: Tensors) -> Any:
    return value


@flatten.register(list | tuple | deque)
def _(value: Any, name: str, tensors: Tensors) -> Any:
    return {type(value).__name__: [flatten(v, f"{name}.{n}", tensors) for n, v in enumerate(value)]}


@flatten.register
def _(value: dict, name: str, tensors: Tensors) -> Any:
    keys = [flatten(key, f"{name}.key", {}) for key in value]
    values = [flatten(v, f"{name}.{n}", tensors) for n, v in enumerate(value.values())]
    return {"dict": [list(pair) for pair in zip(keys, values, strict=True)]}


@flatten.register
def _(value: np.generic, name: str, tensors: Tensors) -> Any:
    return {"number": [value.item(), str(value.dtype)]}


@flatten.register
def _(value: Tensor, name: str, tensors: Tensors) -> Any:
    tensors[name] = value
    return {"tensor": name}


@flatten.register
def _(value: np.ndarray, name: str, tensors: Tensors) -> Any:
    tensors[name] = torch.from_numpy(np.array(value, order="C"))  # 0-d stays 0-d
    return {"array": name}


@flatten.register
def _(value: VectorRecord, name: str, tensors: Tensors) -> Any:
    tensors[name] = value.state
    return {"vector": name}


@flatten.register
def _(value: ArrayRecord, name: str, tensors: Tensors) -> Any:
    names = {key: f"{name}.{key}" for key in value}
    tensors.update({names[key]: tensor_of(array) for key, array in value.items()})
    return {"arrays": names}


@flatten.register
def _(value: Layout, name: str, tensors: Tensors) -> Any:
    return {"layout": None}


def without_defaults(tree: Any, made: Any) -> Any:
    """Return the tree of an object without the plain attributes that are as it was made.

    They follow from the config, of which a few keys may be other ones when a run goes on.
    """
    if not isinstance(tree, dict) or "object" not in tree or not isinstance(made, dict):
        return tree
    before = made.get("object", {})
    changed = {
        key: without_defaults(value, before.get(key))
        for key, value in tree["object"].items()
        if isinstance(value, dict) or key not in before or value != before[key]
    }
    return {"object": changed}


def unflatten(tree: Any, tensors: Mapping[str, Tensor], layout: Layout, made: Any = None) -> Any:
    """Return the value of a tree that ``flatten`` made.

    Parameters
    ----------
    tree : object
        As JSON holds it.
    tensors : mapping
        By name, on the CPU.
    layout : Layout
        Of the run's model; tensors come to its device.
    made : object
        What the config made in the same place: it is filled if the tree is an object's, and
        returned as it is if that is code.
    """
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()

    def device(name: str) -> Tensor:
        return tensors[name].to(layout.device)

    def part(value: Any) -> Any:
        return unflatten(value, tensors, layout)

    def filled(attributes: dict[str, Any]) -> Any:
        if made is None:
            raise TrainingError("a strategy's object that is made in mid-run cannot be put back")
        for key, value in attributes.items():
            setattr(made, key, unflatten(value, tensors, layout, getattr(made, key, None)))
        return made

    makers: dict[str, Callable[[Any], Any]] = {
        "code": lambda _: made,
        "layout": lambda _: layout,
        "object": filled,
        "list": lambda parts: list(map(part, parts)),
        "tuple": lambda parts: tuple(map(part, parts)),
        "deque": lambda parts: deque(map(part, parts)),
        "dict": lambda pairs: {part(key): part(value) for key, value in pairs},
        "number": lambda pair: np.dtype(pair[1]).type(pair[0]),
        "tensor": device,
        "array": lambda name: tensors[name].numpy(),
        "vector": lambda name: VectorRecord(layout, device(name)),
        "arrays": lambda names: ArrayRecord(
            {key: Array(tensors[name].numpy()) for key, name in names.items()}
        ),
    }
    return makers[kind](content)
