"""An object's state as plain numbers, and back: how a strategy, Flower's too, is kept.

What a strategy remembers between rounds are numbers, texts, tensors, arrays, records and
containers of such. They become a JSON tree, in which a tensor stands as its name, and tensors by
name. Nothing is pickled, and nothing is made on the way back but these: an object of the
strategy's own is filled where the config made it.
"""

import logging
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial, singledispatch
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from fedsam.base.errors import TrainingError
from fedsam.base.vector import Layout
from fedsam.messages import VectorRecord, tensor_of

Tensors = dict[str, Tensor]
DEEP = 8  # objects in objects: deeper, one of them holds itself
# the same in every run of one config
CODE = FunctionType, MethodType, BuiltinFunctionType, partial, type, ModuleType, logging.Logger


@singledispatch
def take(value: object, name: str, tensors: Tensors) -> Any:
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
        return {"object": {k: take(v, f"{name}.{k}", tensors) for k, v in vars(value).items()}}
    raise TrainingError(
        f"{name} is a {type(value).__name__}, which no checkpoint can hold: keep numbers, tensors, "
        "arrays, lists or dicts, or give --checkpoint-every 0"
    )


@take.register(bool | int | float | str | None)
def _(value: Any, name: str, tensors: Tensors) -> Any:
    return value


@take.register(list | tuple | deque)
def _(value: Any, name: str, tensors: Tensors) -> Any:
    return {type(value).__name__: [take(v, f"{name}.{n}", tensors) for n, v in enumerate(value)]}


@take.register
def _(value: dict, name: str, tensors: Tensors) -> Any:
    keys = [take(key, f"{name}.key", {}) for key in value]
    values = [take(v, f"{name}.{n}", tensors) for n, v in enumerate(value.values())]
    return {"dict": [list(pair) for pair in zip(keys, values, strict=True)]}


@take.register
def _(value: np.generic, name: str, tensors: Tensors) -> Any:
    return {"number": [value.item(), str(value.dtype)]}


@take.register
def _(value: Tensor, name: str, tensors: Tensors) -> Any:
    tensors[name] = value
    return {"tensor": name}


@take.register
def _(value: np.ndarray, name: str, tensors: Tensors) -> Any:
    tensors[name] = torch.from_numpy(np.array(value, order="C"))  # 0-d stays 0-d
    return {"array": name}


@take.register
def _(value: VectorRecord, name: str, tensors: Tensors) -> Any:
    tensors[name] = value.state
    return {"vector": name}


@take.register
def _(value: ArrayRecord, name: str, tensors: Tensors) -> Any:
    names = {key: f"{name}.{key}" for key in value}
    tensors.update({names[key]: tensor_of(array) for key, array in value.items()})
    return {"arrays": names}


@take.register
def _(value: Layout, name: str, tensors: Tensors) -> Any:
    return {"layout": None}


def changed(tree: Any, made: Any) -> Any:
    """Return the tree of an object without the plain attributes that are as it was made.

    They follow from the config, of which a few keys may be other ones when a run goes on.
    """
    if not isinstance(tree, dict) or "object" not in tree or not isinstance(made, dict):
        return tree
    before = made.get("object", {})
    kept = {
        key: changed(value, before.get(key))
        for key, value in tree["object"].items()
        if isinstance(value, dict) or key not in before or value != before[key]
    }
    return {"object": kept}


def give(tree: Any, tensors: Mapping[str, Tensor], layout: Layout, there: Any = None) -> Any:
    """Return the value of a tree that ``take`` made.

    Parameters
    ----------
    tree : object
        As JSON holds it.
    tensors : mapping
        By name, on the CPU.
    layout : Layout
        Of the run's model; tensors come to its device.
    there : object
        What the config made in the same place: it is filled if the tree is an object's, and
        returned as it is if that is code.
    """
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()

    def device(name: str) -> Tensor:
        return tensors[name].to(layout.device)

    def part(value: Any) -> Any:
        return give(value, tensors, layout)

    def filled(attributes: dict[str, Any]) -> Any:
        if there is None:
            raise TrainingError("a strategy's object that is made in mid-run cannot be put back")
        for key, value in attributes.items():
            setattr(there, key, give(value, tensors, layout, getattr(there, key, None)))
        return there

    makers: dict[str, Callable[[Any], Any]] = {
        "code": lambda _: there,
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
