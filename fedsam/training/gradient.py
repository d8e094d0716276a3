"""The loss of a mini-batch, and its gradient as the closure that minimisers call."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from fedsam.base.vector import along
from fedsam.data.images import Batch
from fedsam.tasks import Task


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


class Model(Protocol):
    """The network at the w of a pass, as a loss sees it."""

    def forward(self, images: Tensor) -> Tensor:
        """Return its output for images (B, C, H, W)."""
        ...

    def evaluating(self) -> AbstractContextManager[None]:
        """Return a context in which it is in eval mode and nothing of it changes."""
        ...


class Loss(Protocol):
    """What a client minimises: the classes of ``clients/losses/``, or yours.

    One that stands for another names it in ``at(round)``. One that is random sets ``draws`` to
    True: then ``batch.uniform()`` has numbers for it.
    """

    def value(self, model: Model, batch: Batch, task: Task) -> Tensor:
        """Return the mean loss of one client's mini-batch, a scalar; a pure function of w."""
        ...


@dataclass(frozen=True)
class Plain:
    """The mean of the task's losses over the mini-batch."""

    def value(self, model: Model, batch: Batch, task: Task) -> Tensor:
        """Return the mean loss of a mini-batch, a scalar."""
        return mean_loss(task, model.forward(batch.images), batch)


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
    loss_of : Loss
        What is minimised.
    decay : float or Tensor, optional
        Coefficient of the loss's l2 term; None: it has none.
    first_pass_statistics : bool
        Let only the first pass update the BatchNorm statistics.
    """

    def __init__(
        self,
        gradients: Gradients,
        batch: Batch,
        loss_of: Loss,
        decay: float | Tensor | None = None,
        *,
        first_pass_statistics: bool = False,
    ) -> None:
        self.gradients = gradients
        self.batch = batch
        self.loss_of = loss_of
        self.decay = decay
        self.first_pass_statistics = first_pass_statistics
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
        again = self._loss is not None
        loss, g = self.gradients(w, self.batch, self.loss_of, again and self.first_pass_statistics)
        if not again:
            self._loss = loss
        return g if self.decay is None else along(g, self.decay, w)

    def parts(self, size: int) -> "list[tuple[float | Tensor, MiniBatch]]":
        """Return sub-batches of ``size`` examples: each one's share of them, and its gradient."""
        if not self._parts:
            part_of = partial(
                MiniBatch,
                self.gradients,
                loss_of=self.loss_of,
                decay=self.decay,
                first_pass_statistics=self.first_pass_statistics,
            )
            self._parts = [(share, part_of(part)) for share, part in self.batch.parts(size)]
        return self._parts


def _last(share: float | Tensor) -> float | Tensor:
    return share.squeeze(-1) if isinstance(share, Tensor) else share
