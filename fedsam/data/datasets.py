"""A data set, in memory or in files, and the check of one that somebody made."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsam.base.errors import UsageError
from fedsam.data import groups
from fedsam.data.groups import Groups
from fedsam.data.store import Store


@dataclass(frozen=True)
class Dataset:
    """Images and their targets, for training and for testing.

    Attributes
    ----------
    name : str
        What it is called.
    train_images, test_images : Tensor or Store
        uint8 (N, C, H, W); or images that are read from files, whose store says (N, H, W, C). H
        and W of the test images may be others, where the network can take both.
    train_labels, test_labels : Tensor or Store
        int64 (N,), from 0 to ``classes - 1``; or masks, uint8 (N, H, W), that of each pixel, in a
        store (N, H, W, 1).
    classes : int
        Number of classes.
    mean, std : tuple of float
        Of each channel over the training images, for pixel values in [0, 1].
    task : str
        What reads the labels, unless --task says something else.
    train_classes, test_classes : Tensor, optional
        int64 (N,), from 0: what splits and pictures sort images by. None: the labels.
    owners : Tensor, optional
        int64 (N,), from 0: whose a training image is, where the data say so (--partition natural).
    train_domains, test_domains : Tensor, optional
        int64 (N,), from 0: which kind of images one is of, where there are several (photos and
        sketches, one hospital's and another's); both or neither.
    domain_names : tuple of str
        What they are called, each of a training image at least. With domains, there may be no test
        images: a tenth of each domain is held out for testing then.
    ignore : int, optional
        The target of pixels that are of no class, and of what lies outside of an image.
    test_groups : mapping, optional
        Rows of the test set, int64 (n,), that are also told of by this name; they may overlap.
    """

    name: str
    train_images: Any
    train_labels: Any
    test_images: Any
    test_labels: Any
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    task: str = "classification"
    train_classes: Tensor | None = None
    test_classes: Tensor | None = None
    owners: Tensor | None = None
    train_domains: Tensor | None = None
    test_domains: Tensor | None = None
    domain_names: tuple[str, ...] = ()
    ignore: int | None = None
    test_groups: Groups | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image: channels, height and width."""
        return shape_of(self.train_images)

    @property
    def classes_of_train(self) -> Any:
        """What splits sort the training images by."""
        return self.train_labels if self.train_classes is None else self.train_classes

    @property
    def classes_of_test(self) -> Any:
        """What splits sort the test images by."""
        return self.test_labels if self.test_classes is None else self.test_classes


def shape_of(images: Tensor | Store) -> tuple[int, int, int]:
    """Return the channels, height and width of images (N, C, H, W), or of a store's."""
    _, *shape = images.shape
    channels, height, width = shape if isinstance(images, Tensor) else (shape[2], *shape[:2])
    return channels, height, width


def check(dataset: Dataset) -> None:
    """Check a data set that somebody made.

    Raises
    ------
    UsageError
        One line that says what is wrong with it.
    """

    def require(holds: bool, what: str) -> None:
        if not holds:
            raise UsageError(f"--dataset {getattr(dataset, 'name', dataset)}: {what}")

    require(isinstance(dataset, Dataset), "the function must return a fedsam.data.datasets.Dataset")
    for part in ("train", "test"):
        _check_part(dataset, part, require)
    if (owners := dataset.owners) is not None:
        one_each = _is(owners, torch.int64, 1) and len(owners) == len(dataset.train_images)
        require(one_each, f"owners must be int64, one a training image, got {_told(owners)}")
        held = owners.unique()
        require(
            torch.equal(held, torch.arange(len(held))),
            "owners must be numbers from 0, each of an image at least",
        )
    _check_domains(dataset, require)
    shape, other = dataset.shape, shape_of(dataset.test_images)
    channels = f"images of {shape[0]} channels for training and {other[0]} for testing"
    require(shape[0] == other[0], channels)
    for name in ("mean", "std"):
        values = getattr(dataset, name)
        long = isinstance(values, tuple | list) and len(values) == shape[0]
        require(long, f"{name} must have {shape[0]} entries, one a channel")
        require(all(map(math.isfinite, values)), f"{name} must be finite")
    require(min(dataset.std) > 0, "std must be positive")
    if dataset.test_groups is not None:
        where = f"--dataset {dataset.name}: test_groups"
        groups.check(dataset.test_groups, len(dataset.test_labels), where)


