"""Adversarial images: projected sign-gradient ascent within a cube around each image."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad

from fedsam.data.images import Pixels


@dataclass(frozen=True)
class Attack:
    """Moves images to where something is large (Madry et al., ICLR 2018)::

        x_0     = clip(x + begin)
        x_{i+1} = clip(x_i + step sign(grad value(x_i)))
        clip: to within eps of x in each pixel, and to true pixels, in [0, 1]

    Attributes
    ----------
    eps, step : float
        In 1/255 of a pixel's range.
    steps : int
        Gradients that are taken.
    """

    eps: float
    step: float
    steps: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0:
                raise ValueError(f"{name}: must be at least 0, got {value}")

    def worst(
        self, images: Tensor, value: Callable[[Tensor], Tensor], begin: Tensor, pixels: Pixels
    ) -> Tensor:
        """Return the last point of the ascent.

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

        Returns
        -------
        Tensor
            New images (B, C, H, W), without a graph: nothing is differentiated through the attack.
        """
        with torch.no_grad():
            low = torch.clamp(images - self.eps * pixels.unit, min=pixels.low)
            high = torch.clamp(images + self.eps * pixels.unit, max=pixels.high)
            x = torch.clamp(images + begin * pixels.unit, low, high)
            for _ in range(self.steps):
                x = torch.clamp(x + self.step * pixels.unit * grad(value)(x).sign(), low, high)
        return x
