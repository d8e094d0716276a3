"""Robustness to adversarial images: the headline (accuracy) under FGSM and PGD."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedsam.base.errors import UsageError
from fedsam.base.randomness import torch_generator
from fedsam.data.images import Batch
from fedsam.flatness.measures.evaluation import Headlines, Sample
from fedsam.flatness.objective import full_precision
from fedsam.flatness.subject import Subject
from fedsam.training.attack import Attack, drawn_in_ball
from fedsam.training.evaluation import statistics

STEP = 2.5  # of eps / steps: Madry et al.'s choice, which can reach and walk along the border
CHUNK = 250  # images at a time


def adversarial(
    subject: Subject,
    *,
    linf: Sequence[float] = (1, 2, 4, 8),
    l2: Sequence[float] = (32, 64, 128),
    steps: int = 10,
    images: int = 1000,
) -> dict[str, Any]:
    """Return the headline on test images under attacks that know the model.

    In eval mode. PGD starts at a
    random point of the ball, the same one (scaled) for every eps, and takes ``steps`` steps of
    2.5 eps / steps; the last image counts.

    Parameters
    ----------
    subject : Subject
        The model.
    linf, l2 : sequence of float
        Radii in 255ths of the pixel range.
    steps : int
        Of PGD.
    images : int
        Test images, a keyed sample; 0 for all.

    Returns
    -------
    dict
        ``scalars``: the headline, such as ``accuracy``, and ``accuracy_ATTACK_EPS`` for fgsm,
        pgd_linf, pgd_l2.
        ``accuracies``: the same by attack and eps. ``settings``.
    """
    if steps < 1 or min(*linf, *l2, 0) < 0:
        raise UsageError("adversarial: steps must be 1 at least, and radii not negative")

    attacks: dict[str, tuple[Callable[[float], Attack], Sequence[float]]] = {
        "fgsm": (lambda eps: Attack(eps, eps, 1), linf),
        "pgd_linf": (lambda eps: Attack(eps, STEP * eps / steps, steps), linf),
        "pgd_l2": (lambda eps: Attack(eps, STEP * eps / steps, steps, "l2"), l2),
    }
    test = Sample.of(subject, images)
    by_attack = {
        name: {
            f"{eps:g}": headlines_under(subject, attack(eps), test, random_start=name != "fgsm")
            for eps in radii
        }
        for name, (attack, radii) in attacks.items()
    }
    named = {
        f"{test.headline}_{name}_{eps}": values
        for name, by_eps in by_attack.items()
        for eps, values in by_eps.items()
    }
    result = test.result(
        {test.headline: test.headlines_at(subject.w), **named},
        eps="radius in 255ths of the pixel range, after which pixels are clipped to [0, 255]",
        steps=steps,
        step=f"{STEP:g} eps / steps",
        start="fgsm: the image; pgd: uniform in the ball",
    )
    headlines = {
        name: {eps: float(values[0]) for eps, values in by_eps.items()}
        for name, by_eps in by_attack.items()
    }
    return {**result, "accuracies": headlines}


def headlines_under(
    subject: Subject, attack: Attack, test: Sample, *, random_start: bool
) -> Headlines:
    """Return the headline on test images, each attacked first, of all and of each part."""
    network, task, images = subject.network, subject.task, subject.test
    network.load(subject.state)
    network.module.eval()
    generator = torch_generator(subject.seed, "attack")

    def attacked(chunk: Tensor) -> Batch:
        batch = images.rows(chunk)
        begin = torch.zeros_like(batch.images)
        if random_start:
            shape = tuple(batch.images.shape)
            begin = drawn_in_ball(shape, attack.eps, attack.norm, generator).to(batch.images)

        def loss(x: Tensor) -> Tensor:
            return task.loss(network.forward(x), batch.targets).sum()

        return replace(batch, images=attack.worst(batch.images, loss, begin, batch.pixels))

    def statistics_on(rows: Tensor) -> Tensor:
        batches = map(attacked, rows.to(images.targets.device).split(images.at_a_time(CHUNK)))
        with full_precision(network.layout.device):
            return statistics(network, task, batches)

    return test.headlines(statistics_on)
