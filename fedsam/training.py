"""THE local loop, written once: a client's round as minimiser steps over its plan.

An algorithm sees two closures and nothing of models, batches or devices:

    grad(w)        gradient of this step's mini-batch loss at w, the same batch however often
    descend(w, g)  one step of SGD along g, with the client's correction, momentum, weight decay
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedsam.data.images import Batch, Images
from fedsam.data.plan import Plan
from fedsam.replica import Replica
from fedsam.tasks import Task
from fedsam.vector import Layout, along

Grad = Callable[[Tensor], Tensor]
Descend = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Local:
    """What a formula may know of the round it runs in.

    Attributes
    ----------
    layout : Layout
        Which part of w is what.
    anchor : Tensor
        The global w of this round, (..., P); never changed.
    round : int or Tensor
        Communication round, from 1; a tensor in a batched cohort.
    lr : float or Tensor
        Learning rate of this round; (K, 1) in a batched cohort.
    """

    layout: Layout
    anchor: Tensor
    round: int | Tensor
    lr: float | Tensor


class Minimizer(Protocol):
    """How a client descends: the classes of ``clients/minimizers/``, or yours."""

    def step(self, w: Tensor, grad: Grad, descend: Descend, local: Local) -> Tensor:
        """Return w (..., P) after one mini-batch; inputs are never changed in place."""
        ...


class Client(Protocol):
    """What a client corrects: the classes of ``clients/``, or yours."""

    def correct(self, w: Tensor, g: Tensor, local: Local) -> Tensor:
        """Return the gradient (..., P) that the base optimiser follows at ``w``."""
        ...


@dataclass(frozen=True)
class Method:
    """A client's side of an algorithm.

    Attributes
    ----------
    minimizer, client
        The two client axes.
    momentum : float or Tensor
        Of the base SGD; the velocity starts from zero in every round.
    weight_decay : float or Tensor
        Coupled l2 coefficient: added to the gradient as ``weight_decay * w``.

    A tensor is (K, 1): a cohort may hold clients of several runs.
    """

    minimizer: Minimizer
    client: Client
    momentum: float | Tensor = 0.0
    weight_decay: float | Tensor = 0.0

    @property
    def has_momentum(self) -> bool:
        """Whether any client keeps a velocity."""
        return isinstance(self.momentum, Tensor) or self.momentum > 0


class Descent:
    """PyTorch's SGD on a flat vector: ``v <- m v + g + decay w``, ``w <- w - lr v``."""

    def __init__(self, method: Method, local: Local) -> None:
        self.method = method
        self.local = local
        self.velocity: Tensor | None = None

    def __call__(self, w: Tensor, g: Tensor) -> Tensor:
        """Return w after one step along ``g``."""
        method = self.method
        g = along(method.client.correct(w, g, self.local), method.weight_decay, w)
        if method.has_momentum:
            g = g if self.velocity is None else along(g, method.momentum, self.velocity)
            self.velocity = g
        return along(w, -self.local.lr, g)


def mean_loss(task: Task, output: Tensor, batch: Batch) -> Tensor:
    """Return the mean loss of a mini-batch, mixed and masked as it says."""
    losses = task.loss(output, batch.targets)
    if batch.mixed_targets is not None:
        mixed = task.loss(output, batch.mixed_targets)
        losses = batch.lam * losses + (1 - batch.lam) * mixed
    if batch.valid is None:
        return losses.mean()
    return torch.where(batch.valid, losses, 0).sum() / batch.valid.sum().clamp(min=1)


class MiniBatch:
    """The closure ``grad`` of one step; ``loss`` is the mean loss where it was called first."""

    def __init__(self, replica: Replica, task: Task, batch: Batch) -> None:
        self.replica = replica
        self.task = task
        self.batch = batch
        self.loss: Tensor | None = None

    def __call__(self, w: Tensor) -> Tensor:
        """Return the gradient (P,) of the mini-batch loss at ``w``."""
        loss, gradient = self.replica.gradient(
            w, self.batch.images, lambda output: mean_loss(self.task, output, self.batch)
        )
        if self.loss is None:
            self.loss = loss
        return gradient


def train_client(
    replica: Replica,
    state: Tensor,
    plan: Plan,
    images: Images,
    task: Task,
    method: Method,
    *,
    round: int,
    lr: float,
) -> tuple[Tensor, float]:
    """Train one client for one round.

    Parameters
    ----------
    replica : Replica
        The model to compute with; what it held before does not matter.
    state : Tensor
        The global state (S,); never changed.
    plan : Plan
        The mini-batches, on the images' device.
    images : Images
        The training set.
    task : Task
        What the model's output means.
    method : Method
        Minimiser, client and base optimiser.
    round : int
        Communication round, from 1.
    lr : float
        Learning rate of this round.

    Returns
    -------
    state : Tensor
        The client's new state (S,).
    loss : float
        Mean loss over the plan's mini-batches, each taken before its step; NaN without steps.
    """
    layout = replica.layout
    if not len(plan):
        return state, float("nan")
    replica.module.train()
    replica.load(state)
    w = state[: layout.trainable]
    local = Local(layout, anchor=w, round=round, lr=lr)
    descend = Descent(method, local)
    losses = []
    for step in range(len(plan)):
        grad = MiniBatch(replica, task, images.batch(plan, step))
        w = method.minimizer.step(w, grad, descend, local)
        if grad.loss is not None:
            losses.append(grad.loss)
    trained = torch.cat([w, replica.carried()])
    return trained, torch.stack(losses).mean().item() if losses else float("nan")
