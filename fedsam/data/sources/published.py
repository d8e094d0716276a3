"""CIFAR and SVHN, as torchvision reads them."""

from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedsam.base.errors import UsageError
from fedsam.data.datasets import Dataset


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
