"""Pictures in folders: one a class, within one a domain or a client where there are any."""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fedsam.base.errors import UsageError, some
from fedsam.data.sources.listing import TESTING, TRAINING, Columns, Listing, listed
from fedsam.data.sources.pictures import SUFFIXES

LAYOUTS = ("class", "domain/class", "client/class")

log = logging.getLogger("fedsam")


def folder(path: Path, *, layout: str = "", classes: Sequence[str] = ()) -> Listing:
    """Your pictures in folders: class/img, domain/class/img, each maybe in train and test.

    A part for testing is a folder ``test`` or ``val`` beside ``train``; without one it is a fifth
    of each class. Classes are numbered in the order of their names. What is no picture by its name,
    hidden, or at another depth is left out, and counted in a warning.

    Parameters
    ----------
    path : Path
        The folder.
    layout : str
        "class", "domain/class" or "client/class" (whose folders --partition natural makes
        clients); "": the first of the first two that fits.
    classes : sequence of str
        Those to take, in the order of their numbers; none: all.

    Raises
    ------
    UsageError
        If there is no such folder, no picture in it, or a class without pictures.
    """
    where = f"--dataset folder:{path}"
    if layout not in ("", *LAYOUTS):
        raise UsageError(f"--dataset-options: layout must be {', '.join(LAYOUTS)}, got {layout!r}")
    scan = _Scan(where)
    names = scan.folders(path)
    tests = [name for name in TESTING if name in names]
    parts = [TRAINING, *tests[:1]] if TRAINING in names else [""]
    if TRAINING in parts:
        scan.left_out |= {str(path / name): None for name in names if name not in parts}
    layout = layout or scan.layout(path / parts[0])
    rows = [
        (image, cls, outer, part)
        for part in parts
        for image, cls, outer in scan.pictures(path / part, nested=layout != "class")
    ]
    if empty := sorted(scan.classes - {cls for _, cls, _, _ in rows}):
        raise UsageError(f"{where}: no picture in the folder of class {some(empty)}")
    if not rows:
        raise UsageError(f"{where}: no picture in a folder of its class, such as cat/1.jpg")
    if scan.left_out:
        log.warning(
            "%s: %d entries left out: %s", where, len(scan.left_out), some(list(scan.left_out))
        )
    images, labels, outer, part_of = (np.array(column) for column in zip(*rows, strict=True))
    columns = Columns(
        images.tolist(),
        labels,
        owners=outer if layout == "client/class" else None,
        domains=outer if layout == "domain/class" else None,
        parts=part_of if TRAINING in parts else None,
    )
    return listed(path.name, where, columns, only=classes)


class _Scan:
    """Walks over folders, and keeps what it left out, and the classes that it saw."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.left_out: dict[str, None] = {}  # a set in the order of the walk
        self.classes: set[str] = set()

    def folders(self, folder: Path) -> list[str]:
        """Return the names of the folders in a folder; all else is left out."""
        entries = self._entries(folder)
        self.left_out |= {entry.path: None for entry in entries if not _is_folder(entry)}
        return [entry.name for entry in entries if _is_folder(entry)]

    def layout(self, folder: Path) -> str:
        """Return the layout that fits: which folders hold pictures themselves."""
        inside = [entry for entry in self._entries(folder) if _is_folder(entry)]
        deep = not any(_is_picture(e) for entry in inside for e in self._entries(Path(entry)))
        return "domain/class" if deep and inside else "class"

    def pictures(self, folder: Path, *, nested: bool) -> Iterator[tuple[str, str, str]]:
        """Yield path, class and outer folder (or "") of each picture."""
        if nested:
            for outer in self.folders(folder):
                for path, cls, _ in self.pictures(folder / outer, nested=False):
                    yield path, cls, outer
            return
        for cls in self.folders(folder):
            self.classes.add(cls)
            for entry in self._entries(folder / cls):
                if _is_picture(entry):
                    yield entry.path, cls, ""
                else:
                    self.left_out[entry.path] = None

    def _entries(self, folder: Path) -> list[os.DirEntry[str]]:
        try:
            return sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UsageError(f"{self.where}: {folder}: {error.strerror}") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir() and not entry.name.startswith((".", "__MACOSX"))


def _is_picture(entry: os.DirEntry[str]) -> bool:
    visible = not entry.name.startswith(".")
    return visible and Path(entry.name).suffix.lower() in SUFFIXES and entry.is_file()
