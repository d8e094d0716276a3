"""Images on the training device, and the mini-batches that a plan takes from them."""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsam.base.randomness import uniform
from fedsam.data.plan import Choices, Plan


@dataclass(frozen=True)
class Pixels:
    """What the numbers of normalised images mean.

    Attributes
    ----------
    unit : float or Tensor
        1/255 of a pixel's range; a tensor is (1, C, 1, 1).
    low, high : float or Tensor
        Black and white, alike.
    """

    unit: float | Tensor = 1 / 255
    low: float | Tensor = 0.0
    high: float | Tensor = 1.0


@dataclass(frozen=True)
class Batch:
    """One mini-batch, or those of K clients with a K in front of every shape.

    Attributes
    ----------
    images : Tensor
        (B, C, H, W).
    targets : Tensor
        (B, ...).
    mixed_targets : Tensor or None
        Those of the images that were mixed in.
    lam : float or Tensor
        Mixup's weight of ``targets``; a tensor is (B,).
    valid : Tensor or None
        bool (B,), where a mini-batch may be shorter than its tensors; None: all of it.
    drawn : Tensor or None
        int64 (B,), a key of each image's own for ``uniform``, where the plan draws one.
    pixels : Pixels
        What the images' numbers mean, the same for all clients.
    """

    images: Tensor
    targets: Tensor
    mixed_targets: Tensor | None = None
    lam: float | Tensor = 1.0
    valid: Tensor | None = None
    drawn: Tensor | None = None
    pixels: Pixels = Pixels()

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """Return the mini-batch with each of its tensors changed."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        changed: dict[str, Any] = {name: change(value) for name, value in tensors.items()}
        return replace(self, **changed)

    def uniform(self) -> Tensor:
        """Return the numbers in (0, 1) that the plan chose for the images, one a pixel's channel.

        Raises
        ------
        ValueError
            If it chose none.
        """
        if self.drawn is None:
            raise ValueError("the plan draws nothing for the loss: let its class say draws = True")
        shape = self.images.shape[self.drawn.dim() :]
        return uniform(self.drawn, shape, self.images.dtype)

    def parts(self, size: int) -> "list[tuple[float | Tensor, Batch]]":
        """Return sub-batches of ``size`` examples, the last maybe smaller, each after its share.

        A share is the part of the mini-batch's examples, (K, 1) for K clients.
        """
        dim = 0 if self.valid is None else self.valid.dim() - 1
        length = self.targets.shape[dim]
        pieces = [
            self.map(partial(torch.narrow, dim=dim, start=start, length=min(size, length - start)))
            for start in range(0, length, size)
        ]
        if self.valid is None:
            return [(len(piece.targets) / length, piece) for piece in pieces]
        total = self.valid.sum(-1, keepdim=True).clamp(min=1).to(self.images.dtype)
        return [(p.valid.sum(-1, keepdim=True) / total, p) for p in pieces if p.valid is not None]


class Images:
    """A data set that lives once on its device as uint8 and is augmented there, batch by batch.

    Parameters
    ----------
    images : Tensor
        uint8 (N, C, H, W).
    targets : Tensor
        (N, ...), int64 labels or whatever the task reads.
    mean, std : tuple of float
        Of each channel, for pixel values in [0, 1].
    padding : int
        Zero pixels kept around each image, for the random crop.
    dtype : torch.dtype
        Of the mini-batches.
    device : torch.device
        Where everything lives.
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        padding: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        _, channels, self.height, self.width = images.shape
        self.padding = padding
        self.targets = targets.to(device)
        # rows of pixels: (N, H + 2p, W + 2p, C), so that what is gathered is channels-last
        self.padded = F.pad(images, [padding] * 4).permute(0, 2, 3, 1).contiguous().to(device)
        shape = (1, channels, 1, 1)
        self.offset = torch.tensor(mean, dtype=dtype).mul(255).view(shape).to(device)
        self.factor = torch.tensor(std, dtype=dtype).mul(255).reciprocal().view(shape).to(device)
        low, high = -self.offset * self.factor, (255 - self.offset) * self.factor
        self.pixels = Pixels(self.factor, low, high)

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def raw(self) -> Tensor:
        """The images as they are, uint8 (N, H, W, C)."""
        rows, columns = (slice(self.padding, self.padding + n) for n in (self.height, self.width))
        return self.padded[:, rows, columns]

    def with_raw(self, raw: Tensor, targets: Tensor) -> "Images":
        """Return other images, uint8 (M, H, W, C), that are normalised as these are."""
        other = copy(self)
        other.padding = 0
        other.height, other.width = raw.shape[1:3]
        other.padded = raw.contiguous().to(self.padded.device)
        other.targets = targets.to(self.targets.device)
        return other

    def rows(self, indices: Tensor) -> Batch:
        """Return the images at ``indices`` (B,), normalised and not augmented."""
        centre = torch.full((len(indices), 2), self.padding, device=indices.device)
        images = self._normalised(self._crop(indices, centre))
        return Batch(images, self.targets[indices], pixels=self.pixels)

    def batch(self, plan: Plan, step: int) -> Batch:
        """Return step ``step`` of a plan."""
        return self.take(plan.step(step))

    def take(self, chosen: Choices) -> Batch:
        """Return n images: gathered, cropped, flipped, normalised, cut out and mixed."""
        indices = chosen.indices
        if chosen.corners is None:
            plain = self.rows(indices)
            images, targets = plain.images, plain.targets
        else:
            images = self._normalised(self._crop(indices, chosen.corners))
            targets = self.targets[indices]
        if chosen.flips is not None:
            images = flip(images, chosen.flips)
        if chosen.holes is not None:
            images = cut_out(images, chosen.holes, chosen.cutout)
        batch = Batch(images, targets, drawn=chosen.drawn, pixels=self.pixels)
        if chosen.partners is None:
            return batch
        lam = share = chosen.lam
        if isinstance(lam, Tensor):
            lam = lam.to(images.dtype)
            share = lam[:, None, None, None]
        mixed = share * images + (1 - share) * images[chosen.partners]
        return replace(batch, images=mixed, mixed_targets=targets[chosen.partners], lam=lam)

    def _crop(self, indices: Tensor, corners: Tensor) -> Tensor:
        """Gather windows of the padded images: every window is a view, so this is one copy."""
        windows = self.padded.unfold(1, self.height, 1).unfold(2, self.width, 1)
        return windows[indices, corners[:, 0], corners[:, 1]]  # (B, C, H, W)

    def _normalised(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self.offset.dtype, memory_format=torch.channels_last)
        return pixels.sub_(self.offset).mul_(self.factor)


def flip(images: Tensor, flips: Tensor) -> Tensor:
    """Mirror those images (B, C, H, W) whose entry in ``flips`` (B,) is True."""
    return torch.where(flips[:, None, None, None], images.flip(-1), images)


def cut_out(images: Tensor, centres: Tensor, side: int) -> Tensor:
    """Set a square of ``side`` pixels around each centre (B, 2) to zero, the mean pixel.

    The square is clipped at the border, as in DeVries and Taylor (2017): rows and columns from
    centre - side // 2 up to, not including, centre + side // 2.
    """
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    half = side // 2
    in_rows = (rows >= centres[:, :1] - half) & (rows < centres[:, :1] + half)
    in_columns = (columns >= centres[:, 1:] - half) & (columns < centres[:, 1:] + half)
    hole = in_rows[:, None, :, None] & in_columns[:, None, None, :]
    return images.clone().masked_fill_(hole, 0)  # masked_fill would leave channels-last
