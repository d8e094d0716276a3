"""Data sets by name."""

from collections.abc import Callable
from pathlib import Path

from fedsam.base.errors import UsageError, nearest
from fedsam.data.datasets import Dataset, check
from fedsam.data.sources.camvid import camvid
from fedsam.data.sources.embedded import digit_scenes, digits, rotated_digits
from fedsam.data.sources.idx import fashion_mnist, mnist
from fedsam.data.sources.published import cifar10, cifar100, svhn

LOADERS: dict[str, Callable[[Path], Dataset]] = {
    "digits": digits,
    "digit-scenes": digit_scenes,
    "rotated-digits": rotated_digits,
    "mnist": mnist,
    "fashion-mnist": fashion_mnist,
    "camvid": camvid,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "svhn": svhn,
}


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
