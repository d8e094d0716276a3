"""Data sets by name, from a path, or of the user's own."""

import inspect
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from fedsam.base.errors import UsageError, nearest
from fedsam.base.system import expanded
from fedsam.config import plugins
from fedsam.data.datasets import Dataset, check
from fedsam.data.map_style import MapStyle, from_torch
from fedsam.data.sources.camvid import camvid, frames
from fedsam.data.sources.embedded import digit_scenes, digits, rotated_digits
from fedsam.data.sources.feddrive import cityscapes, idda
from fedsam.data.sources.folders import folder
from fedsam.data.sources.huggingface import hugging_face
from fedsam.data.sources.landmarks import landmarks
from fedsam.data.sources.listing import Listing, in_memory
from fedsam.data.sources.packed_folder import is_packed, packed
from fedsam.data.sources.published import cifar10, cifar100, fashion_mnist, mnist, svhn
from fedsam.data.sources.table import table

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
LISTINGS: dict[str, Callable[..., Listing]] = {
    "folder:PATH": folder,
    "csv:PATH": table,
    "hf:PATH": hugging_face,
    "landmarks:PATH": landmarks,
    "camvid:PATH": frames,
    "cityscapes:PATH": cityscapes,
    "idda:PATH": idda,
}
PICTURES = ("side", "channels", "crop")  # options of whatever lists pictures


def load(name: str, root: Path, options: Mapping[str, Any] | None = None) -> Dataset:
    """Return a data set by name.

    Parameters
    ----------
    name : str
        One of ``LOADERS``, one of ``LISTINGS`` with its path, the path of a folder that
        ``python -m fedsam.pack`` made, or the import path of a function that returns a data set.
    root : Path
        Folder that holds the data sets in torchvision's layout (for MNIST and Fashion-MNIST also
        the .gz files in a folder ``mnist`` or ``fashion-mnist``, Debian's layout). What is not
        there is downloaded into it.
    options : mapping, optional
        Further arguments of what makes the data set; of pictures also ``side``, ``channels`` and
        ``crop`` (``listing.in_memory``).

    Raises
    ------
    UsageError
        If there is no such data set, it can't be downloaded, or its files are damaged.
    """
    options = options or {}
    kind, _, path = name.partition(":")
    if f"{kind}:PATH" in LISTINGS and name not in LOADERS:
        how = {key: value for key, value in options.items() if key in PICTURES}
        own = {key: value for key, value in options.items() if key not in PICTURES}
        dataset = in_memory(listing(kind, path, own), f"--dataset {name}", **how)
    elif ":" in name:
        dataset = _imported(name, root, options)
    elif name in LOADERS:
        _check_options(name, options, ())
        dataset = LOADERS[name](root)
    elif is_packed(place := _place(name)):
        _check_options(name, options, ())
        dataset = packed(place)
    else:
        raise UsageError(
            f"--dataset: no {name!r}{nearest(name, LOADERS)}; have "
            f"{', '.join([*LOADERS, *LISTINGS])}, a packed folder, or package.module:function"
        )
    check(dataset)
    return dataset


def listing(kind: str, path: str, options: Mapping[str, Any] | None = None) -> Listing:
    """Return what lies at a path, before a pixel is read.

    Parameters
    ----------
    kind : str
        "folder", ...: one of ``LISTINGS``.
    path : str
        Where it lies; ``~`` and ``$VAR`` are read as a shell reads them.
    options : mapping, optional
        Further arguments of this kind.

    Raises
    ------
    UsageError
        If there is nothing of this kind, or an option is unknown.
    """
    make, options = LISTINGS[f"{kind}:PATH"], options or {}
    _check_options(kind, options, [*list(inspect.signature(make).parameters)[1:], *PICTURES])
    if not path:
        raise UsageError(f"--dataset {kind}: needs a path, such as {kind}:data/mine")
    return make(_place(path), **options)


def _place(path: str) -> Path:
    """Return a path as a shell reads it."""
    try:
        return Path(expanded(path))
    except UsageError as error:
        raise UsageError(f"--dataset {path}: {error}") from error


def _imported(name: str, root: Path, options: Mapping[str, Any]) -> Dataset:
    """Return what a function of the user's makes, which is given the folder if it must be."""
    make = plugins.imported("dataset", name, Dataset, classes=False)
    parameters = inspect.signature(make).parameters
    any_option = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    first = next((p for p in parameters.values() if p.kind is not p.VAR_KEYWORD), None)
    folders = [root] if first is not None and first.default is first.empty else []
    own = list(parameters)[len(folders) :]
    if not any_option:
        _check_options(name, options, [*own, *PICTURES])
    how = {} if any_option else {k: v for k, v in options.items() if k not in own}
    made = make(*folders, **{k: v for k, v in options.items() if k not in how})
    pair = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    map_style = all(isinstance(part, MapStyle) for part in pair if part is not None)
    if map_style and not any(isinstance(part, str | Mapping) for part in pair):
        return from_torch(*pair, name=name, **how)
    if how:
        _check_options(name, options, own)
    dataset: Dataset = made
    return dataset


def _check_options(name: str, options: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise UsageError for an option that a data set does not take."""
    for option in options:
        if option not in known:
            takes = ", ".join(known) or "none"
            raise UsageError(
                f"--dataset-options: {name} has no option {option!r}{nearest(option, known)}; "
                f"it takes: {takes}"
            )
