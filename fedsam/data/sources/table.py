"""Pictures in a CSV file: a line each, with its path and its label."""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fedsam.base.errors import UsageError, nearest, one_line, some
from fedsam.data.sources.listing import Columns, Listing, listed


def table(
    path: Path,
    *,
    image: str = "path",
    label: str = "label",
    owner: str = "user",
    domain: str = "domain",
    split: str = "split",
    classes: Sequence[str] = (),
) -> Listing:
    """Your pictures in a CSV file: path, label, and, where it has them, user, domain, split.

    Parameters
    ----------
    path : Path
        The file, with a header line. Paths of pictures in it are relative to its folder.
    image, label : str
        Its columns with a picture's path, and with the name of its class.
    owner, domain, split : str
        Its columns with whose a picture is (--partition natural), of which domain, and whether it
        is for training ("train") or for testing ("test", or "val" where there is no test); read
        where the file has them. Without parts a fifth of each class is for testing.
    classes : sequence of str
        Classes that are taken, in the order of their numbers; none: all.

    Raises
    ------
    UsageError
        If the file cannot be read, a column, a path or a label is missing, or a picture stands
        twice.
    """
    where = f"--dataset csv:{path}"
    columns = read_columns(path, where)
    named = {"image": image, "label": label, "owner": owner, "domain": domain, "split": split}
    usual = {"user", "domain", "split"}  # read where they are there
    for option, name in named.items():
        if name not in columns and name not in usual:
            raise UsageError(
                f"{where}: its header has no column {name!r}{nearest(name, columns)}; name it: "
                f"--dataset-options '{{{option}: {next(iter(columns))}}}'"
            )
    check_filled(where, {name: columns[name] for name in named.values() if name in columns})
    check_once(where, columns[image])
    images = [os.path.join(path.parent, name) for name in columns[image]]
    check_files(where, images)
    texts = {option: np.array(columns[name]) for option, name in named.items() if name in columns}
    of_rows = Columns(
        images, texts["label"], texts.get("owner"), texts.get("domain"), texts.get("split")
    )
    return listed(path.stem, where, of_rows, only=classes)


def read_columns(path: Path, where: str) -> dict[str, list[str]]:
    """Return the columns of a CSV file with a header, by name, without blanks around texts.

    Raises
    ------
    UsageError
        If it cannot be read, a name stands twice in its header, or a line is too short or long.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header, *lines = [line for line in csv.reader(file, strict=True) if line] or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else one_line(error)
        raise UsageError(f"{where}: {path}: {reason}") from error
    if not lines:
        raise UsageError(f"{where}: {path} has no line after its header")
    names = [name.strip() for name in header]
    if twice := next((name for name in names if names.count(name) > 1), ""):
        raise UsageError(f"{where}: the header of {path} has the column {twice!r} twice")
    for number, line in enumerate(lines, 2):
        if len(line) != len(names):
            raise UsageError(
                f"{where}: {path}: row {number} has {len(line)} fields, its header {len(names)}"
            )
    columns = zip(*lines, strict=True)
    return {
        name: [text.strip() for text in column] for name, column in zip(names, columns, strict=True)
    }


def check_filled(where: str, columns: Mapping[str, Sequence[str]]) -> None:
    """Raise UsageError where a field is empty."""
    for name, column in columns.items():
        if "" in column:
            raise UsageError(f"{where}: row {column.index('') + 2} has an empty {name}")


def check_once(where: str, images: Sequence[str]) -> None:
    """Raise UsageError where an image stands twice: the first five, and the count."""
    names, times = np.unique(np.array(images), return_counts=True)
    if twice := names[times > 1].tolist():
        raise UsageError(f"{where}: {len(twice)} images stand there more than once: {some(twice)}")


def check_files(where: str, paths: Sequence[str]) -> None:
    """Raise UsageError where files are missing: the first five, and the count."""
    if missing := [path for path in paths if not os.path.isfile(path)]:
        raise UsageError(
            f"{where}: {len(missing)} of {len(paths)} images are not there: {some(missing)}"
        )
