"""The loss itself, and the length of its gradient."""

from typing import Any

import torch
from torch import Tensor

from fedsam.flatness.objective import Objective
from fedsam.flatness.sampling import errors_of_images
from fedsam.flatness.subject import IMAGES, Subject, objective_on, objective_settings


def slope(subject: Subject, *, on: str = "train", images: int = IMAGES) -> dict[str, Any]:
    """Measure loss (nats), the headline (in [0, 1]) and the l2 norm of the gradient of L.

    Passes over the images: 2, a forward one and one with its gradient.

    Parameters
    ----------
    subject : Subject
        A model and its data.
    on, images : str, int
        Where, and on how many images at most (0: all).
    """
    objective = objective_on(subject, on, images)
    parts, w = objective.parts(subject.seed), objective.w
    gradient, of_parts, totals = torch.zeros_like(w), [], []
    for part in parts:
        g, total = part.gradient(w), part.statistics(w)
        gradient += len(part) / len(objective) * g
        totals.append(total)
        of_parts.append(_numbers(objective, total) | {"gradient_norm": length(g)})
    whole = torch.stack(totals).sum(0)
    scalars = _numbers(objective, whole) | {"gradient_norm": length(gradient)}
    sizes = [len(part) for part in parts]
    return {
        "scalars": scalars,
        "errors": {"images": errors_of_images(scalars, of_parts, sizes, objective.population)},
        "settings": objective_settings(objective, on),
    }


def length(g: torch.Tensor) -> float:
    """Return the l2 norm of a vector, summed in float64."""
    return g.double().norm().item()


def _numbers(objective: Objective, total: Tensor) -> dict[str, float]:
    """Return those of the task's metrics that are numbers and no lists."""
    metrics = objective.task.metrics(total)
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}
