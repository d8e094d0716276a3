"""The headline (accuracy) that the measures of robustness are about, on a sample of the tests."""

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
from fedsam.runs.metrics import named
from fedsam.tasks import Task, headline_of

Headlines = NDArray[np.float64]  # on all images that are looked at, and on each part of them


def headline_in(task: Task, metrics: Mapping[str, float]) -> float:
    """Return a task's headline, in [0, 1]; raise UsageError if it does not measure it."""
    if (headline := headline_of(task)) not in metrics:
        raise UsageError(
            f"--task: measures need its headline {headline!r}; it has {', '.join(metrics)}"
        )
    return metrics[headline]


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

    @property
    def headline(self) -> str:
        """What the number is called."""
        return headline_of(self.subject.task)

    def headlines(self, statistics_on: Callable[[Tensor], Tensor]) -> Headlines:
        """Return the headline on all and on each part, (1 + parts,).

        ``statistics_on``: from rows to the task's statistics of them, which add up.
        """
        each = [statistics_on(part) for part in self.parts]
        totals = [torch.stack(each).sum(0), *each]
        task = self.subject.task
        return np.array([headline_in(task, task.metrics(total)) for total in totals])

    def headlines_at(self, w: Tensor) -> Headlines:
        """Return the headline of the parameters ``w`` (P,), (1 + parts,)."""
        return self.headlines(lambda rows: self.subject.objective("test", rows).statistics(w))

    def headlines_on(self, images: Images) -> Headlines:
        """Return the model's headline on other pictures of the same images, (1 + parts,).

        ``images`` are in the order of ``rows``.
        """
        subject = self.subject

        def statistics_on(part: Tensor) -> Tensor:
            places = torch.searchsorted(self.rows, part)
            objective = Objective(subject.network, subject.state, subject.task, images, places)
            return objective.statistics(objective.w)

        return self.headlines(statistics_on)

    def result(self, headlines: Mapping[str, Headlines], **settings: Any) -> dict[str, Any]:
        """Return ``scalars`` by name, their ``errors`` by sampling, and ``settings``."""
        scalars = {name: float(values[0]) for name, values in headlines.items()}
        of_parts = [
            {name: float(values[part]) for name, values in headlines.items()}
            for part in range(1, len(self.parts) + 1)
        ]
        sizes = [len(part) for part in self.parts]
        return {
            "scalars": scalars,
            "errors": {"images": errors_of_images(scalars, of_parts, sizes, self.population)},
            "settings": {
                **named(self.headline),
                **settings,
                "images": len(self),
                "seed": self.subject.seed,
            },
        }


def mean_of(headlines: Sequence[Headlines]) -> Headlines:
    """Return the mean over models or pictures, on all images and on each part."""
    return np.mean(headlines, axis=0)
