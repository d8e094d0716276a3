"""Which parameters of a network train: all others are frozen, and never leave the process."""

import re
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedsam.base.errors import UsageError

NAMED = 8  # parameters that a message names


def train_only(module: nn.Module, pattern: str) -> None:
    """Freeze the parameters whose names a regular expression does not find; "" freezes all.

    A tensor of two names trains if one of them is found.

    Raises
    ------
    UsageError
        If it finds none.
    """
    named = list(module.named_parameters(remove_duplicate=False))
    chosen = {id(p) for name, p in named if pattern and re.search(pattern, name)}
    if pattern and not chosen:
        raise UsageError(f"--train {pattern}: no parameter is called so; {names_of(module)}")
    for _, parameter in named:
        parameter.requires_grad_(id(parameter) in chosen)


def freeze_norms(module: nn.Module) -> None:
    """Freeze the statistics of each BatchNorm that has no parameter which trains.

    It normalises as in evaluation, always, with what it holds: that is neither changed nor sent.
    """
    for layer in module.modules():
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None:
            if any(parameter.requires_grad for parameter in layer.parameters()):
                continue
            for name, statistic in list(layer.named_buffers(recurse=False)):
                del layer._buffers[name]
                layer.register_parameter(name, nn.Parameter(statistic, requires_grad=False))
            layer.register_forward_pre_hook(_in_evaluation)


def _in_evaluation(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    layer.eval()


def names_of(module: nn.Module) -> str:
    """Return some names of parameters, the first and the last, for a message."""
    names = [name for name, _ in module.named_parameters()]
    half = NAMED // 2
    some = names if len(names) <= NAMED else [*names[:half], "...", *names[-half:]]
    return f"the model has {', '.join(some)}"
