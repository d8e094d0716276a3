"""How well a model fits the images it was trained on, and others: from which the gap follows."""

from typing import Any, Literal

from fedsam.flatness.subject import Subject
from fedsam.runs.metrics import LOSS
from fedsam.tasks import headline_of

SETS: tuple[Literal["train", "test"], ...] = ("train", "test")


def fit(subject: Subject) -> dict[str, Any]:
    """Return the headline, in [0, 1], and loss, in nats, on the whole training and test set.

    In eval mode and without augmentation, as all measures look at a model.
    """
    scalars: dict[str, float] = {}
    images: dict[str, int] = {}
    for name in SETS:
        objective = subject.objective(name)
        images[name] = len(objective)
        metrics = objective.metrics(objective.w)
        scalars |= {
            f"{name} {metric}": metrics[metric] for metric in (headline_of(subject.task), LOSS)
        }
    return {"scalars": scalars, "settings": {"images": images, "mode": "eval, no augmentation"}}
