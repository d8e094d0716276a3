"""What a data set consists of before a pixel is read: where pictures lie, and what they show."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsam.base.errors import UsageError, nearest, some
from fedsam.base.randomness import numpy_generator
from fedsam.data.datasets import Dataset
from fedsam.data.groups import by_name
from fedsam.data.partitions.csv import rank
from fedsam.data.sources.pictures import Levels, Picture, PictureError, all_of, read, read_mask

TRAINING = "train"
TESTING = ("test", "val", "valid", "validation")  # names of parts; the first that occurs is taken
HELD_OUT = 5  # of so many images of a class one is for testing, where no part is
MOST_BYTES = 4 << 30  # of pixels that are held in memory; a network's and a plan's come on top


@dataclass(frozen=True)
class Part:
    """The pictures for training, or those for testing.

    Attributes
    ----------
    images : sequence of str or Encoded
        Paths, or what is encoded, which may be made row by row; length N.
    targets : array or sequence of str
        int64 (N,), numbers of classes; or the paths of N masks.
    owners : array, optional
        int64 (N,), whose each is: a number of ``Listing.owners``.
    domains : array, optional
        int64 (N,), of which domain each is: a number of ``Listing.domains``.
    classes : array, optional
        int64 (N,), from 0: what splits sort images by where the targets are masks; by default
        their domains.
    groups : array, optional
        int64 (N,), of the test pictures: a number of ``Listing.groups``.
    """

    images: Sequence[Picture]
    targets: NDArray[np.int64] | Sequence[str]
    owners: NDArray[np.int64] | None = None
    domains: NDArray[np.int64] | None = None
    classes: NDArray[np.int64] | None = None
    groups: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Listing:
    """A data set whose pixels are still in its files.

    Attributes
    ----------
    name : str
        What it is called.
    train, test : Part
        Each of one picture at least.
    classes : tuple of str
        The names of the classes, by number.
    owners, domains : tuple of str
        The names of owners and domains, by number; empty where there are none.
    task : str
        What reads the targets, unless --task says something else.
    ignore : int, optional
        What masks say of pixels of no class.
    mask_values : array, optional
        uint8 (256,), what each byte of a mask's file means; by default itself.
    groups : tuple of str
        The names of groups of test pictures, by number; empty where there are none.
    size : tuple of int, optional
        Height and width that all pictures and masks are pressed to; by default their own.
    """

    name: str
    train: Part
    test: Part
    classes: tuple[str, ...]
    owners: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    task: str = "classification"
    ignore: int | None = None
    mask_values: NDArray[np.uint8] | None = None
    groups: tuple[str, ...] = ()
    size: tuple[int, int] | None = None

    def image(self, picture: Picture, channels: int) -> NDArray[np.uint8]:
        """Return the pixels (H, W, C) of a picture; raise PictureError if it cannot be read."""
        return read(picture, 0, channels, size=self.size)

    def pair(
        self, pair: tuple[Picture, str], channels: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Return the pixels (H, W, C) of a picture and its mask (H, W), of classes or ``ignore``.

        Raises
        ------
        PictureError
            If one cannot be read, or they do not belong together.
        """
        picture, path = pair
        pixels, mask = self.image(picture, channels), read_mask(path, self.size)
        if mask.shape != pixels.shape[:2]:
            sizes = " and ".join(f"{h} x {w}" for h, w in (mask.shape, pixels.shape[:2]))
            raise PictureError(f"{path} (mask and image are of {sizes} pixels)")
        if self.mask_values is not None:
            mask = self.mask_values[mask]
        wrong = mask[(mask >= len(self.classes)) & (mask != self.ignore)]
        if wrong.size:
            but = "" if self.ignore is None else f", or {self.ignore}"
            most = len(self.classes) - 1
            raise PictureError(f"{path} (holds {wrong[0]}; must be 0..{most}{but})")
        return pixels, mask


@dataclass(frozen=True)
class Columns:
    """A table of pictures, a row each, as files and folders say it.

    Attributes
    ----------
    images : sequence of str or Encoded
        N of them.
    labels : array of str
        (N,), the names of their classes.
    owners, domains : array of str, optional
        (N,), whose and of which domain each is.
    parts : array of str, optional
        (N,), "train" or a name of ``TESTING``; of those names the first that occurs is for testing,
        others are left out. None, or none of them: a fifth of each class is for testing.
    """

    images: Sequence[Picture]
    labels: NDArray[np.str_]
    owners: NDArray[np.str_] | None = None
    domains: NDArray[np.str_] | None = None
    parts: NDArray[np.str_] | None = None


class Rows(Sequence[Picture]):
    """Some of the pictures of a sequence, which is asked when one is wanted."""

    def __init__(self, images: Sequence[Picture], rows: NDArray[np.int64]) -> None:
        self.images, self.rows = images, rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, row: int) -> Picture: ...
    @overload
    def __getitem__(self, row: slice) -> "Rows": ...
    def __getitem__(self, row: int | slice) -> "Picture | Rows":
        """Return one, or some of these."""
        if isinstance(row, slice):
            return Rows(self.images, self.rows[row])
        return self.images[int(self.rows[row])]


