"""BatchNorm's running statistics: no parameters, so a federation must say what becomes of them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedsam.base.vector import Layout, is_frozen, weighted_mean
from fedsam.training.flat_module import FlatModule


def layers(module: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorm layers that keep running statistics, but for frozen ones."""
    every = (layer for layer in module.modules() if isinstance(layer, _BatchNorm))
    return [layer for layer in every if layer.running_mean is not None and not frozen(layer)]


def frozen(layer: _BatchNorm) -> bool:
    """Return whether its statistics are frozen: it always normalises as in evaluation."""
    return layer.running_mean is not None and is_frozen(layer.running_mean)


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
    where_mean, where_var = layout.statistics
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
    where = torch.cat(layout.statistics)
    new = state.clone()
    new[where] = weighted_mean([batch[where] for batch in batches], [1.0] * len(batches))
    return new