def _check_part(dataset: Dataset, part: str, require: Callable[[bool, str], None]) -> None:
    """Check the images for training, or for testing, and what belongs to each."""
    images, labels = (getattr(dataset, f"{part}_{kind}") for kind in ("images", "labels"))
    require(
        _is(images, torch.uint8, 4) or isinstance(images, Store),
        f"{part}_images must be a uint8 tensor (N, C, H, W), got {_told(images)}",
    )
    masks = _is(labels, torch.uint8, 3) or isinstance(labels, Store)
    require(
        masks or _is(labels, torch.int64, 1),
        f"{part}_labels must be an int64 tensor (N,), or uint8 (N, H, W), got {_told(labels)}",
    )
    require(math.prod(shape_of(images)) > 0, f"{part}_images have no pixels")
    counts = f"{part} has {len(images)} images, {len(labels)} labels"
    require(len(images) == len(labels), counts)
    if part == "test" and not len(images) and dataset.train_domains is not None:
        return
    require(len(images) > 0, counts)
    if masks:
        size = tuple(labels.shape[1:3])
        sizes = f"{size} for images of {shape_of(images)[1:]}"
        require(shape_of(images)[1:] == size, f"{part}_labels are of {sizes}")
    if isinstance(labels, Store):  # whose values are seen when they are read
        stored = isinstance(images, Store) and labels.shape[3] == 1
        require(stored, f"{part}_labels in a store must be (N, H, W, 1), beside images in one")
    else:
        valid = labels if dataset.ignore is None else labels[labels != dataset.ignore]
        require(len(valid) > 0, f"{part}_labels are all {dataset.ignore}, which is ignored")
        inside = int(valid.min()) >= 0 and int(valid.max()) < dataset.classes
        but = "" if dataset.ignore is None else f", or be {dataset.ignore}"
        require(inside, f"{part}_labels must lie in 0..{dataset.classes - 1}{but}")
    if (classes := getattr(dataset, f"{part}_classes")) is not None:
        one_each = _is(classes, torch.int64, 1) and len(classes) == len(images)
        require(one_each, f"{part}_classes must be int64, one an image, got {_told(classes)}")
        require(int(classes.min()) >= 0, f"{part}_classes must be numbers from 0")
    else:
        require(not masks, f"{part}_labels are masks: give {part}_classes, what splits sort by")


def _check_domains(dataset: Dataset, require: Callable[[bool, str], None]) -> None:
    """Check which images are of which domain, by what the data set has to hold."""
    names = dataset.domain_names
    if dataset.train_domains is None and dataset.test_domains is None and not names:
        return
    texts = isinstance(names, tuple) and all(isinstance(name, str) and name for name in names)
    require(texts, f"domain_names must be a tuple of texts, got {names!r:.80}")
    require(len(set(names)) == len(names), f"domain_names must differ, got {names!r:.80}")
    for part in ("train", "test"):
        domains, images = (getattr(dataset, f"{part}_{kind}") for kind in ("domains", "images"))
        one_each = _is(domains, torch.int64, 1) and len(domains) == len(images)
        require(one_each, f"{part}_domains must be int64, one an image, got {_told(domains)}")
        inside = not len(domains) or 0 <= int(domains.min()) <= int(domains.max()) < len(names)
        require(inside, f"{part}_domains must be places in domain_names, 0..{len(names) - 1}")
        held = set(domains.tolist())
        if part == "train" and (empty := [n for p, n in enumerate(names) if p not in held]):
            require(False, f"domain_names: {empty[0]!r} has no training image")


def _is(value: object, dtype: torch.dtype, dimensions: int) -> bool:
    return isinstance(value, Tensor) and value.dtype == dtype and value.ndim == dimensions


def _told(value: object) -> str:
    """Return what a value is, for the one who expected something else."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return f"an object of type {type(value).__name__}"
