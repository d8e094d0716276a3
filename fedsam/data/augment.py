"""Augmentations, one class each: what is drawn for a round's images, and what it does to them.

A new one is a class here, and the flag that puts it into a client's ``Work``. What is drawn has a
name of its own; where K clients train as one program, their draws come as (K, B, ...).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsam.base.randomness import normal
from fedsam.data.images import CORNER, Batch

Choices = Mapping[str, Tensor]
TRIES, RATIO = 10, 4 / 3  # of torchvision's RandomResizedCrop


class Seen(NamedTuple):
    """The images that a client sees in a round, as mini-batches.

    Attributes
    ----------
    sizes : sequence of int
        Images in each of the S mini-batches.
    width : int
        B, the largest of them.
    shape : tuple of int
        Height and width of an image, in pixels.
    copies : Tensor
        int64 (S, B), which copy of its row each image is, where an epoch has several of each.
    """

    sizes: Sequence[int]
    width: int
    shape: tuple[int, int]
    copies: Tensor

    @property
    def places(self) -> tuple[int, int]:
        """(S, B)."""
        return len(self.sizes), self.width


class Augmentation(ABC):
    """What is drawn for the S x B images of a client's round, and what it does to a mini-batch.

    Attributes
    ----------
    padding : int
        Zero pixels that it needs around each image.
    copies : int
        How often an epoch has each image.
    """

    padding: int = 0
    copies: int = 1

    def of(self, client: int) -> "Augmentation":
        """Return it as a client draws it; what is done with what was drawn is the same for all."""
        return self

    def shape(self, before: tuple[int, int]) -> tuple[int, int]:
        """Return height and width of the images that it makes of those of a shape."""
        return before

    @abstractmethod
    def draw(self, seen: Seen, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw for all images of a round.

        Parameters
        ----------
        seen : Seen
            The images that are drawn for.
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

    def draw(self, seen: Seen, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the upper left corners (row, column) in the padded images."""
        size = (*seen.places, 2)
        return {CORNER: torch.randint(0, 2 * self.padding + 1, size, generator=generator)}


