"""The local loop: a client's round as minimizer steps over its plan."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fedsam.data.images import Batch, Images
from fedsam.data.plan import Plan
from fedsam.tasks import Task
from fedsam.training.flat_module import FlatModule
from fedsam.training.gradient import Gradients, MiniBatch
from fedsam.training.method import Local, Loss, Method, Vectors, zeros


class Result(NamedTuple):
    """What one client returns: its state (S,), images it trained on, steps it took, mean loss.

    ``memory`` is for its next round, ``reply`` goes to the server beside the state.
    """

    state: Tensor
    examples: int
    steps: int
    loss: float
    memory: Vectors
    reply: Vectors


class Step(NamedTuple):
    """What a mini-batch led to: w (..., P), both states, and its loss (...,) if it was taken."""

    w: Tensor
    state: Vectors
    base: Vectors
    loss: Tensor | None


class Stepper(Protocol):
    """What does one step as ``one_step`` does it."""

    def __call__(
        self,
        method: Method,
        gradients: Gradients,
        batch: Batch,
        w: Tensor,
        local: Local,
        base: Vectors,
    ) -> Step:
        """Return what a mini-batch led to."""
        ...


def one_step(
    method: Method, gradients: Gradients, batch: Batch, w: Tensor, local: Local, base: Vectors
) -> Step:
    """Do one step of one client, or of K; nothing that was given is changed."""
    grad = MiniBatch(gradients, batch, method)
    return Step(*method.step(w, grad, local, base), grad.loss)


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
    examples: int = 0,
    drawing: Callable[[int], AbstractContextManager[None]] = lambda step: nullcontext(),
    advance: Stepper = one_step,
) -> Result:
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
        Minimizer, correction, loss and base optimiser.
    round : int
        Communication round, from 1.
    lr : float
        Learning rate of this round.
    memory, sent : mapping, optional
        What the client kept from its last round, and what the server sent beside the state.
    examples : int
        Images that the plan was made of; only handed on.
    drawing : callable
        From a step to what its forward passes run in: all of one step draw the same numbers.
    advance : callable
        Does a step.

    Returns
    -------
    Result
        Its loss is the mean over the plan's mini-batches, each taken before its step; NaN without
        steps.
    """
    layout, method = network.layout, method.at(round)
    network.train()
    network.load(state)
    w = anchor = state[: layout.trainable]
    base: Vectors = method.base_state(w)
    kept: Vectors = method.minimizer_state(w)
    memory = memory or zeros(method.memory, w)
    sent = sent or zeros(method.exchanged, w)
    steps = len(plan)
    if not steps:  # nothing is learnt, kept or sent
        nothing = zeros(method.exchanged, w)
        return Result(state, examples, 0, float("nan"), memory, nothing)

    def gradients(
        step: int, w: Tensor, batch: Batch, loss: Loss, frozen: bool = False
    ) -> tuple[Tensor, Tensor]:
        def value(model: FlatModule) -> Tensor:
            with drawing(step):
                return loss.value(model, batch, task)

        return network.gradient(w, value, frozen=frozen)

    def local(step: int, kept: Vectors) -> Local:
        known = (layout, anchor, round, lr, steps, memory, sent, step)
        return Local(*known, state=MappingProxyType(kept))

    losses = []
    for step, batch in enumerate(images.batches(plan)):
        of_step = partial(gradients, step)
        w, kept, base, loss = advance(method, of_step, batch, w, local(step, kept), base)
        if loss is not None:
            losses.append(loss)
    behind = network.carried()
    trained = torch.cat([w, behind]) if len(behind) else w
    mean = torch.stack(losses).mean().item() if losses else float("nan")
    return Result(trained, examples, steps, mean, *method.finish(w, local(steps - 1, kept)))
