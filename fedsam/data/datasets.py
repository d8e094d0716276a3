"""Benchmark data sets as tensors in memory: digits, MNIST, Fashion-MNIST, CIFAR-10/100, SVHN."""

import gzip
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsam.base.errors import UsageError, nearest

DEBIAN = Path("/usr/share/datasets")  # where Debian's package dataset-fashion-mnist puts its files
IDX = (  # the files of MNIST and those in its format, with their dimensions
    ("train-images-idx3-ubyte", 3),
    ("train-labels-idx1-ubyte", 1),
    ("t10k-images-idx3-ubyte", 3),
    ("t10k-labels-idx1-ubyte", 1),
)


@dataclass(frozen=True)
class Dataset:
    """Images and labels, for training and for testing.

    Attributes
    ----------
    name : str
        What it is called.
    train_images, test_images : Tensor
        uint8 (N, C, H, W).
    train_labels, test_labels : Tensor
        int64 (N,), from 0 to ``classes - 1``.
    classes : int
        Number of classes.
    mean, std : tuple of float
        Of each channel over the training images, for pixel values in [0, 1].
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load(name: str, root: Path) -> Dataset:
    """Return a data set by name.

    Parameters
    ----------
    name : str
        One of ``LOADERS``.
    root : Path
        Folder that holds the data sets in torchvision's layout (for MNIST and Fashion-MNIST also
        the .gz files in a folder ``mnist`` or ``fashion-mnist``, Debian's layout). What is not
        there is downloaded into it.

    Raises
    ------
    UsageError
        If there is no such data set, it can't be downloaded, or its files are damaged.
    """
    if name not in LOADERS:
        raise UsageError(
            f"--dataset: no {name!r}{nearest(name, LOADERS)}; have {', '.join(LOADERS)}, "
            "or package.module:function"
        )
    dataset = LOADERS[name](root)
    check(dataset)
    return dataset


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
        require(
            _is(labels, torch.int64, 1),
            f"{part}_labels must be an int64 tensor (N,), got {_told(labels)}",
        )
        require(images[:1].numel() > 0 or not len(images), f"{part}_images have no pixels")
        require(
            len(images) == len(labels) > 0, f"{part} has {len(images)} images, {len(labels)} labels"
        )
        inside = int(labels.min()) >= 0 and int(labels.max()) < dataset.classes
        require(inside, f"{part}_labels must lie in 0..{dataset.classes - 1}")
    shape, other = dataset.train_images.shape[1:], dataset.test_images.shape[1:]
    require(shape == other, f"images of {tuple(shape)} for training and {tuple(other)} for testing")
    for name in ("mean", "std"):
        values = getattr(dataset, name)
        long = isinstance(values, tuple | list) and len(values) == shape[0]
        require(long, f"{name} must have {shape[0]} entries, one a channel")
        require(all(map(math.isfinite, values)), f"{name} must be finite")
    require(min(dataset.std) > 0, "std must be positive")


def _is(value: object, dtype: torch.dtype, dimensions: int) -> bool:
    return isinstance(value, Tensor) and value.dtype == dtype and value.ndim == dimensions


def _told(value: object) -> str:
    """Return what a value is, for the one who expected something else."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return f"an object of type {type(value).__name__}"


def digits(root: Path) -> Dataset:
    """Scikit-learn's handwritten digits: 1,797 real images of 8 x 8 pixels, bundled with it.

    A fifth of each class is for testing, the same whatever the run's seed.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy((bunch.images * (255 / 16)).round().astype(np.uint8))[:, None]
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    rank = torch.empty_like(labels)  # of an image within its class, in the order of the file
    for digit in range(10):
        rank[labels == digit] = torch.arange(int((labels == digit).sum()))
    test = rank % 5 == 4
    parts = images[~test], labels[~test], images[test], labels[test]
    return Dataset("digits", *parts, 10, (0.3052,), (0.3760,))


def mnist(root: Path) -> Dataset:
    """LeCun's handwritten digits: 60,000 + 10,000 images of 28 x 28 pixels."""
    return _idx("mnist", "MNIST", root, (0.1307,), (0.3081,))


