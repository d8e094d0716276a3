"""The accuracy that the measures of robustness are about."""

from collections.abc import Mapping

from torch import Tensor

from fedsam.base.errors import UsageError
from fedsam.data.images import Images
from fedsam.flatness.objective import Objective
from fedsam.flatness.subject import Subject


def accuracy_in(metrics: Mapping[str, float]) -> float:
    """Return a task's accuracy, in [0, 1]; raise UsageError if it has none."""
    if "accuracy" not in metrics:
        raise UsageError(
            f"--task: robustness needs a task with an 'accuracy'; it has {', '.join(metrics)}"
        )
    return metrics["accuracy"]


def accuracy(subject: Subject, images: Images, rows: Tensor | None = None) -> float:
    """Return the model's accuracy over some rows of a data set; by default all."""
    objective = Objective(subject.network, subject.state, subject.task, images, rows)
    return accuracy_in(objective.metrics(objective.w))
