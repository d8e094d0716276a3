"""The contracts of a client's methods, and the method that they make together.

An algorithm sees two closures and nothing of models, batches or devices:

    grad(w)        gradient of this step's mini-batch loss at w, the same batch however often
    descend(w, g)  one step of the base optimiser along g, with the client's correction
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fedsam.base.errors import UsageError
from fedsam.base.vector import Layout
from fedsam.data.images import Batch
from fedsam.training.gradient import Gradients, Loss, MiniBatch, Plain
from fedsam.training.optimizers import State, adamw, sgd

Vectors = Mapping[str, Tensor]
Descend = Callable[[Tensor, Tensor], Tensor]


class Grad(Protocol):
    """The gradient of this step's mini-batch loss."""

    def __call__(self, w: Tensor) -> Tensor:
        """Return it at ``w`` (..., P)."""
        ...

    def parts(self, size: int) -> "Sequence[tuple[float | Tensor, Grad]]":
        """Return sub-batches of ``size`` examples: each one's share of them, and its gradient."""
        ...


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
    step : int or Tensor
        Mini-batches of this round before this one; a tensor in a batched cohort.
    state : mutable mapping
        The minimiser's own vectors (..., P) by the names in its class's ``state``: zero in the
        first step of each round (clients are stateless); a step puts its new ones there.
    """

    layout: Layout
    anchor: Tensor
    round: int | Tensor
    lr: float | Tensor
    steps: int | Tensor = 1
    memory: Vectors = field(default_factory=dict)
    sent: Vectors = field(default_factory=dict)
    step: int | Tensor = 0
    state: State = field(default_factory=dict)


class Minimizer(Protocol):
    """How a client descends: the classes of ``clients/minimizers/``, or yours.

    One that keeps vectors from step to step of a round names them in ``state``, a tuple of str.
    One that stands for another names it in ``at(round)``.
    """

    def step(self, w: Tensor, grad: Grad, descend: Descend, local: Local) -> Tensor:
        """Return w (..., P) after one mini-batch; inputs are never changed in place."""
        ...


class Client(Protocol):
    """What a client corrects: the classes of ``clients/``, or yours."""

    def correct(self, w: Tensor, g: Tensor, local: Local) -> Tensor:
        """Return the gradient (..., P) that the base optimiser follows at ``w``."""
        ...


@runtime_checkable
class Remembering(Protocol):
    """What a client or a minimiser adds to keep vectors, or to exchange some with the server.

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
        ``local.state`` is as the last step left it.
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
        Coupled l2 coefficient: added to the gradient as ``weight_decay * w``. AdamW's is decoupled.
    optimizer : str
        The base optimiser: sgd, nesterov or adamw; its state starts from zero in every round.
    decay_in_loss : bool
        Let ``grad`` hold the weight decay, so that it enters ascents, too; else only descents.
    first_pass_statistics : bool
        Keep the BatchNorm statistics of a step's first pass only; else each pass updates them.
    loss : Loss
        What is minimised.

    A tensor is (K, 1): a cohort may hold clients of several runs.
    """

    minimizer: Minimizer
    client: Client
    momentum: float | Tensor = 0.0
    weight_decay: float | Tensor = 0.0
    optimizer: str = "sgd"
    decay_in_loss: bool = False
    first_pass_statistics: bool = False
    loss: Loss = field(default_factory=Plain)

    def __post_init__(self) -> None:
        needed = {"memory", "exchanged", "finish", "fold"}
        for axis, part in (("minimizer", self.minimizer), ("client", self.client)):
            missing = needed - set(dir(part))
            if missing and missing != needed:
                raise UsageError(
                    f"--{axis} {type(part).__name__}: a {axis} that remembers or "
                    f"exchanges vectors also needs {', '.join(sorted(missing))}"
                )
        for names in (self.memory, self.exchanged):
            if len(set(names)) < len(names):
                raise UsageError(
                    f"--minimizer {type(self.minimizer).__name__}, --client "
                    f"{type(self.client).__name__}: both have a vector of one name: "
                    f"{', '.join(names)}"
                )

    def mini_batch(self, gradients: Gradients, batch: Batch) -> MiniBatch:
        """Return the closure ``grad`` of one step."""
        decay = self.weight_decay if self.decay_in_loss else None
        return MiniBatch(
            gradients,
            batch,
            self.loss,
            decay,
            first_pass_statistics=self.first_pass_statistics,
        )

    def at(self, round: int) -> "Method":
        """Return the method of this round: minimiser and loss may stand for others by round."""
        minimizer, loss = _at(self.minimizer, round), _at(self.loss, round)
        if minimizer is self.minimizer and loss is self.loss:
            return self
        return replace(self, minimizer=minimizer, loss=loss)

    def base_state(self, like: Tensor) -> dict[str, Tensor]:
        """Return what the base optimiser keeps in a round, at its start."""
        if self.optimizer == "adamw":
            # 0-dim: in float64 without making the others so, else 1 - 0.999 would be 1e-5 off
            t = torch.zeros((), dtype=torch.float64, device=like.device)
            return {**zeros(["m", "v"], like), "t": t}
        has_momentum = isinstance(self.momentum, Tensor) or self.momentum > 0
        return zeros(["velocity"] if has_momentum else [], like)

    def minimizer_state(self, like: Tensor) -> dict[str, Tensor]:
        """Return what the minimiser keeps in a round, at its start."""
        return zeros(getattr(self.minimizer, "state", ()), like)

    @property
    def remembering(self) -> list[Remembering]:
        """Which of the two axes keep or exchange vectors."""
        return [part for part in (self.minimizer, self.client) if isinstance(part, Remembering)]

    @property
    def memory(self) -> tuple[str, ...]:
        """Names of the vectors that a client keeps."""
        return tuple(name for part in self.remembering for name in part.memory)

    @property
    def exchanged(self) -> tuple[str, ...]:
        """Names of the vectors that travel beside w."""
        return tuple(name for part in self.remembering for name in part.exchanged)

    def step(self, w: Tensor, grad: Grad, local: Local, base: State) -> Tensor:
        """Return w after one mini-batch; ``base`` is the base optimiser's state."""
        return self.minimizer.step(w, grad, Descent(self, local, base), local)

    def finish(self, w: Tensor, local: Local) -> tuple[Vectors, Vectors]:
        """Return what clients keep, and what they send back beside w."""
        kept: dict[str, Tensor] = {}
        sent: dict[str, Tensor] = {}
        for part in self.remembering:
            new = part.finish(w, local)
            kept |= {name: new[name] for name in part.memory}
            sent |= {name: new[name] for name in part.exchanged}
        return kept, sent

    def fold(self, sent: Vectors, replies: Sequence[Vectors], share: float) -> Vectors:
        """Return what the server sends next beside w."""
        parts = [part.fold(sent, replies, share) for part in self.remembering if part.exchanged]
        return {name: vector for vectors in parts for name, vector in vectors.items()}