@dataclass(frozen=True)
class Rotation(Augmentation):
    """Turn all images of a client by one angle: the same labels mean other images elsewhere.

    By multiples of 90 degrees nothing is lost; what lies between is bilinear, corners black.

    Attributes
    ----------
    angles : tuple of float
        Degrees, counter-clockwise; client i has that of place i, counted round.
    client : int
        Whose images they are.

    References
    ----------
    Ghosh et al., "An Efficient Framework for Clustered Federated Learning", NeurIPS 2020:
    0, 90, 180, 270.
    """

    angles: tuple[float, ...]
    client: int = 0

    def of(self, client: int) -> "Rotation":
        """Return it with the client's angle."""
        return replace(self, client=client)

    def draw(self, seen: Seen, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the client's angle for each image; nothing is random."""
        angle = self.angles[self.client % len(self.angles)]
        return {"angle": torch.full(seen.places, angle, dtype=torch.float32)}

    def apply(self, batch: Batch, choices: Choices) -> Batch:
        """Return the mini-batch with its images turned."""
        images, targets, angle = batch.images, batch.targets, choices["angle"]
        turned = self._turned(images, angle, batch.pixels.low, "bilinear")
        if batch.aligned:
            planes = targets[..., None, :, :].to(images.dtype)
            targets = (
                self._turned(planes, angle, batch.pixels.outside, "nearest")
                .squeeze(-3)
                .to(targets.dtype)
            )
        return replace(batch, images=torch.empty_like(images).copy_(turned), targets=targets)

    def _turned(
        self, images: Tensor, angle: Tensor, outside: float | Tensor, between: str
    ) -> Tensor:
        """Return images (..., C, H, W) turned, with a value outside, and how between pixels."""
        turns = (angle / 90).round()
        quarters = turns.long().remainder(4)[..., None, None, None]
        turned = torch.where(quarters >= 2, images.flip(-2, -1), images)
        if any(round(degrees / 90) % 2 for degrees in self.angles):
            turned = torch.where(quarters % 2 == 1, turned.transpose(-2, -1).flip(-2), turned)
        if any(degrees % 90 for degrees in self.angles):
            turned = rotated(turned - outside, angle - 90 * turns, between) + outside
        return turned


def rotated(images: Tensor, degrees: Tensor, between: str) -> Tensor:
    """Return images (..., C, H, W) turned counter-clockwise by an angle (...), zero outside."""
    height, width = images.shape[-2:]
    phi = torch.deg2rad(degrees.reshape(-1)).to(images.dtype)
    zero = torch.zeros_like(phi)
    rows = [phi.cos(), -phi.sin() * height / width, zero, phi.sin() * width / height]
    affine = torch.stack([*rows, phi.cos(), zero], 1).unflatten(1, (2, 3))
    return _sampled(images, affine, (height, width), between)


def _sampled(
    images: Tensor,
    affine: Tensor,
    size: tuple[int, int],
    between: str,
    outside: str = "zeros",
) -> Tensor:
    """Return images (..., C, *size) read where affine maps (n, 2, 3) lead.

    ``between`` pixels: bilinear or nearest; ``outside`` of them: zeros or border, the last pixel.
    """
    flat = images.reshape(-1, *images.shape[-3:])
    places = F.affine_grid(affine, [*flat.shape[:2], *size], align_corners=False)
    sampled = F.grid_sample(flat, places, between, padding_mode=outside, align_corners=False)
    return sampled.reshape(*images.shape[:-2], *size)


@dataclass(frozen=True)
class Scale(Augmentation):
    """Scale each image by a random factor and take a random window of it.

    Bilinear, masks nearest, without smoothing before. Of an image that is smaller than the window
    all is seen, at a random place; what lies around it is black, and says nothing in masks.

    Attributes
    ----------
    low, high : float
        The factor is uniform between them.
    size : tuple of int, optional
        Height and width of the window, in pixels; None: the image's own.

    References
    ----------
    Fantauzzo et al., "FedDrive", IROS 2022: (0.5, 1.5) and 512 x 1024 of Cityscapes.
    """

    low: float
    high: float
    size: tuple[int, int] | None = None

    def shape(self, before: tuple[int, int]) -> tuple[int, int]:
        """Return the window's height and width."""
        return self.size or before

    def draw(self, seen: Seen, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the factors, and where the windows lie: 0 at one end to 1 at the other."""
        factor = torch.rand(seen.places, generator=generator)
        return {
            "factor": self.low + (self.high - self.low) * factor,
            "place": torch.rand(*seen.places, 2, generator=generator),
        }

    def apply(self, batch: Batch, choices: Choices) -> Batch:
        """Return the mini-batch with windows in place of its images."""
        images, targets = batch.images, batch.targets
        height, width = images.shape[-2:]
        size = self.shape((height, width))
        factor = choices["factor"].reshape(-1, 1).to(images.dtype)
        place = choices["place"].reshape(-1, 2).flip(1).to(images.dtype)  # (x, y)
        # in halves of the image's sides: a window's, and how far its middle may be from the image's
        window = torch.tensor([size[1] / width, size[0] / height], device=images.device)
        shift = (2 * place - 1) * (factor - window).abs()
        affine = torch.diag_embed(window / factor)
        affine = torch.cat([affine, (shift / factor)[..., None]], -1).to(images.dtype)
        low = batch.pixels.low
        seen = _sampled(images - low, affine, size, "bilinear") + low
        if batch.aligned:
            outside = batch.pixels.outside
            planes = targets[..., None, :, :].to(images.dtype) - outside
            targets = (_sampled(planes, affine, size, "nearest") + outside).squeeze(-3)
            targets = targets.round().to(batch.targets.dtype)
        return replace(batch, images=seen, targets=targets)


@dataclass(frozen=True)
class ResizedCrop(Augmentation):
    """Cut out a random box of each image and stretch it to a window.

    The box has a share of the image's area uniform in [low, high] and a ratio of width to height
    log-uniform in [3/4, 4/3]. A box that does not fit is drawn anew, ten times; then it is the
    middle of the image, as large as that ratio lets it be. This is torchvision's
    ``RandomResizedCrop``; bilinear, masks nearest, without its smoothing before.

    Attributes
    ----------
    low, high : float
        Share of the image's area.
    size : tuple of int
        Height and width of the window, in pixels.

    References
    ----------
    Szegedy et al., "Going Deeper with Convolutions", CVPR 2015; FedDrive has (0.5, 2) and 512 x 928
    of IDDA.
    """

    low: float
    high: float
    size: tuple[int, int]

    def shape(self, before: tuple[int, int]) -> tuple[int, int]:
        """Return the window's height and width."""
        return self.size

    def draw(self, seen: Seen, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw boxes: first row, first column, height and width in pixels."""
        height, width = seen.shape
        share, ratio = torch.rand(2, *seen.places, TRIES, generator=generator, dtype=torch.float64)
        area = (self.low + (self.high - self.low) * share) * height * width
        ratio = torch.exp(math.log(RATIO) * (2 * ratio - 1))
        heights, widths = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
        fits = (heights >= 1) & (widths >= 1) & (heights <= height) & (widths <= width)
        first = fits.int().argmax(-1, keepdim=True)
        whole = min(height, round(width * RATIO)), min(width, round(height * RATIO))
        any_fits = fits.any(-1)
        sides = [
            torch.where(any_fits, tried.gather(-1, first)[..., 0], float(side))
            for tried, side in zip((heights, widths), whole, strict=True)
        ]
        places = torch.rand(2, *seen.places, generator=generator, dtype=torch.float64)
        corners = [
            torch.where(any_fits, (place * (free + 1)).floor().minimum(free), (free / 2).floor())
            for place, free in zip(places, (height - sides[0], width - sides[1]), strict=True)
        ]
        return {"box": torch.stack([*corners, *sides], -1).float()}

    def apply(self, batch: Batch, choices: Choices) -> Batch:
        """Return the mini-batch with windows in place of its images."""
        images, targets = batch.images, batch.targets
        height, width = images.shape[-2:]
        sides = torch.tensor([height, width, height, width], device=images.device)
        top, left, tall, broad = (choices["box"].reshape(-1, 4) / sides).to(images.dtype).unbind(1)
        zero = torch.zeros_like(top)
        rows = [broad, zero, 2 * left + broad - 1, zero, tall, 2 * top + tall - 1]
        affine = torch.stack(rows, 1).unflatten(1, (2, 3))
        windows = _sampled(images, affine, self.size, "bilinear", "border")
        if batch.aligned:
            planes = targets[..., None, :, :].to(images.dtype)
            targets = _sampled(planes, affine, self.size, "nearest", "border").squeeze(-3)
            targets = targets.round().to(batch.targets.dtype)
        return replace(batch, images=windows, targets=targets)


@dataclass(frozen=True)
class Jitter(Augmentation):
    """Change each image's brightness, then its contrast, then its saturation.

    Each by a factor of its own, uniform in [1 - strength, 1 + strength]; torchvision's
    ``ColorJitter`` takes them in a random order. Grey images have no saturation.

    Attributes
    ----------
    strength : float
        In [0, 1].
    """

    strength: float

    def draw(self, seen: Seen, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the three factors."""
        factors = torch.rand(*seen.places, 3, generator=generator)
        return {"jitter": 1 + self.strength * (2 * factors - 1)}

    def apply(self, batch: Batch, choices: Choices) -> Batch:
        """Return the mini-batch in other colours."""
        low, unit = batch.pixels.low, 255 * batch.pixels.unit
        pixels = (batch.images - low) / unit
        factors = choices["jitter"].to(pixels.dtype)[..., None, None, None]
        brightness, contrast, saturation = factors.unbind(-4)
        pixels = (brightness * pixels).clamp(0, 1)
        mean = _grey(pixels).mean((-2, -1), keepdim=True)
        pixels = (mean + contrast * (pixels - mean)).clamp(0, 1)
        grey = _grey(pixels)
        pixels = (grey + saturation * (pixels - grey)).clamp(0, 1)
        return replace(batch, images=torch.empty_like(batch.images).copy_(pixels * unit + low))


def _grey(pixels: Tensor) -> Tensor:
    """Return the luma (..., 1, H, W) of images (..., C, H, W), ITU-R BT.601."""
    if pixels.shape[-3] != 3:
        return pixels.mean(-3, keepdim=True)
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=pixels.dtype, device=pixels.device)
    return (pixels * weights[:, None, None]).sum(-3, keepdim=True)


@dataclass(frozen=True)
class Flip(Augmentation):
    """Mirror each image with probability one half."""

    def draw(self, seen: Seen, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw which images are mirrored."""
        return {"flip": torch.rand(seen.places, generator=generator) < 0.5}

    def apply(self, batch: Batch, choices: Choices) -> Batch:
        """Return the mini-batch, some images mirrored."""
        images, targets, flip = batch.images, batch.targets, choices["flip"][..., None, None]
        if batch.aligned:
            targets = torch.where(flip, targets.flip(-1), targets)
        mirrored = torch.where(flip[..., None], images.flip(-1), images)
        return replace(batch, images=mirrored, targets=targets)


@dataclass(frozen=True)
class Mirror(Flip):
    """See each image twice an epoch, once as it is and once mirrored."""

    copies: int = 2

    def draw(self, seen: Seen, generator: torch.Generator) -> dict[str, Tensor]:
        """Return that the second copies are mirrored; nothing is random."""
        return {"flip": seen.copies % 2 == 1}


@dataclass(frozen=True)
class Double(Augmentation):
    """See each image twice an epoch, both times as it is.

    Mini-batches are cut from all 2 n, so that it is not two epochs.
    """

    copies: int = 2

    def draw(self, seen: Seen, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw nothing."""
        return {}


@dataclass(frozen=True)
class Noise(Augmentation):
    """Add Gaussian noise, another one whenever an image is seen, the more the later the client.

    Client i of N has standard deviation ``deviation * i / (N - 1)``. What leaves the pixels' range
    is not clipped.

    Attributes
    ----------
    deviation : float
        Of the last client, for pixels in [0, 1].
    clients : int
        N.
    client : int
        Whose images they are.

    References
    ----------
    Li, Diao, Chen, He, "Federated Learning on Non-IID Data Silos", ICDE 2022 (NIID-Bench), noise-
    based feature imbalance. Their code has the standard deviation grow so, their text the variance.
    """

    deviation: float
    clients: int
    client: int = 0

    def of(self, client: int) -> "Noise":
        """Return it with the client's share of the noise."""
        return replace(self, client=client)

    def draw(self, seen: Seen, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw a key in [0, 2**31) for each image, beside the client's standard deviation."""
        deviation = self.deviation * self.client / max(self.clients - 1, 1)
        return {
            "noise": torch.randint(0, 2**31, seen.places, generator=generator),
            "deviation": torch.full(seen.places, deviation, dtype=torch.float32),
        }

    def apply(self, batch: Batch, choices: Choices) -> Batch:
        """Return the mini-batch with noise."""
        images = batch.images
        noise = normal(choices["noise"], images.shape[-3:], images.dtype)
        deviation = choices["deviation"].to(images.dtype)[..., None, None, None]
        return replace(batch, images=images + noise * (deviation * 255 * batch.pixels.unit))


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

    def draw(self, seen: Seen, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the centres (row, column)."""
        uniform = torch.rand(*seen.places, 2, generator=generator)
        return {"centre": (uniform * torch.tensor(seen.shape)).long()}

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

    def draw(self, seen: Seen, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw a permutation of each mini-batch, and the weight of the image itself."""
        partners = torch.zeros(seen.places, dtype=torch.int64)
        for step, size in enumerate(seen.sizes):
            partners[step, :size] = torch.randperm(size, generator=generator)
        lambdas = beta(self.a, len(seen.sizes), generator)
        return {"partner": partners, "lambda": lambdas[:, None].expand(seen.places)}

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

    def draw(self, seen: Seen, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw keys in [0, 2**31)."""
        return {"key": torch.randint(0, 2**31, seen.places, generator=generator)}

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
