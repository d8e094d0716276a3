"""Robustness to adversarial images: accuracy under FGSM and PGD."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fedsam.base.errors import UsageError
from fedsam.base.randomness import torch_generator
from fedsam.flatness.measures.attack import Losses, fgsm, pgd
from fedsam.flatness.measures.evaluation import accuracy_in, some_rows
from fedsam.flatness.subject import Subject

STEP = 2.5  # of eps / steps: Madry et al.'s choice, which can reach and walk along the border
CHUNK = 250  # images at a time
Attack = Callable[[Losses, Tensor, float, torch.Generator], Tensor]


def adversarial(
    subject: Subject,
    *,
    linf: Sequence[float] = (1, 2, 4, 8),
    l2: Sequence[float] = (32, 64, 128),
    steps: int = 10,
    images: int = 1000,
) -> dict[str, Any]:
    """Return the test accuracy under attacks that know the model.

    In eval mode, on pixels in [0, 255], which are normalised after the attack. PGD starts at a
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
        ``scalars``: ``accuracy``, and ``accuracy_ATTACK_EPS`` for fgsm, pgd_linf, pgd_l2.
        ``accuracies``: the same by attack and eps. ``settings``.
    """
    if steps < 1 or min(*linf, *l2, 0) < 0:
        raise UsageError("adversarial: steps must be 1 at least, and radii not negative")

    def by_pgd(norm: Any) -> Attack:
        return lambda losses, x, eps, generator: pgd(
            losses, x, eps, STEP * eps / steps, steps, norm=norm, generator=generator
        )

    attacks: dict[str, tuple[Attack, Sequence[float]]] = {
        "fgsm": (lambda losses, x, eps, generator: fgsm(losses, x, eps), linf),
        "pgd_linf": (by_pgd("linf"), linf),
        "pgd_l2": (by_pgd("l2"), l2),
    }
    rows = some_rows(subject, images)
    clean = accuracy_under(subject, lambda losses, x, eps, generator: x, 0, rows)
    found = {
        name: {f"{eps:g}": accuracy_under(subject, attack, eps, rows) for eps in radii}
        for name, (attack, radii) in attacks.items()
    }
    flat = {
        f"accuracy_{name}_{eps}": value
        for name, by_eps in found.items()
        for eps, value in by_eps.items()
    }
    settings = {
        "eps": "radius in 255ths of the pixel range, after which pixels are clipped to [0, 255]",
        "steps": steps,
        "step": f"{STEP:g} eps / steps",
        "start": "fgsm: the image; pgd: uniform in the ball",
        "images": len(rows),
        "seed": subject.seed,
    }
    return {"scalars": {"accuracy": clean, **flat}, "settings": settings, "accuracies": found}


def accuracy_under(subject: Subject, attack: Attack, eps: float, rows: Tensor) -> float:
    """Return the accuracy over some test images, each attacked first."""
    network, task, test = subject.network, subject.task, subject.test
    network.load(subject.state)
    network.module.eval()
    generator = torch_generator(subject.seed, "attack")
    totals = []
    for chunk in rows.to(test.targets.device).split(CHUNK):
        targets = test.targets[chunk]
        pixels = test.raw[chunk].permute(0, 3, 1, 2).to(network.layout.dtype)

        def output(x: Tensor) -> Tensor:
            return network.forward((x - test.offset) * test.factor)

        def losses(x: Tensor, targets: Tensor = targets) -> Tensor:
            return task.loss(output(x), targets)

        attacked = attack(losses, pixels, eps, generator)
        with torch.no_grad():
            totals.append(task.statistics(output(attacked), targets))
    return accuracy_in(task.metrics(torch.stack(totals).sum(0)))
