"""Augmentations, one class each: what is drawn for a round's images, and what it does to them.

A new one is a class here, and the flag that puts it into a client's ``Work``. What is drawn has a
name of its own; where K clients train as one program, their draws come as (K, B, ...).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedsam.data.images import CORNER, Batch

Choices = Mapping[str, Tensor]


class Augmentation(ABC):
    """What is drawn for the S x B images of a client's round, and what it does to a mini-batch.

    Attributes
    ----------
    padding : int
        Zero pixels that it needs around each image.
    """

    padding: int = 0

    @abstractmethod
    def draw(
        self,
        sizes: Sequence[int],
        width: int,
        shape: tuple[int, int],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Draw for all images of a round.

        Parameters
        ----------
        sizes : sequence of int
            Images in each of the S mini-batches.
        width : int
            B, the largest of them.
        shape : tuple of int
            Height and width of an image, in pixels.
        generator : torch.Generator
            The only source of what is drawn.

        Returns
        -------
        dict
            Tensors (S, B, ...) by name: bool, integers below 2**31, or float32.
        """

    def apply(self, batch: Batch, choices: Choices) -> Batch:
        """Return the mini-batch augmented; nothing is changed in place.

        Parameters
        ----------
        batch : Batch
            Images (..., B, C, H, W), normalised; the dots are nothing, or K clients.
        choices : mapping
            What was drawn for them, (..., B, ...), of all augmentations.
        """
        return batch


@dataclass(frozen=True)
class Crop(Augmentation):
    """Random crop after zero padding; it is part of how images are gathered.

    Attributes
    ----------
    padding : int
        Pixels.
    """

    padding: int

    def draw(
        self,
        sizes: Sequence[int],
        width: int,
        shape: tuple[int, int],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Draw the upper left corners (row, column) in the padded images."""
        size = (len(sizes), width, 2)
        return {CORNER: torch.randint(0, 2 * self.padding + 1, size, generator=generator)}


@dataclass(frozen=True)
class Flip(Augmentation):
    """Mirror each image with probability one half."""

    def draw(
        self,
        sizes: Sequence[int],
        width: int,
        shape: tuple[int, int],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Draw which images are mirrored."""
        return {"flip": torch.rand(len(sizes), width, generator=generator) < 0.5}

    def apply(self, batch: Batch, choices: Choices) -> Batch:
        """Return the mini-batch, some images mirrored."""
        images = batch.images
        mirrored = torch.where(choices["flip"][..., None, None, None], images.flip(-1), images)
        return replace(batch, images=mirrored)


@dataclass(frozen=True)
class Cutout(Augmentation):
    """Set a square around a random pixel to zero, the mean pixel.

    The square is clipped at the border, as in DeVries and Taylor (2017): rows and columns from
    centre - side // 2 up to, not including, centre + side // 2.

    Attributes
    ----------
    side : int
        Of the square, in pixels.
    """

    side: int

    def draw(
        self,
        sizes: Sequence[int],
        width: int,
        shape: tuple[int, int],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Draw the centres (row, column)."""
        uniform = torch.rand(len(sizes), width, 2, generator=generator)
        return {"centre": (uniform * torch.tensor(shape)).long()}

    def apply(self, batch: Batch, choices: Choices) -> Batch:
        """Return the mini-batch with a hole in each image."""
        centres, images, half = choices["centre"], batch.images, self.side // 2
        height, width = images.shape[-2:]
        rows = torch.arange(height, device=images.device)
        columns = torch.arange(width, device=images.device)
        row, column = centres[..., :1], centres[..., 1:]
        in_rows = (rows >= row - half) & (rows < row + half)
        in_columns = (columns >= column - half) & (columns < column + half)
        hole = in_rows[..., None, :, None] & in_columns[..., None, None, :]
        # masked_fill would leave channels-last
        return replace(batch, images=images.clone().masked_fill_(hole, 0))


@dataclass(frozen=True)
class Mixup(Augmentation):
    """Mix each image with another of its mini-batch (Zhang et al., ICLR 2018).

    Attributes
    ----------
    a : float
        Of lambda ~ Beta(a, a), one lambda a mini-batch.
    """

    a: float

    def draw(
        self,
        sizes: Sequence[int],
        width: int,
        shape: tuple[int, int],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Draw a permutation of each mini-batch, and the weight of the image itself."""
        partners = torch.zeros(len(sizes), width, dtype=torch.int64)
        for step, size in enumerate(sizes):
            partners[step, :size] = torch.randperm(size, generator=generator)
        lambdas = beta(self.a, len(sizes), generator)
        return {"partner": partners, "lambda": lambdas[:, None].expand(-1, width)}

    def apply(self, batch: Batch, choices: Choices) -> Batch:
        """Return the mini-batch mixed, with both targets of each image."""
        partners, images = choices["partner"], batch.images
        lam = choices["lambda"].to(images.dtype)
        share = lam[..., None, None, None]
        return replace(
            batch,
            images=share * images + (1 - share) * within(images, partners),
            mixed_targets=within(batch.targets, partners),
            lam=lam,
        )


@dataclass(frozen=True)
class Keys(Augmentation):
    """A key of each image's own, for a loss that is random; the images stay as they are."""

    def draw(
        self,
        sizes: Sequence[int],
        width: int,
        shape: tuple[int, int],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Draw keys in [0, 2**31)."""
        return {"key": torch.randint(0, 2**31, (len(sizes), width), generator=generator)}

    def apply(self, batch: Batch, choices: Choices) -> Batch:
        """Return the mini-batch with its keys."""
        return replace(batch, keys=choices["key"])


def within(values: Tensor, places: Tensor) -> Tensor:
    """Return ``values`` (..., B, *) at ``places`` (..., B) of each one's own mini-batch."""
    if places.dim() == 1:
        return values[places]
    clients = torch.arange(len(places), device=places.device)[:, None]
    return values[clients, places]


def beta(a: float, draws: int, generator: torch.Generator) -> Tensor:
    """Draw from Beta(a, a) by two gamma variates: float32 (draws,)."""
    concentration = torch.full((2, draws), a, dtype=torch.float64)
    x, y = torch._standard_gamma(concentration, generator=generator)
    return (x / (x + y)).float()
