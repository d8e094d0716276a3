"""Loss and error at many points of parameter space: what surfaces, planes and lines are made of."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fedsam.base.errors import UsageError
from fedsam.base.randomness import torch_generator
from fedsam.base.vector import weighted_mean
from fedsam.flatness.objective import full_precision
from fedsam.flatness.sampling import errors_of_images, parts_of
from fedsam.flatness.subject import Subject, Tick, silent
from fedsam.runs.metrics import LOSS
from fedsam.tasks import headline_of
from fedsam.training import batchnorm

Named = tuple[str, Subject]
Set = Literal["train", "test"]
Rows = Mapping[Set, Tensor]
Scalars = Callable[[dict[str, list[float]]], dict[str, float]]  # from values by name
BN_BATCH = 500  # images whose statistics are averaged with those of the next


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


@dataclass(frozen=True)
class Curves:
    """Loss and error of many models.

    Attributes
    ----------
    whole : dict
        ``train_loss`` and ``test_loss`` in nats, ``train_error`` and ``test_error`` in [0, 1], one
        value a model.
    parts : dict
        The same on disjoint parts of the images, a list of values for each part.
    sizes, population : dict
        Of "train" and "test": images of each part, and how many they were drawn from.
    """

    whole: dict[str, list[float]]
    parts: dict[str, list[list[float]]]
    sizes: Mapping[Set, list[int]]
    population: Mapping[Set, int]

    def summarised(self, scalars_of: Scalars) -> dict[str, dict[str, Any]]:
        """Return ``scalars``, a function of ``whole``, and their ``errors`` by sampling images."""
        scalars = scalars_of(self.whole)
        errors: dict[str, float] = {}
        for on, sizes in self.sizes.items():
            of_set = [name for name in self.parts if name.startswith(on)]
            of_parts = [
                scalars_of(self.whole | {name: self.parts[name][part] for name in of_set})
                for part in range(len(sizes))
            ]
            own = {name: value for name, value in scalars.items() if name.startswith(on)}
            errors |= errors_of_images(own, of_parts, sizes, self.population[on])
        return {"scalars": scalars, "errors": {"images": errors}}


def evaluate(
    subject: Subject,
    states: Iterable[Tensor],
    total: int,
    rows: Rows,
    tick: Tick = silent,
    *,
    update_bn: int = 0,
) -> Curves:
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
    update_bn : int
        Training images on which each model's BatchNorm statistics are computed anew first, a keyed
        sample; 0: they are those of the state.

    Raises
    ------
    UsageError
        If there is no BatchNorm to update.
    """
    sets = {"train": subject.train, "test": subject.test}
    population = {on: len(sets[on]) for on in rows}
    parts = {on: parts_of(chosen, len(sets[on]), subject.seed) for on, chosen in rows.items()}
    whole: dict[str, list[float]] = {}
    by_part: dict[str, list[list[float]]] = {}
    renewed = bn_updater(subject, update_bn)
    for done, state in enumerate(states, 1):
        model = subject.with_state(renewed(state))
        for on, pieces in parts.items():
            objectives = [model.objective(on, piece) for piece in pieces]
            totals = [objective.statistics(objective.w) for objective in objectives]
            for name, value in loss_and_error(subject, torch.stack(totals).sum(0)).items():
                whole.setdefault(f"{on}_{name}", []).append(value)
            for number, statistics in enumerate(totals):
                for name, value in loss_and_error(subject, statistics).items():
                    lists = by_part.setdefault(f"{on}_{name}", [[] for _ in pieces])
                    lists[number].append(value)
        tick(done, total)
    sizes = {on: [len(piece) for piece in pieces] for on, pieces in parts.items()}
    return Curves(whole, by_part, sizes, population)


def loss_and_error(subject: Subject, statistics: Tensor) -> dict[str, float]:
    """Return the loss in nats, and 1 - headline, from a task's statistics (D,)."""
    metrics = subject.task.metrics(statistics)
    return {"loss": metrics[LOSS], "error": 1 - metrics[headline_of(subject.task)]}


def bn_updater(subject: Subject, images: int) -> Callable[[Tensor], Tensor]:
    """Return what computes a state's BatchNorm statistics anew on training images; 0: nothing.

    Jordan et al. (REPAIR, ICLR 2023, arXiv 2211.08403): interpolated statistics are too small
    between models whose units differ, and inflate barriers.
    """
    if images < 0:
        raise UsageError(f"--update-bn {images}: must be a number of images, or 0 to keep them")
    if not images:
        return lambda state: state
    network = subject.network
    if not batchnorm.layers(network.module):
        raise UsageError(f"--update-bn {images}: the model has no BatchNorm")
    generator = torch_generator(subject.seed, "measure bn")
    rows = torch.randperm(len(subject.train), generator=generator)[:images]
    batches = rows.to(network.layout.device).tensor_split(math.ceil(len(rows) / BN_BATCH))

    def renewed(state: Tensor) -> Tensor:
        with full_precision(network.layout.device):
            each = [
                batchnorm.of_batch(network, state, subject.train.rows(batch).images)
                for batch in batches
            ]
        return batchnorm.updated(state, each, network.layout)

    return renewed


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
        for ours, others in ((first.train, subject.train), (first.test, subject.test)):
            told = (ours.targets, ours.classes), (others.targets, others.classes)
            if len(ours) != len(others) or not all(map(torch.equal, *told)):
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


def folded(values: Sequence[float], length: int) -> list[list[float]]:
    """Return values in lists of this length."""
    return [list(values[i : i + length]) for i in range(0, len(values), length)]
