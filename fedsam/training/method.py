"""The contracts of a client's methods, and the method that they make together.

An algorithm sees two closures and nothing of models, batches or devices:

    grad(w)        gradient of this step's mini-batch loss at w, the same batch however often
    descend(w, g)  one step of the base optimiser along g, with the client's correction
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from fedsam.base.errors import UsageError
from fedsam.base.timers import timed
from fedsam.base.vector import Layout, clipped
from fedsam.data.images import Batch
from fedsam.tasks import Task
from fedsam.training.optimizers import adamw, sgd

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
    state : mapping
        The minimizer's own vectors (..., P) by the names in its class's ``state``, as the step
        before returned them: zero in the first step of each round (clients are stateless).
    """

    layout: Layout
    anchor: Tensor
    round: int | Tensor
    lr: float | Tensor
    steps: int | Tensor = 1
    memory: Vectors = field(default_factory=dict)
    sent: Vectors = field(default_factory=dict)
    step: int | Tensor = 0
    state: Vectors = field(default_factory=dict)


class Model(Protocol):
    """The network at the w of a pass, as a loss sees it."""

    def forward(self, images: Tensor) -> Tensor:
        """Return its output for images (B, C, H, W)."""
        ...

    def evaluating(self) -> AbstractContextManager[None]:
        """Return a context in which it is in eval mode and nothing of it changes."""
        ...


class Part:
    """What minimizers, corrections and losses say of themselves; a class names what differs.

    Attributes
    ----------
    needs : tuple of str
        Arguments with a default that are to be filled with the run's value of that name (rho, eta,
        rounds, momentum, ...), as arguments without one are.
    memory : tuple of str
        Names of the vectors (P,) that each client keeps from round to round; zero when it trains
        first.
    exchanged : tuple of str
        Names of the vectors (P,) that travel beside w, both ways; zero in the first round.
    batchable : bool
        Whether it may train K clients as one program. False if it looks at single numbers, draws,
        or takes anything but the last dimension together.
    """

    needs: tuple[str, ...] = ()
    memory: tuple[str, ...] = ()
    exchanged: tuple[str, ...] = ()
    batchable: bool = True

    def at(self, round: int) -> Any:
        """Return who does this one's work in a round: it itself, unless a class says otherwise."""
        return self

    def finish(self, w: Tensor, local: Local) -> Vectors:
        """Return what a round that led to ``w`` (..., P) leaves.

        The new value of every vector in ``memory``, and for each in ``exchanged`` what goes back.
        ``local.state`` is as the last step left it.
        """
        return {}

    def fold(self, sent: Vectors, replies: Sequence[Vectors], share: float) -> Vectors:
        """Return the server's next ``exchanged`` from the last and the cohort's replies.

        ``share`` is the cohort's part of the population.
        """
        return {}


class Minimizer(Part, ABC):
    """How a client descends: the classes of ``clients/minimizers/``, or yours.

    Attributes
    ----------
    state : tuple of str
        Names of the vectors (P,) that it keeps from step to step of a round.
    minimizers : mapping
        Arguments that are minimizers themselves, chosen by name among its options: the default
        name of each. Options that it does not take are theirs.
    """

    state: tuple[str, ...] = ()
    minimizers: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def step(self, w: Tensor, grad: Grad, descend: Descend, local: Local) -> tuple[Tensor, Vectors]:
        """Return w (..., P) after one mini-batch, and the new ``state``: {} where it keeps none.

        Nothing that it was given is changed.
        """


class Ascent(Minimizer):
    """A minimizer whose gradient is taken at w + e, so that others can climb as it does."""

    @abstractmethod
    def perturbation(self, w: Tensor, g: Tensor, local: Local) -> Tensor:
        """Return e (..., P) for the gradient ``g`` at ``w``; no vectors of its own come in."""


class Correction(Part, ABC):
    """What a client corrects: the classes of ``clients/corrections/``, or yours."""

    @abstractmethod
    def correct(self, w: Tensor, g: Tensor, local: Local) -> Tensor:
        """Return the gradient (..., P) that the base optimiser follows at ``w``."""

    def rate(self, local: Local) -> float | Tensor:
        """Return the learning rate of a step: the round's, unless a class says otherwise."""
        return local.lr


class Loss(Part, ABC):
    """What a client minimises: the classes of ``clients/losses/``, or yours.

    Attributes
    ----------
    draws : bool
        Whether it is random: then ``batch.uniform()`` has numbers for it.
    one_answer : bool
        Whether it is for outputs (B, classes) alone, one answer an image.
    """

    draws: bool = False
    one_answer: bool = False

    @abstractmethod
    def value(self, model: Model, batch: Batch, task: Task) -> Tensor:
        """Return the mean loss of one client's mini-batch, a scalar; a pure function of w."""


