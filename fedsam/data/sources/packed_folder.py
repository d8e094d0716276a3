"""A folder that ``python -m fedsam.pack`` made: its files, and the data set that they are."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from fedsam.base.errors import UsageError, one_line
from fedsam.data.datasets import Dataset
from fedsam.data.groups import by_name
from fedsam.data.store import EncodedStore, RawStore, Store

META = "meta.json"
FORMAT = 1  # of the folder
PARTS = ("train", "test")
PIXELS = (".bin", ".images.npy")  # files that are not read when a run begins


def blob(part: str, what: str) -> str:
    """Return the name of the file that holds a part's "images" or "masks", encoded."""
    return f"{part}.{what}.bin"


def index(part: str, what: str) -> str:
    """Return the name of the file that says where each begins, int64 (N + 1,)."""
    return f"{part}.{what}.index.npy"


def array(part: str, what: str) -> str:
    """Return the name of the file that holds a column, or images as they are."""
    return f"{part}.{what}.npy"


def is_packed(folder: Path) -> bool:
    """Return whether this is such a folder."""
    return (folder / META).is_file()


class File(BaseModel):
    """What meta.json says of a file: its size, and its SHA-256 in hexadecimal."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "File":
        """Return what is true of a file."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(bytes=path.stat().st_size, sha256=digest)


class Meta(BaseModel):
    """What meta.json holds: what a Dataset says beside its arrays, and each file's checksum.

    ``shape`` is (H, W, C) of all images, ``classes``, ``owners``, ``domains`` and ``groups`` are
    names.
    """

    format: int = FORMAT
    name: str
    task: str
    classes: tuple[str, ...]
    owners: tuple[str, ...]
    domains: tuple[str, ...]
    groups: tuple[str, ...] = ()
    ignore: int | None
    shape: tuple[int, int, int]
    encoding: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    files: dict[str, File]

    @classmethod
    def read(cls, folder: Path) -> "Meta":
        """Return what a folder's file says.

        Raises
        ------
        UsageError
            If it is missing, damaged, or of another version.
        """
        path = folder / META
        try:
            said = json.loads(path.read_bytes())
            version = said["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path}: cannot be read: {one_line(error)}") from error
        if version != FORMAT:
            raise UsageError(
                f"{path}: is of format {version}, this version of fedsam reads {FORMAT}; pack anew"
            )
        try:
            return cls.model_validate(said)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UsageError(f"{path}: {where}: {one_line(first['msg'])}") from error


def packed(folder: Path) -> Dataset:
    """Return the data set in a packed folder; its pixels stay there.

    Every file must have its size, and those that are read whole their SHA-256; ``verify`` reads the
    others, too.

    Raises
    ------
    UsageError
        If a file is missing, damaged, or of another version; one line that names it.
    """
    meta = Meta.read(folder)
    for name in meta.files:
        check_file(folder / name, meta.files[name], whole=not name.endswith(PIXELS))

    def column(part: str, what: str) -> Tensor | None:
        path = folder / array(part, what)
        return torch.from_numpy(np.load(path)) if path.name in meta.files else None

    def pixels(part: str, what: str, channels: int) -> Store:
        if blob(part, what) not in meta.files:
            return RawStore(folder / array(part, what))
        offsets = np.load(folder / index(part, what))
        return EncodedStore(folder / blob(part, what), offsets, (*meta.shape[:2], channels))

    def labels(part: str) -> Any:
        targets = column(part, "targets")
        return pixels(part, "masks", 1) if targets is None else targets

    return Dataset(
        meta.name,
        pixels("train", "images", meta.shape[2]),
        labels("train"),
        pixels("test", "images", meta.shape[2]),
        labels("test"),
        len(meta.classes),
        meta.mean,
        meta.std,
        meta.task,
        column("train", "classes"),
        column("test", "classes"),
        column("train", "owners"),
        column("train", "domains"),
        column("test", "domains"),
        meta.domains,
        ignore=meta.ignore,
        test_groups=by_name(column("test", "groups"), meta.groups),
    )


def verify(folder: Path) -> int:
    """Check the SHA-256 of every file of a packed folder; return how many there are.

    Raises
    ------
    UsageError
        If a file is missing or damaged.
    """
    files = Meta.read(folder).files
    for name, said in files.items():
        check_file(folder / name, said, whole=True)
    return len(files)


def check_file(path: Path, said: File, *, whole: bool) -> None:
    """Raise UsageError unless a file has the size that meta.json says, and maybe its checksum."""
    try:
        size = path.stat().st_size
        sha256 = File.of(path).sha256 if whole and size == said.bytes else said.sha256
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {one_line(error)}") from error
    if size != said.bytes:
        raise UsageError(f"{path}: has {size} bytes, {META} says {said.bytes}; pack anew")
    if sha256 != said.sha256:
        raise UsageError(f"{path}: is damaged: {META} says another SHA-256; pack anew")
