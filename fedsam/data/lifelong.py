"""Lifelong learning: the classes come in tasks, one after the other over the rounds.

A task is the field's word here, a set of classes; what ``--task`` names is what an output means.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsam.base.errors import UsageError
from fedsam.base.randomness import torch_generator
from fedsam.data.partition import Partition
from fedsam.tasks import Task, headline_of

HEADS = ("single", "multi")


@dataclass(frozen=True)
class Lifelong:
    """Which classes are learnt when.

    Attributes
    ----------
    ends : tuple of int
        The last round of each of the T tasks, ascending.
    task_of : Tensor
        int64 (classes,), each class's task, from 0.
    labels : Tensor
        int64 (N,), the training set's.
    heads : str
        "single": all classes compete; "multi": those of a task, which is known when one is asked.
    memory : int
        Images of each class that a client goes on training on when its task is over.
    """

    ends: tuple[int, ...]
    task_of: Tensor
    labels: Tensor
    heads: str = "single"
    memory: int = 0

    def at(self, round: int) -> int:
        """Return the task of a round, from 1."""
        return min(bisect_left(self.ends, round), len(self.ends) - 1)

    def rows(self, images: Tensor, round: int) -> Tensor:
        """Return those of a client's images (n,) that it trains on in a round, in their order."""
        labels, task = self.labels[images], self.at(round)
        tasks = self.task_of[labels]
        chosen = tasks == task
        if self.memory:
            chosen |= (tasks < task) & (_rank(labels) < self.memory)
        return images[chosen]

    def holders(self, partition: Partition) -> list[Tensor]:
        """Return, for each task, the clients that hold images of it, ascending."""
        owner = torch.repeat_interleave(torch.arange(len(partition)), partition.sizes)
        tasks = self.task_of[self.labels[partition.indices]]
        return [owner[tasks == task].unique() for task in range(len(self.ends))]

    def rows_by_task(self, labels: Tensor) -> list[Tensor]:
        """Return, for each task, the places of its classes in some ``labels`` (N,)."""
        tasks = self.task_of.to(labels.device)[labels]
        return [(tasks == task).nonzero()[:, 0].cpu() for task in range(len(self.ends))]


def lifelong(
    ends: Sequence[int],
    labels: Tensor,
    classes: int,
    order: int | str = "natural",
    heads: str = "single",
    memory: int = 0,
) -> Lifelong:
    """Cut the classes into tasks of equal size, or one class more.

    Parameters
    ----------
    ends : sequence of int
        The last round of each task.
    labels : Tensor
        int64 (N,), the training set's.
    classes : int
        How many there are.
    order : int or str
        "natural": by number; else the seed of a shuffled order, the same whatever the run's seed.
    heads : str
        One of ``HEADS``.
    memory : int
        Images of each class of an earlier task that a client trains on as well: the first ones
        of the split's order (0: none).

    Raises
    ------
    ValueError
        If an option is none of these.
    """
    if len(ends) > classes:
        raise ValueError(f"{len(ends)} tasks: there are only {classes} classes")
    if heads not in HEADS:
        raise ValueError(f"heads: must be {' or '.join(HEADS)}, got {heads!r}")
    if isinstance(memory, bool) or not isinstance(memory, int) or memory < 0:
        raise ValueError(f"memory: must be a number of images, at least 0, got {memory}")
    if order == "natural":
        sequence = torch.arange(classes)
    elif isinstance(order, int) and not isinstance(order, bool) and order >= 0:
        sequence = torch.randperm(classes, generator=torch_generator(order, "lifelong"))
    else:
        raise ValueError(f"order: must be natural or a seed, at least 0, got {order!r}")
    task_of = torch.empty(classes, dtype=torch.int64)
    for task, part in enumerate(np.array_split(sequence.numpy(), len(ends))):
        task_of[torch.from_numpy(part)] = task
    return Lifelong(tuple(ends), task_of, labels, heads, memory)


def check(plan: Lifelong, partition: Partition, test_labels: Tensor, min_clients: int) -> None:
    """Raise UsageError if a task cannot be learnt or tested."""
    for task, rows in enumerate(plan.rows_by_task(test_labels), 1):
        if not len(rows):
            raise UsageError(f"--lifelong {len(plan.ends)}: task {task} has no test images")
    for task, clients in enumerate(plan.holders(partition), 1):
        if len(clients) < max(1, min_clients):
            raise UsageError(
                f"--lifelong {len(plan.ends)}: {len(clients)} clients hold images of task {task}, "
                f"--min-clients is {min_clients}"
            )


class Heads:
    """A task's loss and metrics where each set of classes has a head of its own.

    The classes of one linear layer do not share weights, so a head is a set of its outputs: all
    others are left out, of training and of the answer.

    Parameters
    ----------
    task : Task
        What the outputs mean; reads outputs (B, classes) and int64 labels (B,).
    task_of : Tensor
        int64 (classes,), each class's set, on the outputs' device.
    """

    def __init__(self, task: Task, task_of: Tensor) -> None:
        self.task = task
        self.task_of = task_of
        self.headline = headline_of(task)

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each example, (B,)."""
        return self.task.loss(self._own(output, targets), targets)

    def statistics(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return the task's statistics of a batch."""
        return self.task.statistics(self._own(output, targets), targets)

    def metrics(self, total: Tensor) -> dict[str, float]:
        """Return the task's metrics."""
        return self.task.metrics(total)

    def _own(self, output: Tensor, targets: Tensor) -> Tensor:
        others = self.task_of != self.task_of[targets].unsqueeze(-1)
        return output.masked_fill(others, -torch.inf)


def _rank(labels: Tensor) -> Tensor:
    """Return how many equal labels stand before each of them (n,)."""
    order = labels.argsort(stable=True)
    _, counts = labels.unique(return_counts=True)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    rank = torch.empty_like(labels)
    rank[order] = torch.arange(len(labels)) - first
    return rank
