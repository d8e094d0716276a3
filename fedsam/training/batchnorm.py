"""BatchNorm's running statistics: no parameters, so a federation must say what becomes of them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedsam.base.vector import Layout, weighted_mean
from fedsam.training.flat_module import FlatModule

MEAN, VAR = "running_mean", "running_var"  # PyTorch's names


def layers(module: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorm layers that keep running statistics."""
    every = (layer for layer in module.modules() if isinstance(layer, _BatchNorm))
    return [layer for layer in every if layer.running_mean is not None]


def places(layout: Layout) -> tuple[Tensor, Tensor]:
    """Return where in a state the running means lie, int64 (C,), and where their variances do."""
    offsets = {entry.name: entry for entry in layout.entries}
    means = [e for e in layout.entries if e.name.rpartition(".")[2] == MEAN]
    variances = [offsets[entry.name.removesuffix(MEAN) + VAR] for entry in means]
    indices = [
        torch.cat([torch.arange(e.offset, e.offset + e.size) for e in entries])
        for entries in (means, variances)
    ]
    return indices[0].to(layout.device), indices[1].to(layout.device)


def pooled(state: Tensor, states: Sequence[Tensor], n: Sequence[float], layout: Layout) -> Tensor:
    """Return ``state`` (S,) with the statistics of all the clients' images together::

        mean = sum_k n_k mean_k / n
        var  = sum_k n_k (var_k + mean_k^2) / n - mean^2

    The variance of the mixture; the mean of the var_k leaves out how far the clients are apart. It
    is computed as the mean of var_k + (mean_k - mean)^2, the same without the cancellation.

    Parameters
    ----------
    state : Tensor
        All else is as in this one; not changed.
    states : sequence of Tensor
        The K clients', (S,) each.
    n : sequence of float
        Their numbers of examples.
    layout : Layout
        The model's.
    """
    where_mean, where_var = places(layout)
    means = torch.stack([s[where_mean] for s in states])
    mean = weighted_mean(means, n)
    spread = torch.stack([s[where_var] for s in states]) + (means - mean).square()
    new = state.clone()
    new[where_mean], new[where_var] = mean, weighted_mean(spread, n)
    return new


@torch.no_grad()
def of_batch(network: FlatModule, state: Tensor, images: Tensor) -> Tensor:
    """Return ``state`` (S,) with the statistics of one mini-batch of images (B, C, H, W).

    Only BatchNorm is in training mode: dropout, which would draw random numbers, is not.
    """
    network.load(state)
    network.module.eval()
    normalising = layers(network.module)
    momenta = [layer.momentum for layer in normalising]
    for layer in normalising:
        layer.train()
        layer.momentum = 1.0  # forget what was there
    network.forward(images)
    for layer, momentum in zip(normalising, momenta, strict=True):
        layer.momentum = momentum
    return torch.cat([state[: network.layout.trainable], network.carried()])


def updated(state: Tensor, batches: Sequence[Tensor], layout: Layout) -> Tensor:
    """Return ``state`` (S,) with the mean over mini-batches of their statistics.

    What ``torch.optim.swa_utils.update_bn`` makes of them one after the other.

    Parameters
    ----------
    state : Tensor
        Not changed.
    batches : sequence of Tensor
        What ``of_batch`` returned for each.
    layout : Layout
        The model's.
    """
    where = torch.cat(places(layout))
    new = state.clone()
    new[where] = weighted_mean([batch[where] for batch in batches], [1.0] * len(batches))
    return new
