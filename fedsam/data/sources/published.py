"""CIFAR, SVHN, MNIST and what comes in its format, as torchvision reads or downloads them."""

import gzip
import math
import zlib
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsam.base.errors import UsageError
from fedsam.data.datasets import Dataset

DEBIAN = Path("/usr/share/datasets")  # where Debian's package dataset-fashion-mnist puts its files
IDX = (  # the files of MNIST and those in its format, with their dimensions
    ("train-images-idx3-ubyte", 3),
    ("train-labels-idx1-ubyte", 1),
    ("t10k-images-idx3-ubyte", 3),
    ("t10k-labels-idx1-ubyte", 1),
)


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
        from_torchvision("svhn", "SVHN", root, "train_32x32.mat and test_32x32.mat", split=split)
        for split in ("train", "test")
    ]
    train, test = (
        (torch.from_numpy(np.ascontiguousarray(s.data)), torch.from_numpy(s.labels).long())
        for s in sets
    )
    return Dataset("svhn", *train, *test, 10, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))


def _cifar(
    name: str, cls: str, folder: str, root: Path, mean: tuple[float, ...], std: tuple[float, ...]
) -> Dataset:
    sets = [
        from_torchvision(name, cls, root, f"the folder {folder}", train=part)
        for part in (True, False)
    ]
    train, test = (
        (torch.from_numpy(s.data).permute(0, 3, 1, 2), torch.tensor(s.targets, dtype=torch.int64))
        for s in sets
    )
    return Dataset(name, *train, *test, len(sets[0].classes), mean, std)


def from_torchvision(name: str, cls: str, root: Path, files: str, **part: Any) -> Any:
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


def mnist(root: Path) -> Dataset:
    """LeCun's handwritten digits: 60,000 + 10,000 images of 28 x 28 pixels."""
    return _idx("mnist", "MNIST", root, (0.1307,), (0.3081,))


def fashion_mnist(root: Path) -> Dataset:
    """Zalando's articles of clothing: 60,000 + 10,000 images of 28 x 28 pixels."""
    return _idx("fashion-mnist", "FashionMNIST", root, (0.2860,), (0.3530,))


def _idx(
    name: str, cls: str, root: Path, mean: tuple[float, ...], std: tuple[float, ...]
) -> Dataset:
    """Return MNIST or a data set in its format, from where its four files are."""
    for folder in (root / name, root / cls / "raw", DEBIAN / name):
        if all(any(folder.glob(f"{file}*")) for file, _ in IDX):
            break
    else:
        from_torchvision(name, cls, root, f"its four .gz files in a folder {name}")
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