@dataclass(frozen=True)
class Method:
    """A client's side of an algorithm.

    Attributes
    ----------
    minimizer, correction
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
    clip_gradient : float or Tensor
        l2 norm that a corrected gradient is scaled down to, before weight decay; 0: none.
    loss : Loss
        What is minimised.
    least : int
        Images that the model needs in a mini-batch, and in each part of one.

    A tensor is (K, 1): a cohort may hold clients of several runs.
    """

    minimizer: Minimizer
    correction: Correction
    momentum: float | Tensor = 0.0
    weight_decay: float | Tensor = 0.0
    optimizer: str = "sgd"
    decay_in_loss: bool = False
    first_pass_statistics: bool = False
    clip_gradient: float | Tensor = 0.0
    _: KW_ONLY
    loss: Loss
    least: int = 1

    def __post_init__(self) -> None:
        for axis, part in self.axes.items():
            if problem := inconsistency(part):
                raise UsageError(f"{axis} {type(part).__name__}: {problem}")
        for names in (self.memory, self.exchanged):
            if len(set(names)) < len(names):
                parts = ", ".join(
                    f"{axis} {type(part).__name__}" for axis, part in self.axes.items()
                )
                raise UsageError(f"{parts}: two have a vector of one name: {', '.join(names)}")

    @property
    def axes(self) -> dict[str, Part]:
        """The parts, by the flags that choose them."""
        return {"--minimizer": self.minimizer, "--client": self.correction, "--loss": self.loss}

    @property
    def memory(self) -> tuple[str, ...]:
        """Names of the vectors that a client keeps."""
        return tuple(name for part in self.axes.values() for name in part.memory)

    @property
    def exchanged(self) -> tuple[str, ...]:
        """Names of the vectors that travel beside w."""
        return tuple(name for part in self.axes.values() for name in part.exchanged)

    def at(self, round: int) -> "Method":
        """Return the method of this round: a part may have others do its work by round."""
        minimizer, correction = self.minimizer.at(round), self.correction.at(round)
        loss = self.loss.at(round)
        if (minimizer, correction, loss) == (self.minimizer, self.correction, self.loss):
            return self
        method = replace(self, minimizer=minimizer, correction=correction, loss=loss)
        for names, others in ((self.memory, method.memory), (self.exchanged, method.exchanged)):
            if names != others:
                raise UsageError(f"round {round}: vectors {others} in place of {names}")
        return method

    def base_state(self, like: Tensor) -> dict[str, Tensor]:
        """Return what the base optimiser keeps in a round, at its start."""
        if self.optimizer == "adamw":
            # 0-dim: in float64 without making the others so, else 1 - 0.999 would be 1e-5 off
            t = torch.zeros((), dtype=torch.float64, device=like.device)
            return {**zeros(["m", "v"], like), "t": t}
        has_momentum = isinstance(self.momentum, Tensor) or self.momentum > 0
        return zeros(["velocity"] if has_momentum else [], like)

    def minimizer_state(self, like: Tensor) -> dict[str, Tensor]:
        """Return what the minimizer keeps in a round, at its start."""
        return zeros(self.minimizer.state, like)

    @timed("minimizer, client and SGD")
    def step(
        self, w: Tensor, grad: Grad, local: Local, base: Vectors
    ) -> tuple[Tensor, Vectors, Vectors]:
        """Return w after one mini-batch, the minimizer's state, and the base optimiser's."""
        descend = Descent(self, local, base)
        stepped = self.minimizer.step(w, grad, descend, local)
        if not isinstance(stepped, tuple) or set(stepped[1]) != set(self.minimizer.state):
            names = ", ".join(self.minimizer.state)
            raise UsageError(
                f"--minimizer {type(self.minimizer).__name__}: step must return w and its state, "
                f"a mapping with the names {{{names}}}"
            )
        return *stepped, descend.state

    def finish(self, w: Tensor, local: Local) -> tuple[Vectors, Vectors]:
        """Return what clients keep, and what they send back beside w."""
        memory: dict[str, Tensor] = {}
        reply: dict[str, Tensor] = {}
        for part in self.axes.values():
            new = part.finish(w, local)
            memory |= {name: new[name] for name in part.memory}
            reply |= {name: new[name] for name in part.exchanged}
        return memory, reply

    def fold(self, sent: Vectors, replies: Sequence[Vectors], share: float) -> Vectors:
        """Return what the server sends next beside w."""
        parts = [part.fold(sent, replies, share) for part in self.axes.values()]
        return {name: vector for vectors in parts for name, vector in vectors.items()}


class Descent:
    """The closure ``descend`` of one step: correction, clipping, a step of the base optimiser.

    Attributes
    ----------
    state : mapping
        The base optimiser's, newest: by default as at the start of a round. A call replaces it.
    """

    def __init__(self, method: Method, local: Local, state: Vectors | None = None) -> None:
        self.method = method
        self.local = local
        self.state = method.base_state(local.anchor) if state is None else state

    def __call__(self, w: Tensor, g: Tensor) -> Tensor:
        """Return w after one step along ``g``."""
        method, lr = self.method, self.method.correction.rate(self.local)
        g = method.correction.correct(w, g, self.local)
        if isinstance(method.clip_gradient, Tensor) or method.clip_gradient > 0:
            g = clipped(g, method.clip_gradient)
        decay = 0.0 if method.decay_in_loss else method.weight_decay
        if method.optimizer == "adamw":
            w, self.state = adamw(w, g, lr, self.state, weight_decay=decay)
        else:
            w, self.state = sgd(
                *(w, g, lr, self.state),
                momentum=method.momentum,
                weight_decay=decay,
                nesterov=method.optimizer == "nesterov",
            )
        return w


def inconsistency(part: Part) -> str:
    """Return what a part says of its vectors that does not go together; "" if all does."""
    cls = type(part)
    for attribute in ("memory", "exchanged"):
        if isinstance(vars(cls).get(attribute), str):
            return f"{attribute} must be a tuple of names, got {vars(cls)[attribute]!r}"
    finishes, folds = cls.finish is not Part.finish, cls.fold is not Part.fold
    if (part.memory or part.exchanged) and not finishes:
        return "keeps or exchanges vectors, so it must define finish"
    if part.exchanged and not folds:
        return "exchanges vectors, so it must define fold"
    if finishes and not (part.memory or part.exchanged):
        return "defines finish, but names no vectors in memory or exchanged"
    if folds and not part.exchanged:
        return "defines fold, but names no vectors in exchanged"
    return ""


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


def zeros(names: Sequence[str], like: Tensor) -> dict[str, Tensor]:
    """Return a vector of zeros for each name."""
    return {name: torch.zeros_like(like) for name in names}