def listed(
    name: str, where: str, columns: Columns, classes: Sequence[str] = (), only: Sequence[str] = ()
) -> Listing:
    """Return the data set that a table describes.

    Classes and owners are numbered in the order of their names, numbers by value; owners who have
    no picture for training are left out.

    Parameters
    ----------
    name : str
        What it is called.
    where : str
        What messages begin with.
    columns : Columns
        The table.
    classes : sequence of str
        All classes in the order of their numbers; none: those that occur.
    only : sequence of str
        Classes that are taken, in the order of their numbers; none: all.

    Raises
    ------
    UsageError
        If a part is empty, or a class for testing is in no picture for training.
    """
    if isinstance(only, str):
        raise UsageError(f"--dataset-options: classes must be a list, such as [cat], got {only!r}")
    only = tuple(map(str, only))
    classes = only or tuple(classes) or tuple(sorted(set(columns.labels.tolist()), key=rank))
    number = {label: n for n, label in enumerate(classes)}
    if only:
        occur = set(columns.labels.tolist())
        if unknown := [label for label in only if label not in occur]:
            raise UsageError(f"{where}: no class {unknown[0]!r}{nearest(unknown[0], occur)}")
    targets = np.array([number.get(label, -1) for label in columns.labels.tolist()], np.int64)
    domain_names, domains = _numbered(columns.domains)
    owner_names, owners = _numbered(columns.owners)
    train, test = _parts(where, columns)
    by_rule = not test.any()
    if by_rule:
        test = train & held_out(np.where(train, targets, -1), domains, owners)
        train = train & ~test
    rows = [np.flatnonzero(part & (targets >= 0)) for part in (train, test)]
    for part, held in zip(("training", "testing"), rows, strict=True):
        if not len(held):
            few = f"; a class needs {HELD_OUT} for one to be held out" if by_rule else ""
            raise UsageError(f"{where}: no picture for {part}{few}")
    if new := sorted(set(targets[rows[1]].tolist()) - set(targets[rows[0]].tolist())):
        names = some([repr(classes[number]) for number in new])
        raise UsageError(f"{where}: no picture for training of class {names}, only for testing")
    whole = Part(columns.images, targets, owners, domains)
    of_train, of_test = (_taken(whole, held) for held in rows)
    if of_train.owners is not None:
        training, numbers = np.unique(of_train.owners, return_inverse=True)
        owner_names = tuple(owner_names[number] for number in training)
        of_train = replace(of_train, owners=numbers)
    of_test = replace(of_test, owners=None)
    return Listing(name, of_train, of_test, classes, owner_names, domain_names)


def held_out(targets: NDArray[np.int64], *within: NDArray[np.int64] | None) -> NDArray[np.bool_]:
    """Return which images are for testing where no part is: a fifth of each class.

    The same whatever the run's seed. A class has n // 5 of its n images there, spread evenly over
    ``within``: of the m images of a class in one domain m / 5, one more or less.

    Parameters
    ----------
    targets : array
        int64 (N,).
    *within : array or None
        int64 (N,), domains and owners.

    Returns
    -------
    array
        bool (N,).
    """
    shuffled = numpy_generator(0, "held out").permutation(len(targets))
    keys = [shuffled, *(column for column in reversed(within) if column is not None), targets]
    order = np.lexsort(keys)
    of_class = targets[order]
    place = np.arange(len(order)) - np.searchsorted(of_class, of_class)
    out = np.zeros(len(targets), dtype=bool)
    out[order] = place % HELD_OUT == HELD_OUT - 1
    return out


def in_memory(
    listing: Listing, where: str, *, side: int = 0, channels: int = 3, crop: bool = True
) -> Dataset:
    """Return a data set with its pixels, and their mean and standard deviation.

    Parameters
    ----------
    listing : Listing
        What it consists of.
    where : str
        What messages begin with.
    side : int
        Pixels of the square that each picture becomes; 0: they are all of one size already, as
        those with masks must be.
    channels : int
        3, or 1 for grey.
    crop : bool
        Whether a square is cut out of the middle (``pictures.read``), not pressed.

    Raises
    ------
    UsageError
        If pictures cannot be read, are of several sizes, or too many for the memory.
    """
    if isinstance(side, bool) or not isinstance(side, int) or side < 0:
        raise UsageError(f"--dataset-options: side must be a number of pixels, got {side!r}")
    if channels not in (1, 3) or isinstance(channels, bool):
        raise UsageError(f"--dataset-options: channels must be 3, or 1 for grey, got {channels!r}")
    if not isinstance(crop, bool):
        raise UsageError(f"--dataset-options: crop must be true or false, got {crop!r}")
    masked = not isinstance(listing.train.targets, np.ndarray)
    if side and masked:
        raise UsageError(
            "--dataset-options: side: pictures with masks keep their size here; pack them with "
            "another (python -m fedsam.pack)"
        )
    levels = Levels(channels)
    planes = (channels + masked, len(listing.train) + len(listing.test))
    if side:
        _check_fits(where, (side, side), planes)
    reading = partial(_read, listing, where=where, side=side, channels=channels, crop=crop)
    train, masks = _stacked(reading(listing.train), len(listing.train), where, planes, levels)
    test, test_masks = _stacked(
        reading(listing.test), len(listing.test), where, planes, None, train.shape[2:]
    )
    return Dataset(
        listing.name,
        torch.from_numpy(train),
        _tensor(masks if masked else listing.train.targets),
        torch.from_numpy(test),
        _tensor(test_masks if masked else listing.test.targets),
        len(listing.classes),
        levels.mean,
        levels.std,
        listing.task,
        _tensor(listing.train.classes),
        _tensor(listing.test.classes),
        _tensor(listing.train.owners),
        _tensor(listing.train.domains),
        _tensor(listing.test.domains),
        listing.domains,
        listing.ignore,
        by_name(_tensor(listing.test.groups), listing.groups),
    )


