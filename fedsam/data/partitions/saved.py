"""A split that is in a file: what a run left, or clients and their rows as JSON."""

import json
import zlib
from collections import Counter
from pathlib import Path
from zipfile import BadZipFile, is_zipfile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsam.base.errors import UsageError, one_line
from fedsam.data.partition import Partition, check, cut
from fedsam.data.partitions.csv import rank

WRONG = (ValueError, OverflowError, LookupError, RecursionError, MemoryError)  # depth, huge shapes


def saved(labels: Tensor, clients: int, path: Path, places: Tensor | None = None) -> Partition:
    """Read a split from its file.

    Parameters
    ----------
    labels : Tensor
        int64 (n,); those that the file counts must be the same.
    clients : int
        That it must have.
    path : Path
        A run's partition.npz, or a JSON file: each client's rows of the training set by its
        name, ``{"0": [3, 1, 4], "1": [5]}``, in order of their numbers, then of their names.
    places : Tensor, optional
        int64 (N,), of each row of the whole training set, which JSON speaks of, its row among
        ``labels``, -1 where it is held out: nobody's, and a client without another row is none.
        None: all are as they were.

    Raises
    ------
    UsageError
        If it cannot be read, is neither, is no true split, or one of other labels.
    """
    where = f"--partition {path}"
    try:
        if path.suffix == ".json":
            partition, counts = _of_json(path, places), None
        else:
            partition, counts = _of_run(path)
    except (OSError, BadZipFile, zlib.error, *WRONG) as error:
        raise UsageError(
            f"{where}: neither a run's partition.npz nor JSON of clients and their rows: "
            f"{one_line(error)}"
        ) from error
    check(partition, len(labels), clients, where)
    if counts is not None:
        ours = partition.counts(labels, int(labels.max()) + 1).numpy()
        if not np.array_equal(counts, ours):
            raise UsageError(f"{where}: its clients hold other classes: of another data set?")
    return partition


def _of_json(path: Path, places: Tensor | None) -> Partition:
    owners = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_once)
    if not isinstance(owners, dict) or not owners:
        raise ValueError("it does not map clients to rows")
    for user, rows in owners.items():
        if not isinstance(rows, list) or any(type(row) is not int for row in rows):
            raise ValueError(f"the rows of client {user:.30} must be a list of whole numbers")
    rows = [np.array(owners[user], dtype=np.int64) for user in sorted(owners, key=rank)]
    if places is not None:
        rows = [_placed(of_user, places.numpy()) for of_user in rows]
        rows = [of_user for of_user in rows if len(of_user)]
        if not rows:
            raise ValueError("all its rows are held out")
    return cut(np.concatenate(rows), np.array([len(own) for own in rows]))


def _placed(rows: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where rows are now, without those that are held out."""
    if ((rows < 0) | (rows >= len(places))).any():
        raise ValueError(f"images must lie in 0..{len(places) - 1}")
    now = places[rows]
    return now[now >= 0]


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return a JSON object; a client that stands twice would lose its first rows."""
    for name, times in Counter(name for name, _ in pairs).most_common(1):
        if times > 1:
            raise ValueError(f"client {name:.30} stands there {times} times")
    return dict(pairs)


def _of_run(path: Path) -> tuple[Partition, NDArray[np.int64] | None]:
    """Return the split, and the images of each client and class if the file counts them."""
    if path.exists() and not is_zipfile(path):
        raise ValueError("it is no NumPy archive")
    with np.load(path, allow_pickle=False) as archive:
        indices, offsets = archive["indices"], archive["offsets"]
        counts = archive.get("counts")
    for name, array in {"indices": indices, "offsets": offsets}.items():
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(f"{name} must be whole numbers, one after the other")
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(indices):
        raise ValueError("offsets must lead from 0 to the number of indices")
    if (np.diff(offsets.astype(np.int64)) < 0).any():
        raise ValueError("offsets must not fall")
    rows, begins = (torch.from_numpy(array.astype(np.int64)) for array in (indices, offsets))
    return Partition(rows, begins), counts
