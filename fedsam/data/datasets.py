"""A data set as tensors in memory, and the check of one that somebody made."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsam.base.errors import UsageError
from fedsam.data import groups
from fedsam.data.groups import Groups


@dataclass(frozen=True)
class Dataset:
    """Images and their targets, for training and for testing.

    Attributes
    ----------
    name : str
        What it is called.
    train_images, test_images : Tensor
        uint8 (N, C, H, W).
    train_labels, test_labels : Tensor
        int64 (N,), from 0 to ``classes - 1``; or masks, uint8 (N, H, W), that of each pixel.
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
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
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
    def classes_of_train(self) -> Tensor:
        """What splits sort the training images by."""
        return self.train_labels if self.train_classes is None else self.train_classes

    @property
    def classes_of_test(self) -> Tensor:
        """What splits sort the test images by."""
        return self.test_labels if self.test_classes is None else self.test_classes


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
        images, labels = (getattr(dataset, f"{part}_{kind}") for kind in ("images", "labels"))
        require(
            _is(images, torch.uint8, 4),
            f"{part}_images must be a uint8 tensor (N, C, H, W), got {_told(images)}",
        )
        masks = _is(labels, torch.uint8, 3)
        require(
            masks or _is(labels, torch.int64, 1),
            f"{part}_labels must be an int64 tensor (N,), or uint8 (N, H, W), got {_told(labels)}",
        )
        require(images[:1].numel() > 0 or not len(images), f"{part}_images have no pixels")
        counts = f"{part} has {len(images)} images, {len(labels)} labels"
        require(len(images) == len(labels), counts)
        if part == "test" and not len(images) and dataset.train_domains is not None:
            continue
        require(len(images) > 0, counts)
        if masks:
            same = images.shape[2:] == labels.shape[1:]
            sizes = f"{tuple(labels.shape[1:])} for images of {tuple(images.shape[2:])}"
            require(same, f"{part}_labels are of {sizes}")
        valid = labels if dataset.ignore is None else labels[labels != dataset.ignore]
        require(len(valid) > 0, f"{part}_labels are all {dataset.ignore}, which is ignored")
        inside = int(valid.min()) >= 0 and int(valid.max()) < dataset.classes
        but = "" if dataset.ignore is None else f", or be {dataset.ignore}"
        require(inside, f"{part}_labels must lie in 0..{dataset.classes - 1}{but}")
        if (classes := getattr(dataset, f"{part}_classes")) is not None:
            one_each = _is(classes, torch.int64, 1) and len(classes) == len(images)
            require(one_each, f"{part}_classes must be int64, one an image, got {_told(classes)}")
            require(int(classes.min()) >= 0, f"{part}_classes must be numbers from 0")
    if (owners := dataset.owners) is not None:
        one_each = _is(owners, torch.int64, 1) and len(owners) == len(dataset.train_images)
        require(one_each, f"owners must be int64, one a training image, got {_told(owners)}")
        held = owners.unique()
        require(
            torch.equal(held, torch.arange(len(held))),
            "owners must be numbers from 0, each of an image at least",
        )
    _check_domains(dataset, require)
    shape, other = dataset.train_images.shape[1:], dataset.test_images.shape[1:]
    require(shape == other, f"images of {tuple(shape)} for training and {tuple(other)} for testing")
    for name in ("mean", "std"):
        values = getattr(dataset, name)
        long = isinstance(values, tuple | list) and len(values) == shape[0]
        require(long, f"{name} must have {shape[0]} entries, one a channel")
        require(all(map(math.isfinite, values)), f"{name} must be finite")
    require(min(dataset.std) > 0, "std must be positive")
    if dataset.test_groups is not None:
        where = f"--dataset {dataset.name}: test_groups"
        groups.check(dataset.test_groups, len(dataset.test_labels), where)


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