def _tensor(column: Any) -> Tensor | None:
    return None if column is None else torch.from_numpy(np.asarray(column))


def _read(
    listing: Listing, part: Part, *, where: str, side: int, channels: int, crop: bool
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Yield the pixels (H, W, C) of each picture, and its mask (H, W), empty if there are none."""
    if isinstance(part.targets, np.ndarray):
        reading = partial(read, side=side, channels=channels, crop=crop, size=listing.size)
        nothing = np.empty((0, 0), np.uint8)
        yield from ((pixels, nothing) for pixels in all_of(part.images, reading, where))
    else:
        pairs = list(zip(part.images, part.targets, strict=True))
        yield from all_of(pairs, partial(listing.pair, channels=channels), where)


def _stacked(
    pairs: Iterable[tuple[NDArray[np.uint8], NDArray[np.uint8]]],
    count: int,
    where: str,
    planes: tuple[int, int],
    levels: Levels | None,
    size: tuple[int, ...] = (),
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return ``count`` images (N, C, H, W), all of one size, and their masks (N, H, W)."""
    images = masks = np.empty(0, np.uint8)
    for row, (pixels, mask) in enumerate(pairs):
        if not row:
            size = size or pixels.shape[:2]
            _check_fits(where, size, planes)
            images = np.empty((count, pixels.shape[2], *size), np.uint8)
            masks = np.empty((count, *(size if mask.size else mask.shape)), np.uint8)
        if pixels.shape[:2] != size:
            sizes = " and ".join(f"{h} x {w}" for h, w in (size, pixels.shape[:2]))
            how = "python -m fedsam.pack" if mask.size else "--dataset-options '{side: 64}'"
            raise UsageError(
                f"{where}: pictures of {sizes} pixels; give one size, such as by {how}"
            )
        images[row], masks[row] = pixels.transpose(2, 0, 1), mask
        if levels:
            levels.add(pixels)
    return images, masks


def _check_fits(where: str, size: tuple[int, ...], planes: tuple[int, int]) -> None:
    """Raise UsageError if so many planes of pixels an image, of so many images, are too much."""
    needed = int(np.prod(size) * np.prod(planes))
    if needed > MOST_BYTES:
        raise UsageError(
            f"{where}: {planes[1]:,} pictures of {size[0]} x {size[1]} pixels take "
            f"{needed / 2**30:.1f} GiB, of which memory holds {MOST_BYTES >> 30}: give a smaller "
            "side, or pack them (python -m fedsam.pack)"
        )


def _parts(where: str, columns: Columns) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which rows are for training, and which for testing, as the table says."""
    if columns.parts is None:
        return np.ones(len(columns.labels), bool), np.zeros(len(columns.labels), bool)
    occur = set(columns.parts.tolist())
    if unknown := sorted(occur - {TRAINING, *TESTING}):
        names = ", ".join((TRAINING, *TESTING))
        raise UsageError(f"{where}: a part must be one of {names}, got {some(unknown)}")
    testing = next((name for name in TESTING if name in occur), None)
    return columns.parts == TRAINING, columns.parts == testing


def _numbered(
    names: NDArray[np.str_] | None,
) -> tuple[tuple[str, ...], NDArray[np.int64] | None]:
    """Return the names that occur, in order, and which of them each is."""
    if names is None:
        return (), None
    occur, inverse = np.unique(names, return_inverse=True)
    order = sorted(range(len(occur)), key=lambda n: rank(str(occur[n])))
    return tuple(str(occur[n]) for n in order), np.argsort(order)[inverse]


def _taken(part: Part, rows: NDArray[np.int64]) -> Part:
    """Return the images of a part at rows (n,)."""

    def at(column: NDArray[np.int64] | None) -> NDArray[np.int64] | None:
        return None if column is None else column[rows]

    images, targets = Rows(part.images, rows), np.asarray(part.targets)[rows]
    return Part(images, targets, at(part.owners), at(part.domains))
