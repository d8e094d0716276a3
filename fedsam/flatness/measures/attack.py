"""Adversarial attacks on images: FGSM and projected gradient ascent (PGD), as pure functions.

FGSM: Goodfellow et al., "Explaining and Harnessing Adversarial Examples" (ICLR 2015). PGD: Madry
et al., "Towards Deep Learning Models Resistant to Adversarial Attacks" (ICLR 2018)::

    x_0     = x, or a point drawn uniformly from the ball
    x_(i+1) = P(x_i + step * direction(gradient of the loss at x_i))

with direction sign(g) for l_inf and g / |g| for l_2, and P the projection first onto the ball of
radius eps around x, then onto the box of pixel values.

All is in pixel units: an image holds floats in [0, 255], so eps = 8 is the literature's 8/255, and
the l_2 radius of 0.5 for pixels in [0, 1] is 127.5.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Norm = Literal["linf", "l2"]
Losses = Callable[[Tensor], Tensor]
BRIGHTEST = 255.0


def fgsm(losses: Losses, images: Tensor, eps: float) -> Tensor:
    """Return clip(x + eps sign(g)), one l_inf step from the images themselves."""
    return pgd(losses, images, eps, eps, 1)


def pgd(
    losses: Losses,
    images: Tensor,
    eps: float,
    step: float,
    n: int,
    *,
    norm: Norm = "linf",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return adversarial images after ``n`` steps; the last ones, not the worst on the way.

    Parameters
    ----------
    losses : callable
        From images (B, C, H, W) in [0, 255] to the loss of each, (B,). Must treat the images
        independently: a model in eval mode.
    images : Tensor
        (B, C, H, W), floats in [0, 255].
    eps, step : float
        Radius of the ball and length of a step in pixel units.
    n : int
        Steps.
    norm : {"linf", "l2"}
        Of the ball, over each whole image.
    generator : torch.Generator, optional
        On the CPU; start from a random point of the ball. Without one, from the images.

    Returns
    -------
    Tensor
        A new tensor, like ``images``.
    """
    project, direction = (_box, torch.sign) if norm == "linf" else (_sphere, _unit)
    x = images.clone()
    if generator is not None:
        x = (images + _start(images, eps, norm, generator)).clamp(0, BRIGHTEST)
    for _ in range(n):
        x.requires_grad_(True)
        (g,) = torch.autograd.grad(losses(x).sum(), x)
        moved = x.detach() + step * direction(g)
        x = (images + project(moved - images, eps)).clamp(0, BRIGHTEST)
    return x


def _box(offset: Tensor, eps: float) -> Tensor:
    return offset.clamp(-eps, eps)


def _sphere(offset: Tensor, eps: float) -> Tensor:
    lengths = _lengths(offset)
    return offset * torch.where(lengths > eps, eps / lengths, 1)


def _unit(g: Tensor) -> Tensor:
    lengths = _lengths(g)
    return g / torch.where(lengths > 0, lengths, 1)


def _lengths(v: Tensor) -> Tensor:
    return v.flatten(1).norm(dim=1)[:, None, None, None]


def _start(images: Tensor, eps: float, norm: Norm, generator: torch.Generator) -> Tensor:
    """Draw an offset of each image, uniformly from the ball."""
    shape = tuple(images.shape)
    if norm == "linf":
        return (eps * (2 * torch.rand(shape, generator=generator) - 1)).to(images)
    towards = _unit(torch.randn(shape, generator=generator))
    share = torch.rand((shape[0], 1, 1, 1), generator=generator) ** (1 / images[0].numel())
    return (eps * share * towards).to(images)
