"""Images on the training device, and the mini-batches that a plan takes from them."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsam.base.randomness import uniform
from fedsam.base.timers import timed
from fedsam.data.store import Ahead, Store

if TYPE_CHECKING:  # both are made of what is here
    from fedsam.data.augment import Augmentation
    from fedsam.data.plan import Plan

AT_ONCE = 4 << 20  # bytes of a round's mini-batches: they stay in the cache until they are used
PIXELS_AT_A_TIME = 500 * 64 * 64  # what a network makes of them must fit the memory
# names of what is chosen for each image, beside what augmentations choose
INDEX = "index"  # its row of the data set
CORNER = "corner"  # of its window in the padded image: row and column
VALID = "valid"  # whether it is one: a cohort's mini-batches may be shorter than its tensors


@dataclass(frozen=True)
class Pixels:
    """What the numbers of normalised images mean.

    Attributes
    ----------
    unit : float or Tensor
        1/255 of a pixel's range; a tensor is (1, C, 1, 1).
    low, high : float or Tensor
        Black and white, alike.
    outside : int
        What targets that follow the pixels say where there is no image.
    """

    unit: float | Tensor = 1 / 255
    low: float | Tensor = 0.0
    high: float | Tensor = 1.0
    outside: int = 255


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
    keys : Tensor or None
        int64 (B,), a key of each image's own for ``uniform``, where the plan draws one.
    pixels : Pixels
        What the images' numbers mean, the same for all clients.
    """

    images: Tensor
    targets: Tensor
    mixed_targets: Tensor | None = None
    lam: float | Tensor = 1.0
    valid: Tensor | None = None
    keys: Tensor | None = None
    pixels: Pixels = Pixels()

    @property
    def aligned(self) -> bool:
        """Whether targets (B, H, W) say something of each pixel, and go where it goes."""
        return self.targets.dim() == self.images.dim() - 1

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
        if self.keys is None:
            raise ValueError("the plan draws nothing for the loss: let its class say draws = True")
        shape = self.images.shape[self.keys.dim() :]
        return uniform(self.keys, shape, self.images.dtype)

    def parts(self, size: int, least: int = 1) -> "list[tuple[float | Tensor, Batch]]":
        """Return sub-batches of ``size`` examples, the last maybe smaller, each after its share.

        One of fewer than ``least`` examples joins that before it. A share is the part of the
        mini-batch's examples, (K, 1) for K clients.
        """
        dim = 0 if self.valid is None else self.valid.dim() - 1
        length = self.targets.shape[dim]
        starts = [start for start in range(0, length, size) if length - start >= least or not start]
        pieces = [
            self.map(partial(torch.narrow, dim=dim, start=start, length=end - start))
            for start, end in zip(starts, [*starts[1:], length], strict=True)
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
        (N, ...), whatever the task reads; those of shape (N, H, W) follow the pixels.
    mean, std : tuple of float
        Of each channel, for pixel values in [0, 1].
    padding : int
        Zero pixels kept around each image, for the random crop.
    dtype : torch.dtype
        Of the mini-batches.
    device : torch.device
        Where everything lives.
    classes : Tensor, optional
        int64 (N,), what the images are sorted by; the targets, if None.
    outside : int
        What targets that follow the pixels say where there is no image.
    """

    stored = False  # whether pixels are read when they are asked for

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
        classes: Tensor | None = None,
        outside: int = 255,
    ) -> None:
        channels = images.shape[1]
        # rows of pixels: (N, H + 2p, W + 2p, C), so that what is gathered is channels-last
        rows = images.permute(0, 2, 3, 1)
        rows = F.pad(rows, [0, 0] + [padding] * 4) if padding else rows
        rows = rows.contiguous().to(device)
        self.outside = outside
        self._hold(rows, targets.to(device), padding)
        self.classes = self.targets if classes is None else classes.to(device)
        shape = (1, channels, 1, 1)
        self.offset = torch.tensor(mean, dtype=dtype).mul(255).view(shape).to(device)
        self.factor = torch.tensor(std, dtype=dtype).mul(255).reciprocal().view(shape).to(device)
        low, high = -self.offset * self.factor, (255 - self.offset) * self.factor
        self.pixels = Pixels(self.factor, low, high, outside)

    def __len__(self) -> int:
        return len(self.targets)

    def _hold(self, padded: Tensor, targets: Tensor, padding: int) -> None:
        """Take images (N, H + 2p, W + 2p, C), and targets, with a margin if they follow pixels."""
        self.padded, self.padding, self.targets = padded, padding, targets
        self.height, self.width = (side - 2 * padding for side in padded.shape[1:3])
        self._aligned: Tensor | None = None
        if targets.shape[1:] == (self.height, self.width):
            self._aligned = F.pad(targets, [padding] * 4, value=self.outside)

    @property
    def aligned(self) -> bool:
        """Whether targets say something of each pixel."""
        return self._aligned is not None

    def at_a_time(self, most: int) -> int:
        """Return how many images may be looked at together: ``most``, or fewer of large ones."""
        return max(1, min(most, PIXELS_AT_A_TIME // (self.height * self.width)))

    @property
    def raw(self) -> Tensor:
        """The images as they are, uint8 (N, H, W, C)."""
        rows, columns = (slice(self.padding, self.padding + n) for n in (self.height, self.width))
        return self.padded[:, rows, columns]

    def with_raw(self, raw: Tensor, targets: Tensor) -> "Images":
        """Return other images, uint8 (M, H, W, C), that are normalised as these are."""
        other = copy(self)
        device = self.padded.device
        other._hold(raw.contiguous().to(device), targets.to(device), 0)
        return other

    def only(self, rows: Tensor) -> "Images":
        """Return the images at ``rows`` (M,) alone, in this order, without a margin."""
        return self.with_raw(self.raw[rows], self.targets[rows])

    def at_hand(self, plan: "Plan") -> "tuple[Images, Plan]":
        """Return images on the device that hold what a plan takes, and the plan by their rows."""
        return self, plan

    def expect(self, rows: Iterable[Tensor]) -> None:
        """Take note of what the plans of the next cohort take, each client's rows, in order."""

    def room(self, many: int) -> "Images":
        """Return images whose memory is that of ``many``, for ``put``."""
        return self

    def put(self, begin: int, other: "Images") -> None:
        """Let other images take the place of those from row ``begin`` on."""
        rows = slice(begin, begin + len(other))
        self.padded[rows], self.targets[rows] = other.padded, other.targets
        if self._aligned is not None and other._aligned is not None:
            self._aligned[rows] = other._aligned

    def rows(self, indices: Tensor) -> Batch:
        """Return the images at ``indices`` (B,), normalised and not augmented."""
        return self._gathered(indices, None)

    def batch(self, plan: "Plan", step: int) -> Batch:
        """Return step ``step`` of a plan."""
        return self.take(plan.step(step), plan.augmentations)

    def batches(self, plan: "Plan") -> Iterator[Batch]:
        """Yield the steps of a plan; small ones that nothing is done to are gathered at once."""
        steps, width = plan.indices.shape
        pixels = steps * width * self.offset.numel() * self.height * self.width
        if steps == 1 or plan.augmentations or pixels * self.offset.element_size() > AT_ONCE:
            for step in range(steps):
                yield self.batch(plan, step)
            return
        every = self.take(plan.choices)
        for step, size in enumerate(plan.sizes):
            images, targets = every.images[step, :size], every.targets[step, :size]
            yield Batch(images, targets, pixels=self.pixels)

    @timed("gather and augment")
    def take(
        self, choices: Mapping[str, Tensor], augmentations: "Sequence[Augmentation]" = ()
    ) -> Batch:
        """Return a mini-batch, or those of K clients, gathered, cropped, normalised and augmented.

        Parameters
        ----------
        choices : mapping
            Tensors (B, ...), or (K, B, ...), by name.
        augmentations : sequence of Augmentation
            Applied in this order.
        """
        indices, corners = choices[INDEX], choices.get(CORNER)
        if indices.dim() == 1:
            batch = self._gathered(indices, corners)
        else:
            flat = self._gathered(
                indices.flatten(), None if corners is None else corners.flatten(0, 1)
            )
            batch = flat.map(lambda tensor: tensor.unflatten(0, indices.shape))
            batch = replace(batch, valid=choices.get(VALID))
        for augmentation in augmentations:
            batch = augmentation.apply(batch, choices)
        return batch

    def _gathered(self, indices: Tensor, corners: Tensor | None) -> Batch:
        """Return windows (B, C, H, W) at ``corners`` (B, 2), by default the centres, normalised."""
        images = self._normalised(self._crop(self.padded, indices, corners))
        if self._aligned is None:
            targets = self.targets[indices]
        else:
            targets = self._crop(self._aligned, indices, corners)
        return Batch(images, targets, pixels=self.pixels)

    def _crop(self, padded: Tensor, indices: Tensor, corners: Tensor | None) -> Tensor:
        """Gather windows (B, ..., H, W): every one is a view, so this is one copy."""
        if corners is None and not self.padding:
            whole = padded[indices]
            return whole.movedim(-1, 1) if whole.dim() == 4 else whole
        if corners is None:
            corners = torch.full((len(indices), 2), self.padding, device=indices.device)
        windows = padded.unfold(1, self.height, 1).unfold(2, self.width, 1)
        return windows[indices, corners[:, 0], corners[:, 1]]

    def _normalised(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self.offset.dtype, memory_format=torch.channels_last)
        return pixels.sub_(self.offset).mul_(self.factor)


class StoredImages(Images):
    """Images that stay in their files until some are needed: a client's round, or a few to test.

    What is read is an ``Images`` of its own, so that its bytes are those of a data set in memory.

    Parameters
    ----------
    images : Store
        The pixels, (N, H, W, C).
    targets : Tensor or Store
        (N, ...), whatever the task reads; a store of (N, H, W, 1) are targets that follow pixels.
    mean, std, padding, dtype, device, outside
        As ``Images`` has them.
    classes : Tensor, optional
        int64 (N,), what the images are sorted by; the targets, if None.
    """

    stored = True

    def __init__(
        self,
        images: Store,
        targets: Tensor | Store,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        padding: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        classes: Tensor | None = None,
        outside: int = 255,
    ) -> None:
        self._make = partial(
            Images, mean=mean, std=std, padding=padding, dtype=dtype, device=device, outside=outside
        )
        self._store, self._targets = images, targets
        none = torch.empty(0, dtype=torch.int64)
        pixels, nothing = images.read(none).permute(0, 3, 1, 2), self._targets_at(none)
        super().__init__(
            *(pixels, nothing, mean, std),
            padding=padding,
            dtype=dtype,
            device=device,
            classes=targets if classes is None and isinstance(targets, Tensor) else classes,
            outside=outside,
        )
        if isinstance(targets, Tensor):
            self.targets = targets.to(device)
        self._ahead = Ahead(self._fetched, math.prod(images.shape[1:]))

    def __len__(self) -> int:
        return len(self._store)

    def only(self, rows: Tensor) -> Images:
        """Return the images at ``rows`` (M,) alone, in this order, without a margin."""
        images, places = self._read(rows)
        return images.only(places)

    def with_raw(self, raw: Tensor, targets: Tensor) -> Images:
        """Return other images, uint8 (M, H, W, C), that are normalised as these are."""
        return self._make(raw.permute(0, 3, 1, 2), targets, padding=0)

    def at_hand(self, plan: "Plan") -> "tuple[Images, Plan]":
        """Return images on the device that hold what a plan takes, and the plan by their rows."""
        images, places = self._read(plan.indices)
        return images, plan.at(places)

    def expect(self, rows: Iterable[Tensor]) -> None:
        """Begin to read what the plans of the next cohort take, each client's rows, in order."""
        self._ahead.expect([of_client.unique() for of_client in rows])

    def room(self, many: int) -> Images:
        """Return images whose memory is that of ``many``, for ``put``."""
        height, width, channels = self._store.shape[1:]
        like = self._targets_at(torch.empty(0, dtype=torch.int64))
        targets = torch.zeros(many, *like.shape[1:], dtype=like.dtype)
        return self._make(torch.zeros(many, channels, height, width, dtype=torch.uint8), targets)

    def _gathered(self, indices: Tensor, corners: Tensor | None) -> Batch:
        """Return windows (B, C, H, W) at ``corners`` (B, 2), by default the centres, normalised."""
        images, places = self._read(indices)
        return images._gathered(places, corners)

    def _read(self, rows: Tensor) -> tuple[Images, Tensor]:
        """Return images that hold these rows, and where among them each is."""
        distinct, places = rows.cpu().unique(return_inverse=True)
        pixels, targets = self._ahead.take(distinct)
        return self._make(pixels.permute(0, 3, 1, 2), targets), places.to(rows.device)

    def _fetched(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return pixels (n, H, W, C) and targets at rows (n,), on the CPU."""
        return self._store.read(rows), self._targets_at(rows)

    def _targets_at(self, rows: Tensor) -> Tensor:
        targets = self._targets
        return targets[rows] if isinstance(targets, Tensor) else targets.read(rows)[..., 0]


def images_of(images: Tensor | Store, targets: Any, *of: Any, **options: Any) -> Images:
    """Return images in memory, or those of a store, by what the pixels are."""
    if isinstance(images, Tensor):
        return Images(images, targets, *of, **options)
    return StoredImages(images, targets, *of, **options)
