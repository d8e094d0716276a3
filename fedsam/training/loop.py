"""The local loop: a client's round as minimiser steps over its plan."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fedsam.data.images import Batch, Images
from fedsam.data.plan import Plan
from fedsam.tasks import Task
from fedsam.training.flat_module import FlatModule
from fedsam.training.gradient import Loss
from fedsam.training.method import Local, Method, Vectors, zeros


class LocalRound(NamedTuple):
    """A client's round: its new state (S,), mean loss, what it keeps, and what it sends beside."""

    state: Tensor
    loss: float
    memory: Vectors
    reply: Vectors


def train_client(
    network: FlatModule,
    state: Tensor,
    plan: Plan,
    images: Images,
    task: Task,
    method: Method,
    *,
    round: int,
    lr: float,
    memory: Vectors | None = None,
    sent: Vectors | None = None,
) -> LocalRound:
    """Train one client for one round.

    Parameters
    ----------
    network : FlatModule
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
    memory, sent : mapping, optional
        What the client kept from its last round, and what the server sent beside the state.

    Returns
    -------
    LocalRound
        Its loss is the mean over the plan's mini-batches, each taken before its step; NaN without
        steps.
    """
    layout, method = network.layout, method.at(round)
    network.module.train()
    network.load(state)
    w = state[: layout.trainable]
    kept = method.minimizer_state(w)
    local = Local(layout, w, round, lr, len(plan), memory or {}, sent or {}, state=kept)
    if not len(plan):  # nothing is learnt, kept or sent
        return LocalRound(state, float("nan"), local.memory, zeros(method.exchanged, w))

    def gradients(
        w: Tensor, batch: Batch, loss: Loss, frozen: bool = False
    ) -> tuple[Tensor, Tensor]:
        return network.gradient(w, lambda model: loss.value(model, batch, task), frozen=frozen)

    base = method.base_state(w)
    losses = []
    for step in range(len(plan)):
        local = replace(local, step=step)
        grad = method.mini_batch(gradients, images.batch(plan, step))
        w = method.step(w, grad, local, base)
        if grad.loss is not None:
            losses.append(grad.loss)
    trained = torch.cat([w, network.carried()])
    loss = torch.stack(losses).mean().item() if losses else float("nan")
    return LocalRound(trained, loss, *method.finish(w, local))
