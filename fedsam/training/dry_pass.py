"""A pass over a few images before anything is written: what a model cannot do is said then."""

import traceback
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from fedsam.base.errors import UsageError, one_line
from fedsam.base.randomness import drew
from fedsam.base.vector import digest
from fedsam.data.images import Batch
from fedsam.tasks import Task, headline_of
from fedsam.training import batchnorm
from fedsam.training.flat_module import FlatModule, precision

OF_A_SHAPE = (RuntimeError, ValueError, IndexError)  # what layers raise on images they do not fit


class Needs(NamedTuple):
    """What a model needs of whoever trains it.

    Attributes
    ----------
    draws : bool
        Random numbers: it has dropout or the like.
    least : int
        Images a mini-batch must hold: 2 where BatchNorm sees one value a channel of each.
    changes : bool
        What lies behind its parameters (BatchNorm statistics) changes while it trains.
    """

    draws: bool = False
    least: int = 1
    changes: bool = False


def initialise_lazy_layers(module: nn.Module, shape: Sequence[int], name: str) -> None:
    """Let lazy layers find out their sizes from one image of a shape (C, H, W)."""
    tensors = [*module.parameters(), *module.buffers()]
    if any(isinstance(t, UninitializedParameter | UninitializedBuffer) for t in tensors):
        training = module.training
        with torch.no_grad():
            _forward(module.eval(), torch.zeros(1, *shape), name, torch.no_grad())
        module.train(training)


def dry_pass(
    network: FlatModule, task: Task, batch: Batch, tests: Batch, classes: int, name: str
) -> Needs:
    """Train on a mini-batch, evaluate on another, and forget it; return what the model needs.

    Parameters
    ----------
    network : FlatModule
        The model, whose values are used up.
    task : Task
        What its output means.
    batch, tests : Batch
        Two images each: as clients train on them, and as they are evaluated on.
    classes : int
        Numbers that the output holds of an image, at least; 0: whatever the task reads.
    name : str
        Of the model, for messages.

    Raises
    ------
    UsageError
        If the model does not fit the images or the task. What else its code raises is its own.
    """
    module = network.module

    def forward(images: Tensor, *, training: bool) -> Tensor:
        context = precision(network.layout.device, network.bf16)
        output = _forward(module.train(training), images, name, context)
        _check(output, len(images), classes, f"--model {name}: in {_mode(module)} mode forward")
        return output.to(network.layout.dtype)

    def both() -> None:
        loss = _loss(task, forward(batch.images, training=True), batch.targets, name)
        if loss.shape != batch.targets.shape[:1]:
            raise UsageError(
                f"--task: loss returns the shape {tuple(loss.shape)} for {len(batch.targets)} "
                f"images, not one number an image"
            )
        if not loss.requires_grad:
            raise UsageError(f"--model {name}: its output depends on no trainable parameter")
        try:
            network.gradient_of(loss.mean())
        except OF_A_SHAPE as error:
            raise UsageError(
                f"--model {name}: its gradient cannot be taken: {one_line(error)}"
            ) from error
        with torch.no_grad():
            total = task.statistics(forward(tests.images, training=False), tests.targets)
        _check_metrics(task, task.metrics(total))

    before, frozen = network.carried(), network.layout.digest
    draws = drew(both)
    if digest(network.layout.frozen) != frozen:
        raise UsageError(
            f"--model {name}: its forward writes into parameters without requires_grad, which no "
            "client sends; let them be buffers"
        )
    changes, least = not torch.equal(network.carried(), before), 1
    if batchnorm.layers(module):
        try:
            with torch.no_grad():
                module.train()(batch.images[:1])
        except ValueError:  # "expected more than 1 value per channel when training"
            least = 2
    return Needs(draws, least, changes)


def _forward(
    module: nn.Module, images: Tensor, name: str, context: AbstractContextManager[object]
) -> Tensor:
    """Return the module's output, or say what does not fit."""
    try:
        with context:
            output: Tensor = module(images)
    except OF_A_SHAPE as error:
        shape = " x ".join(map(str, images.shape[1:]))
        own = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
        raise UsageError(
            f"--model {name}: cannot take images of {shape} in {_mode(module)} mode: "
            f"{one_line(error)} ({Path(own[-1].filename).name}:{own[-1].lineno})"
        ) from error
    return output


def _loss(task: Task, output: Tensor, targets: Tensor, name: str) -> Tensor:
    """Return the task's loss; of one of ours, say what it cannot read."""
    try:
        return task.loss(output, targets)
    except OF_A_SHAPE as error:
        if not type(task).__module__.startswith("fedsam."):
            raise
        raise UsageError(
            f"--model {name}: returns the shape {tuple(output.shape)} for targets of the shape "
            f"{tuple(targets.shape)}, which --task cannot read ({one_line(error)})"
        ) from error


def _check(output: object, images: int, classes: int, where: str) -> None:
    """Raise UsageError if a model's output is not what is asked of it."""
    wanted = f"a tensor ({images}, {classes})" if classes else "a tensor"
    if not isinstance(output, Tensor):
        kind = type(output).__name__
        raise UsageError(f"{where} returns a {kind}, not the logits, {wanted}")
    if classes and (output.dim() != 2 or len(output) != images or output.shape[1] < classes):
        raise UsageError(
            f"{where} returns the shape {tuple(output.shape)} for {images} images of {classes} "
            f"classes, not the logits, {wanted}"
        )


def _check_metrics(task: Task, metrics: Mapping[str, float]) -> None:
    """Raise UsageError if a task's metrics lack the loss or the headline."""
    for name in ("loss", headline_of(task)):
        if name not in metrics:
            raise UsageError(
                f"--task: metrics returns {', '.join(metrics) or 'nothing'}, and no {name!r}; "
                "headline = '...' in the class names another headline"
            )


def _mode(module: nn.Module) -> str:
    return "training" if module.training else "eval"
