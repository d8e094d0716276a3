"""MNIST, and what comes in its format."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedsam.base.errors import UsageError
from fedsam.data.datasets import Dataset
from fedsam.data.sources.published import from_torchvision

DEBIAN = Path("/usr/share/datasets")  # where Debian's package dataset-fashion-mnist puts its files
IDX = (  # the files of MNIST and those in its format, with their dimensions
    ("train-images-idx3-ubyte", 3),
    ("train-labels-idx1-ubyte", 1),
    ("t10k-images-idx3-ubyte", 3),
    ("t10k-labels-idx1-ubyte", 1),
)


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
