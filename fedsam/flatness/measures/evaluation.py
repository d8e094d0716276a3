"""The accuracy that the measures of robustness are about, on a sample of the test images."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsam.base.errors import UsageError
from fedsam.data.images import Images
from fedsam.flatness.objective import Objective
from fedsam.flatness.sampling import errors_of_images, parts_of
from fedsam.flatness.subject import Subject
from fedsam.runs.metrics import ACCURACY

Accuracies = NDArray[np.float64]  # on all images that are looked at, and on each part of them


def accuracy_in(metrics: Mapping[str, float]) -> float:
    """Return a task's accuracy, in [0, 1]; raise UsageError if it has none."""
    if ACCURACY not in metrics:
        raise UsageError(
            f"--task: robustness needs a task with an {ACCURACY!r}; it has {', '.join(metrics)}"
        )
    return metrics[ACCURACY]


class Sample:
    """The test images that a measure of robustness looks at.

    Parameters
    ----------
    subject : Subject
        A model and its data.
    rows : Tensor
        int64 (n,), ascending.

    Attributes
    ----------
    parts : list of Tensor
        The same in disjoint parts, for the error of sampling; one, if they are all.
    """

    def __init__(self, subject: Subject, rows: Tensor) -> None:
        self.subject = subject
        self.rows = rows
        self.population = max(len(subject.test), len(rows))
        self.parts = parts_of(self.rows, self.population, subject.seed)

    @classmethod
    def of(cls, subject: Subject, images: int) -> "Sample":
        """Return at most so many test images, drawn by the seed; 0 for all."""
        return cls(subject, subject.sample("test", images))

    def __len__(self) -> int:
        return len(self.rows)

    def accuracies(self, statistics_on: Callable[[Tensor], Tensor]) -> Accuracies:
        """Return the accuracy on all and on each part, (1 + parts,).

        ``statistics_on``: from rows to the task's statistics of them, which add up.
        """
        each = [statistics_on(part) for part in self.parts]
        totals = [torch.stack(each).sum(0), *each]
        return np.array([accuracy_in(self.subject.task.metrics(total)) for total in totals])

    def accuracies_at(self, w: Tensor) -> Accuracies:
        """Return the accuracy of the parameters ``w`` (P,), (1 + parts,)."""
        return self.accuracies(lambda rows: self.subject.objective("test", rows).statistics(w))

    def accuracies_on(self, images: Images) -> Accuracies:
        """Return the model's accuracy on other pictures of the same images, (1 + parts,).

        ``images`` are in the order of ``rows``.
        """
        subject = self.subject

        def statistics_on(part: Tensor) -> Tensor:
            places = torch.searchsorted(self.rows, part)
            objective = Objective(subject.network, subject.state, subject.task, images, places)
            return objective.statistics(objective.w)

        return self.accuracies(statistics_on)

    def result(self, accuracies: Mapping[str, Accuracies], **settings: Any) -> dict[str, Any]:
        """Return ``scalars`` by name, their ``errors`` by sampling, and ``settings``."""
        scalars = {name: float(values[0]) for name, values in accuracies.items()}
        of_parts = [
            {name: float(values[part]) for name, values in accuracies.items()}
            for part in range(1, len(self.parts) + 1)
        ]
        sizes = [len(part) for part in self.parts]
        return {
            "scalars": scalars,
            "errors": {"images": errors_of_images(scalars, of_parts, sizes, self.population)},
            "settings": {**settings, "images": len(self), "seed": self.subject.seed},
        }


def mean_of(accuracies: Sequence[Accuracies]) -> Accuracies:
    """Return the mean over models or pictures, on all images and on each part."""
    return np.mean(accuracies, axis=0)
