"""The loss itself, and the length of its gradient."""

from typing import Any

from fedsam.flatness.subject import IMAGES, Subject, objective_on, objective_settings


def slope(subject: Subject, *, on: str = "train", images: int = IMAGES) -> dict[str, Any]:
    """Measure loss (nats), accuracy (in [0, 1]) and the l2 norm of the gradient of L.

    Passes over the images: 2, a forward one and one with its gradient.

    Parameters
    ----------
    subject : Subject
        A model and its data.
    on, images : str, int
        Where, and on how many images at most (0: all).
    """
    objective = objective_on(subject, on, images)
    metrics = objective.metrics(objective.w)
    length = objective.gradient(objective.w).double().norm().item()
    return {
        "scalars": metrics | {"gradient_norm": length},
        "settings": objective_settings(objective, on),
    }