def fashion_mnist(root: Path) -> Dataset:
    """Zalando's articles of clothing: 60,000 + 10,000 images of 28 x 28 pixels."""
    return _idx("fashion-mnist", "FashionMNIST", root, (0.2860,), (0.3530,))


def cifar10(root: Path) -> Dataset:
    """CIFAR-10: 50,000 + 10,000 colour images of 32 x 32 pixels, with its true statistics."""
    statistics = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    return _cifar("cifar10", "CIFAR10", "cifar-10-batches-py", root, *statistics)


def cifar100(root: Path) -> Dataset:
    """CIFAR-100: 50,000 + 10,000 colour images of 32 x 32 pixels, with its true statistics."""
    statistics = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    return _cifar("cifar100", "CIFAR100", "cifar-100-python", root, *statistics)


def svhn(root: Path) -> Dataset:
    """Street View House Numbers: 73,257 + 26,032 colour images of 32 x 32 pixels."""
    sets = [
        _torchvision("svhn", "SVHN", root, "train_32x32.mat and test_32x32.mat", split=split)
        for split in ("train", "test")
    ]
    train, test = (
        (torch.from_numpy(np.ascontiguousarray(s.data)), torch.from_numpy(s.labels).long())
        for s in sets
    )
    return Dataset("svhn", *train, *test, 10, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))


LOADERS: dict[str, Callable[[Path], Dataset]] = {
    "digits": digits,
    "mnist": mnist,
    "fashion-mnist": fashion_mnist,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "svhn": svhn,
}


def _cifar(
    name: str, cls: str, folder: str, root: Path, mean: tuple[float, ...], std: tuple[float, ...]
) -> Dataset:
    sets = [
        _torchvision(name, cls, root, f"the folder {folder}", train=part) for part in (True, False)
    ]
    train, test = (
        (torch.from_numpy(s.data).permute(0, 3, 1, 2), torch.tensor(s.targets, dtype=torch.int64))
        for s in sets
    )
    return Dataset(name, *train, *test, len(sets[0].classes), mean, std)


def _torchvision(name: str, cls: str, root: Path, files: str, **part: Any) -> Any:
    """Return one of torchvision's data sets; it checks what is there, and downloads what is not."""
    from torchvision import datasets

    make = getattr(datasets, cls)
    try:
        return make(root, download=True, **part)
    # RuntimeError: wrong checksum; HTTPException: a server's nonsense, which is no OSError
    except (OSError, RuntimeError, HTTPException) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise UsageError(
            f"--data-root {root}: {name} is missing there, or damaged, and cannot be downloaded "
            f"({reason}); put {files} there, as torchvision names them"
        ) from error


def _idx(
    name: str, cls: str, root: Path, mean: tuple[float, ...], std: tuple[float, ...]
) -> Dataset:
    """Return MNIST or a data set in its format, from where its four files are."""
    for folder in (root / name, root / cls / "raw", DEBIAN / name):
        if all(any(folder.glob(f"{file}*")) for file, _ in IDX):
            break
    else:
        _torchvision(name, cls, root, f"its four .gz files in a folder {name}")
        folder = root / cls / "raw"
    images, labels, test_images, test_labels = (_read_idx(folder, *file) for file in IDX)
    train, test = (images[:, None], labels.long()), (test_images[:, None], test_labels.long())
    return Dataset(name, *train, *test, 10, mean, std)


def _read_idx(folder: Path, name: str, dimensions: int) -> Tensor:
    """Return the array of an IDX file of bytes, compressed or not: magic, sizes, data."""
    plain, packed = folder / name, folder / f"{name}.gz"
    file = plain if plain.is_file() else packed
    try:
        content = plain.read_bytes() if file == plain else gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"--data-root: {file} is missing or damaged ({error})") from error
    begin = 4 + 4 * dimensions
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, begin, 4)]
    magic = b"\0\0\x08" + bytes([dimensions])
    if content[:4] != magic or len(content) != begin + math.prod(shape):
        raise UsageError(f"--data-root: {file} is damaged: not an IDX file of its own size")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=begin).reshape(shape).copy())
