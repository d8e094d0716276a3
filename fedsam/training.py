"""THE local loop, written once: a client's round as minimiser steps over its plan.

An algorithm sees two closures and nothing of models, batches or devices:

    grad(w)        gradient of this step's mini-batch loss at w, the same batch however often
    descend(w, g)  one step of SGD along g, with the client's correction, momentum, weight decay
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from fedsam.data.images import Batch, Images
from fedsam.data.plan import Plan
from fedsam.errors import UsageError
from fedsam.replica import Replica
from fedsam.tasks import Task
from fedsam.vector import Layout, along

Vectors = Mapping[str, Tensor]
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
    steps : int or Tensor
        Mini-batches of this client's round; (K, 1) in a batched cohort.
    memory : mapping
        The vectors (..., P) that the client remembers, by the names in its class's ``memory``.
    sent : mapping
        The vectors (..., P) that the server sent beside w, by the names in ``exchanged``.
    """

    layout: Layout
    anchor: Tensor
    round: int | Tensor
    lr: float | Tensor
    steps: int | Tensor = 1
    memory: Vectors = field(default_factory=dict)
    sent: Vectors = field(default_factory=dict)


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


@runtime_checkable
class Remembering(Client, Protocol):
    """A client that keeps vectors from round to round, or exchanges some with the server.

    Attributes
    ----------
    memory : tuple of str
        Names of the vectors (P,) that each client keeps; zero when it trains first.
    exchanged : tuple of str
        Names of the vectors (P,) that travel beside w, both ways; zero in the first round.
    """

    memory: tuple[str, ...]
    exchanged: tuple[str, ...]

    def finish(self, w: Tensor, local: Local) -> Vectors:
        """Return what a round that led to ``w`` (..., P) leaves.

        The new value of every vector in ``memory``, and for each in ``exchanged`` what goes back.
        """
        ...

    def fold(self, sent: Vectors, replies: Sequence[Vectors], share: float) -> Vectors:
        """Return the server's next ``exchanged`` from the last and the cohort's replies.

        ``share`` is the cohort's part of the population.
        """
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

    def __post_init__(self) -> None:
        needed = {"memory", "exchanged", "finish", "fold"}
        missing = needed - set(dir(self.client))
        if missing and missing != needed:
            raise UsageError(
                f"--client {type(self.client).__name__}: a client that remembers or "
                f"exchanges vectors also needs {', '.join(sorted(missing))}"
            )

    @property
    def has_momentum(self) -> bool:
        """Whether any client keeps a velocity."""
        return isinstance(self.momentum, Tensor) or self.momentum > 0

    @property
    def memory(self) -> tuple[str, ...]:
        """Names of the vectors that a client keeps."""
        return self.client.memory if isinstance(self.client, Remembering) else ()

    @property
    def exchanged(self) -> tuple[str, ...]:
        """Names of the vectors that travel beside w."""
        return self.client.exchanged if isinstance(self.client, Remembering) else ()

    def finish(self, w: Tensor, local: Local) -> tuple[Vectors, Vectors]:
        """Return what clients keep, and what they send back beside w."""
        if not isinstance(self.client, Remembering):
            return {}, {}
        new = self.client.finish(w, local)
        return {name: new[name] for name in self.memory}, {n: new[n] for n in self.exchanged}


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


class LocalRound(NamedTuple):
    """A client's round: its new state (S,), mean loss, what it keeps, and what it sends beside."""

    state: Tensor
    loss: float
    memory: Vectors
    reply: Vectors


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
    memory: Vectors | None = None,
    sent: Vectors | None = None,
) -> LocalRound:
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
    memory, sent : mapping, optional
        What the client kept from its last round, and what the server sent beside the state.

    Returns
    -------
    LocalRound
        Its loss is the mean over the plan's mini-batches, each taken before its step; NaN without
        steps.
    """
    layout = replica.layout
    replica.module.train()
    replica.load(state)
    w = state[: layout.trainable]
    local = Local(layout, w, round, lr, len(plan), memory or {}, sent or {})
    if not len(plan):  # nothing is learnt, kept or sent
        return LocalRound(state, float("nan"), local.memory, zeros(method.exchanged, w))
    descend = Descent(method, local)
    losses = []
    for step in range(len(plan)):
        grad = MiniBatch(replica, task, images.batch(plan, step))
        w = method.minimizer.step(w, grad, descend, local)
        if grad.loss is not None:
            losses.append(grad.loss)
    trained = torch.cat([w, replica.carried()])
    loss = torch.stack(losses).mean().item() if losses else float("nan")
    return LocalRound(trained, loss, *method.finish(w, local))


def zeros(names: Sequence[str], like: Tensor) -> dict[str, Tensor]:
    """Return a vector of zeros for each name."""
    return {name: torch.zeros_like(like) for name in names}
