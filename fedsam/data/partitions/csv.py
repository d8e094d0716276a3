"""A published federated split, read from its CSV file."""

import csv as csv_file
from decimal import Decimal, InvalidOperation
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsam.base.errors import UsageError
from fedsam.base.system import expanded
from fedsam.data.partition import Partition, cut


def csv(
    labels: Tensor,
    clients: int,
    generator: np.random.Generator,
    *,
    path: str,
    user: str = "user_id",
    image: str = "image_id",
    label: str = "class",
    places: Tensor | None = None,
) -> Partition:
    """Read a published federated split: a CSV file with a line for each image.

    Parameters
    ----------
    labels : Tensor
        int64 (n,); the file's classes must agree with it.
    clients : int
        Users that the file must have; in order of their number, or of their name.
    generator : numpy.random.Generator
        Not used.
    path : str
        The file, with a header line. Images that it leaves out are nobody's.
    user, image, label : str
        Its columns: whose the image is, its row in the training set, and its class, which is
        checked; label "" if the file has no classes.
    places : Tensor, optional
        int64 (N,), of each row of the whole training set its row among ``labels``, -1 where it is
        held out: nobody's, and a user without another image is none. None: all are as they were.

    References
    ----------
    Hsu, Qi, Brown, ECCV 2020: the files of the "Federated Vision Datasets".
    """
    owners: dict[str, list[int]] = {}
    places = torch.arange(len(labels)) if places is None else places
    rows_now, truth = places.tolist(), labels.tolist()
    seen = np.zeros(len(places), dtype=bool)
    where = f"--partition-options: {path}"
    if not isinstance(path, str):
        raise UsageError(f"{where}: path must be a text, the name of a CSV file")
    try:
        path = expanded(path)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
    wanted = [user, image, label] if label else [user, image]
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            lines = csv_file.DictReader(file)
            _check_header(list(lines.fieldnames or ()), wanted, where)
            for line in lines:
                here = f"{where}, line {lines.line_num}"
                if None in line:
                    raise UsageError(f"{here}: has more cells than the header")
                if not line[user]:
                    raise UsageError(f"{here}: {user} is missing")
                index = _index(line[image], seen, f"{here}: {image}")
                if (place := rows_now[index]) < 0:
                    continue
                if label and line[label] != str(truth[place]):
                    raise UsageError(
                        f"{here}: image {index} is of class {truth[place]}, not {line[label]!r:.30}"
                    )
                owners.setdefault(line[user], []).append(place)
    except (OSError, UnicodeDecodeError, csv_file.Error) as error:
        raise UsageError(f"{where}: cannot be read ({error})") from error
    if len(owners) != clients:
        raise UsageError(
            f"--clients {clients}: {path} has {len(owners)} users; give --clients {len(owners)}"
        )
    users = sorted(owners, key=rank)
    rows = [owners[user] for user in users]
    sizes = np.array([len(mine) for mine in rows])
    return cut(np.concatenate([np.array(mine, dtype=np.int64) for mine in rows]), sizes)


def _check_header(header: list[str], wanted: list[str], where: str) -> None:
    """Raise UsageError unless each column that is wanted is there, once."""
    for column in wanted:
        if column not in header:
            raise UsageError(
                f"{where}: its header has no column {column!r}; name its columns, such as "
                "{user: client_id, image: index, label: ''}"
            )
        if header.count(column) > 1:
            raise UsageError(f"{where}: its header has the column {column!r} twice")


def rank(user: str) -> tuple[bool, Decimal, str]:
    """Return what users are sorted by: numbers (7, 007, spreadsheets' 7.0), then names."""
    try:
        number = Decimal(user)
    except InvalidOperation:
        number = Decimal("NaN")
    return (False, number, user) if number.is_finite() else (True, Decimal(0), user)


def _index(image: str, seen: NDArray[np.bool_], where: str) -> int:
    """Return the row that a line names, checked, and mark it as seen."""
    # ids of more digits than the number of images has cannot lie in range (and int() has a limit)
    short = (image or "").isdecimal() and len(image.lstrip("0")) <= len(str(len(seen)))
    if not short or int(image) >= len(seen):
        raise UsageError(f"{where} must lie in 0..{len(seen) - 1}, got {image!r:.30}")
    index = int(image)
    if seen[index]:
        raise UsageError(f"{where} {index} has an owner already")
    seen[index] = True
    return index
