"""What a task says of a model on some images: the loop over mini-batches, once."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fedsam.data.images import Batch
from fedsam.tasks import Task
from fedsam.training.flat_module import FlatModule


@torch.no_grad()
def statistics(network: FlatModule, task: Task, batches: Iterable[Batch]) -> Tensor:
    """Return the task's statistics, float64 (D,), summed over mini-batches in their order.

    The model is the one that the network holds, in eval mode.
    """
    network.module.eval()
    parts = [task.statistics(network.forward(b.images), b.targets) for b in batches]
    return torch.stack(parts).sum(0)


@torch.no_grad()
def statistics_by_group(
    network: FlatModule, task: Task, batch: Batch, groups: Sequence[Tensor]
) -> list[Tensor]:
    """Return the task's statistics of a mini-batch, and of each group's places (n,) in it.

    One forward pass, in eval mode; groups may overlap, and what is in none is in the first alone.
    """
    network.module.eval()
    output, targets = network.forward(batch.images), batch.targets
    parts = [task.statistics(output[places], targets[places]) for places in groups]
    return [task.statistics(output, targets), *parts]
