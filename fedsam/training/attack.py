"""Adversarial images: projected gradient ascent (PGD) in a ball around each image.

FGSM, of Goodfellow et al., "Explaining and Harnessing Adversarial Examples" (ICLR 2015), is one
step of it, as long as the radius.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.func import grad

from fedsam.data.images import Pixels

Norm = Literal["linf", "l2"]


@dataclass(frozen=True)
class Attack:
    """Moves images to where something is large (Madry et al., ICLR 2018)::

        x_0     = clip(x + begin)
        x_{i+1} = clip(x_i + step direction(grad value(x_i)))
        linf:  direction(g) = sign(g)   clip: to within eps of x in each pixel
        l2:    direction(g) = g / |g|   clip: to within eps of x as a whole image
        both:  and to true pixels, in [0, 1]

    Lengths are in 1/255 of a pixel's range, so that eps = 8 is the literature's 8/255, and the l2
    radius of 0.5 for pixels in [0, 1] is 127.5.

    Attributes
    ----------
    eps, step : float
        Radius of the ball and length of a step.
    steps : int
        Gradients that are taken.
    norm : {"linf", "l2"}
        Of the ball.
    """

    eps: float
    step: float
    steps: int
    norm: Norm = "linf"

    def __post_init__(self) -> None:
        for name in ("eps", "step", "steps"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"{name}: must be at least 0, got {value}")

    def worst(
        self, images: Tensor, value: Callable[[Tensor], Tensor], begin: Tensor, pixels: Pixels
    ) -> Tensor:
        """Return the last point of the ascent, not the worst on the way.

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
        ascend = self._in_a_cube if self.norm == "linf" else self._in_a_sphere
        with torch.no_grad():
            return ascend(images, value, begin, pixels)

    def _in_a_cube(
        self, images: Tensor, value: Callable[[Tensor], Tensor], begin: Tensor, pixels: Pixels
    ) -> Tensor:
        low = torch.clamp(images - self.eps * pixels.unit, min=pixels.low)
        high = torch.clamp(images + self.eps * pixels.unit, max=pixels.high)
        x = torch.clamp(images + begin * pixels.unit, low, high)
        for _ in range(self.steps):
            x = torch.clamp(x + self.step * pixels.unit * grad(value)(x).sign(), low, high)
        return x

    def _in_a_sphere(
        self, images: Tensor, value: Callable[[Tensor], Tensor], begin: Tensor, pixels: Pixels
    ) -> Tensor:
        def clip(offset: Tensor) -> Tensor:
            lengths = lengths_of(offset)
            offset = offset * torch.where(lengths > self.eps, self.eps / lengths, 1)
            x = torch.clamp(images + offset * pixels.unit, min=pixels.low)
            return torch.clamp(x, max=pixels.high)

        x = clip(begin)
        for _ in range(self.steps):
            g = grad(value)(x) * pixels.unit  # by pixels, whose channels may differ in scale
            x = clip((x - images) / pixels.unit + self.step * directions(g))
        return x


def lengths_of(v: Tensor) -> Tensor:
    """Return the l2 norm of each image (B, C, H, W), as (B, 1, 1, 1)."""
    return v.flatten(1).norm(dim=1)[:, None, None, None]


def directions(v: Tensor) -> Tensor:
    """Return images (B, C, H, W) of l2 norm 1; those that are zero stay zero."""
    lengths = lengths_of(v)
    return v / torch.where(lengths > 0, lengths, 1)


def drawn_in_ball(
    shape: tuple[int, ...], eps: float, norm: Norm, generator: torch.Generator
) -> Tensor:
    """Return a point of the ball for each image, uniform: float32 ``shape``, (B, C, H, W)."""
    if norm == "linf":
        return eps * (2 * torch.rand(shape, generator=generator) - 1)
    towards = directions(torch.randn(shape, generator=generator))
    share = torch.rand((shape[0], 1, 1, 1), generator=generator)
    return eps * share ** (shape[0] / towards.numel()) * towards