class Descent:
    """The closure ``descend``: the client's correction, then a step of the base optimiser.

    ``state`` is the base optimiser's, from the start of the round on.
    """

    def __init__(self, method: Method, local: Local, state: State | None = None) -> None:
        self.method = method
        self.local = local
        self.state = method.base_state(local.anchor) if state is None else state

    def __call__(self, w: Tensor, g: Tensor) -> Tensor:
        """Return w after one step along ``g``."""
        method, lr = self.method, self.local.lr
        g = method.client.correct(w, g, self.local)
        decay = 0.0 if method.decay_in_loss else method.weight_decay
        if method.optimizer == "adamw":
            return adamw(w, g, lr, self.state, weight_decay=decay)
        nesterov, momentum = method.optimizer == "nesterov", method.momentum
        return sgd(w, g, lr, self.state, momentum=momentum, weight_decay=decay, nesterov=nesterov)


def rounds_before(start: float, rounds: int) -> int:
    """Return how many rounds lie before a switch at ``start``.

    A float up to 1.0 is a fraction of ``rounds``, anything else their number.

    Raises
    ------
    ValueError
        If it is negative.
    """
    if start < 0:
        raise ValueError(f"start: must be at least 0, got {start}")
    return int(start * rounds) if isinstance(start, float) and start <= 1 else int(start)


def _at(part: Any, round: int) -> Any:
    """Return what stands for a minimiser or loss in a round."""
    while (at := getattr(part, "at", None)) and (other := at(round)) is not part:
        part = other
    return part


def zeros(names: Sequence[str], like: Tensor) -> dict[str, Tensor]:
    """Return a vector of zeros for each name."""
    return {name: torch.zeros_like(like) for name in names}
