"""Adversarial images: projected sign-gradient ascent within a cube around each image."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad

from fedsam.data.images import Pixels


def ascend(
    images: Tensor,
    value: Callable[[Tensor], Tensor],
    begin: Tensor,
    pixels: Pixels,
    *,
    eps: float,
    step: float,
    steps: int,
) -> Tensor:
    """Move images to where ``value`` is large (Madry et al., ICLR 2018)::

        x_0     = clip(x + begin)
        x_{i+1} = clip(x_i + step sign(grad value(x_i)))
        clip: to within eps of x in each pixel, and to true pixels, in [0, 1]

    Parameters
    ----------
    images : Tensor
        x, (B, C, H, W), as the network takes them.
    value : callable
        From images to a scalar, a sum or mean over them.
    begin : Tensor
        Where the ascent begins, (B, C, H, W) from x, in 1/255 of a pixel's range.
    pixels : Pixels
        What the images' numbers mean.
    eps, step : float
        In 1/255 of a pixel's range.
    steps : int
        Gradients that are taken.

    Returns
    -------
    Tensor
        New images (B, C, H, W), without a graph: nothing is differentiated through the attack.
    """
    with torch.no_grad():
        low = torch.clamp(images - eps * pixels.unit, min=pixels.low)
        high = torch.clamp(images + eps * pixels.unit, max=pixels.high)
        x = torch.clamp(images + begin * pixels.unit, low, high)
        for _ in range(steps):
            x = torch.clamp(x + step * pixels.unit * grad(value)(x).sign(), low, high)
    return x
