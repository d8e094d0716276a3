"""Loss and error at many points of parameter space: what surfaces, planes and lines are made of."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fedsam.base.errors import UsageError
from fedsam.base.vector import weighted_mean
from fedsam.flatness.subject import Subject, Tick, silent

Named = tuple[str, Subject]
Rows = Mapping[Literal["train", "test"], Tensor]


class Limited:
    """Tells somebody how far a measure is, and ends one that will take too long.

    Parameters
    ----------
    seconds : float
        A measure may take, from the making of this object.
    tick : callable
        Is told each time.
    clock : callable
        Returns the time in seconds.
    """

    def __init__(
        self, seconds: float, tick: Tick = silent, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.seconds = seconds
        self.tick = tick
        self.clock = clock
        self.began = clock()
        self.first = 0.0  # seconds to the first point

    def __call__(self, done: int, total: int) -> None:
        """Say it, and reckon how long it will take; the first point alone may be slower.

        Raises
        ------
        UsageError
            If at this rate the whole takes longer than it may.
        """
        self.tick(done, total)
        elapsed = self.clock() - self.began
        if done == 1:
            self.first = expected = elapsed
        else:
            expected = self.first + (elapsed - self.first) / (done - 1) * (total - 1)
        if expected > self.seconds:
            raise UsageError(
                f"{total} points take about {expected:.0f} s, and may take {self.seconds:g} s: "
                "fewer points or images will do"
            )


def samples(subject: Subject, images: int) -> Rows:
    """Return which images are looked at: at most so many of each set, drawn by the seed; 0: all."""
    return {"train": subject.sample("train", images), "test": subject.sample("test", images)}


def evaluate(
    subject: Subject, states: Iterable[Tensor], total: int, rows: Rows, tick: Tick = silent
) -> dict[str, list[float]]:
    """Return loss and error of many models.

    Parameters
    ----------
    subject : Subject
        Network and data; its own state does not matter.
    states : iterable of Tensor
        States (S,), which are taken one at a time: only one is held.
    total : int
        How many there are.
    rows : mapping
        The images of each set that count.
    tick : callable
        Is told after each model.

    Returns
    -------
    dict
        ``train_loss`` and ``test_loss`` in nats, ``train_error`` and ``test_error`` in [0, 1], one
        value a state.
    """
    found: dict[str, list[float]] = {}
    for done, state in enumerate(states, 1):
        for on, chosen in rows.items():
            objective = subject.with_state(state).objective(on, chosen)
            metrics = objective.metrics(objective.w)
            found.setdefault(f"{on}_loss", []).append(metrics["loss"])
            found.setdefault(f"{on}_error", []).append(1 - metrics["accuracy"])
        tick(done, total)
    return found


def combined(states: Sequence[Tensor], weights: Sequence[float], trainable: int) -> Tensor:
    """Return the affine combination of states (S,), with weights that sum to one.

    What lies behind the P ``trainable`` values (BatchNorm statistics) is combined with the weights
    clipped at zero and scaled to sum to one: a server averages it in that way, and a variance stays
    positive beyond the models, too.
    """
    inside = [max(weight, 0.0) for weight in weights]
    w = weighted_mean([state[:trainable] for state in states], weights)
    return torch.cat([w, weighted_mean([state[trainable:] for state in states], inside)])


def check_alike(subjects: Sequence[Named], wanted: int | None = None) -> None:
    """Raise UsageError unless the models can be combined and are tested on the same data."""
    if wanted is not None and len(subjects) != wanted:
        raise UsageError(f"a plane goes through {wanted} models, got {len(subjects)}")
    if len(subjects) < 2:
        raise UsageError(f"a comparison needs two models or more, got {len(subjects)}")
    name, first = subjects[0]
    for other, subject in subjects[1:]:
        if subject.network.layout != first.network.layout:
            raise UsageError(f"{other}: another network than that of {name}")
        for mine, theirs in ((first.train, subject.train), (first.test, subject.test)):
            if mine.targets.shape != theirs.targets.shape or not bool(
                (mine.targets == theirs.targets).all()
            ):
                raise UsageError(f"{other}: other data than those of {name}")


def distance(u: Tensor, v: Tensor) -> float:
    """Return the l2 distance of two vectors, summed in float64."""
    return float(torch.linalg.vector_norm(u - v, dtype=torch.float64))


def inner(u: Tensor, v: Tensor) -> float:
    """Return the inner product of two vectors, summed in float64."""
    return float(u.double() @ v.double())


def cosine(u: Tensor, v: Tensor) -> float:
    """Return the cosine of two vectors; 0 where one of them is zero."""
    lengths = math.sqrt(inner(u, u) * inner(v, v))
    return inner(u, v) / lengths if lengths else 0.0


def settings_of(subject: Subject, rows: Rows, **more: Any) -> dict[str, Any]:
    """Return what is needed to understand a measure's numbers."""
    images = {on: len(chosen) for on, chosen in rows.items()}
    return {"images": images, "seed": subject.seed, **more}
