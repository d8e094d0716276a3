"""The loss of a mini-batch, and its gradient as the closure that minimizers call."""

from typing import Protocol

import torch
from torch import Tensor

from fedsam.base.errors import UsageError
from fedsam.base.vector import along
from fedsam.data.images import Batch
from fedsam.tasks import Task
from fedsam.training.method import Loss, Method


def mean_loss(task: Task, output: Tensor, batch: Batch) -> Tensor:
    """Return the mean loss of a mini-batch, mixed and masked as it says."""
    losses = task.loss(output, batch.targets)
    if batch.mixed_targets is not None:
        mixed = task.loss(output, batch.mixed_targets)
        losses = batch.lam * losses + (1 - batch.lam) * mixed
    return mean_of(losses, batch)


def mean_of(losses: Tensor, batch: Batch) -> Tensor:
    """Return the mean of one number an example, (B,), over those that a mini-batch has."""
    if batch.valid is None:
        return losses.mean()
    return torch.where(batch.valid, losses, 0).sum() / batch.valid.sum().clamp(min=1)


class Gradients(Protocol):
    """Losses and gradients of one model on a mini-batch, or of K models on K mini-batches."""

    def __call__(
        self, w: Tensor, batch: Batch, loss: Loss, frozen: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return loss (...,) and gradient (..., P) at ``w`` (..., P).

        ``frozen`` leaves the BatchNorm statistics as they are.
        """
        ...


class MiniBatch:
    """The closure ``grad`` of one step.

    Parameters
    ----------
    gradients : Gradients
        Of the model, or of K.
    batch : Batch
        The mini-batch.
    method : Method
        Says what is minimised, and whether it holds the weight decay.
    """

    def __init__(self, gradients: Gradients, batch: Batch, method: Method) -> None:
        self.gradients = gradients
        self.batch = batch
        self.method = method
        self._loss: Tensor | None = None
        self._parts: list[tuple[float | Tensor, MiniBatch]] = []

    @property
    def loss(self) -> Tensor | None:
        """Mean loss (...,) where the gradient was asked for first; None: it was not."""
        if self._loss is not None or not self._parts:
            return self._loss
        losses = [(share, part.loss) for share, part in self._parts]
        weighted = [_last(share) * loss for share, loss in losses if loss is not None]
        return torch.stack(weighted).sum(0)

    def __call__(self, w: Tensor) -> Tensor:
        """Return the gradient (..., P) of the mini-batch loss at ``w``."""
        method, again = self.method, self._loss is not None
        frozen = again and method.first_pass_statistics
        loss, g = self.gradients(w, self.batch, method.loss, frozen)
        if not again:
            self._loss = loss
        return along(g, method.weight_decay, w) if method.decay_in_loss else g

    def parts(self, size: int) -> "list[tuple[float | Tensor, MiniBatch]]":
        """Return sub-batches of ``size`` examples: each one's share of them, and its gradient.

        Raises
        ------
        UsageError
            If the model needs larger ones.
        """
        least = self.method.least
        if size < least:
            raise UsageError(
                f"--minimizer-options: sub-batches of {size}: the BatchNorm of --model needs "
                f"{least}"
            )
        if not self._parts:
            self._parts = [
                (share, MiniBatch(self.gradients, part, self.method))
                for share, part in self.batch.parts(size, least)
            ]
        return self._parts


def _last(share: float | Tensor) -> float | Tensor:
    return share.squeeze(-1) if isinstance(share, Tensor) else share
