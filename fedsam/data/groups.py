"""Groups of test rows, by name: what is told of each beside what is told of all."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedsam.base.errors import UsageError

Groups = Mapping[str, Tensor]  # rows of each group, int64 (n,); a row may be in several, or in none


def by_class(targets: Tensor, classes: int) -> dict[str, Tensor]:
    """Return the rows of each class that has any.

    Parameters
    ----------
    targets : Tensor
        int64 (N,), the class of each row.
    classes : int
        How many there are.

    Raises
    ------
    UsageError
        If the targets are not one class a row.
    """
    if targets.dim() != 1:
        raise UsageError(
            f"--test-groups classes: needs one class an image; the targets are "
            f"{tuple(targets.shape)}"
        )
    rows = {f"class {number}": (targets == number).nonzero()[:, 0] for number in range(classes)}
    return {name: of_class for name, of_class in rows.items() if len(of_class)}


def by_name(numbers: Tensor | None, names: Sequence[str]) -> dict[str, Tensor] | None:
    """Return the rows of each group; None where there are none.

    Parameters
    ----------
    numbers : Tensor, optional
        int64 (N,), in which group each row is.
    names : sequence of str
        What they are called, each of a row at least.
    """
    if numbers is None:
        return None
    return {name: (numbers == number).nonzero()[:, 0] for number, name in enumerate(names)}


def check(groups: object, count: int, where: str) -> None:
    """Raise UsageError if these are no groups of ``count`` rows; ``where`` begins the message."""
    if not isinstance(groups, Mapping) or not groups:
        raise UsageError(f"{where} must be a mapping from names to rows, got {groups!r:.80}")
    for name, rows in groups.items():
        if not isinstance(name, str):
            raise UsageError(f"{where}: {name!r} is no name")
        if not isinstance(rows, Tensor) or rows.dtype != torch.int64 or rows.dim() != 1:
            raise UsageError(f"{where}: {name!r} must hold rows, an int64 tensor (n,)")
        if not len(rows):
            raise UsageError(f"{where}: {name!r} holds no row")
        if int(rows.min()) < 0 or int(rows.max()) >= count:
            raise UsageError(f"{where}: {name!r} holds rows that are not in 0..{count - 1}")
        if len(rows.unique()) < len(rows):
            raise UsageError(f"{where}: {name!r} holds a row twice")


class Places:
    """Where the rows of groups lie in any run of consecutive rows.

    Parameters
    ----------
    groups : sequence of Tensor
        int64 (n,) rows of each.
    """

    def __init__(self, groups: Sequence[Tensor]) -> None:
        sizes = torch.tensor([len(rows) for rows in groups], dtype=torch.int64)
        rows = torch.cat([*groups, torch.empty(0, dtype=torch.int64)])
        self._rows, order = rows.sort(stable=True)
        self._groups = torch.repeat_interleave(torch.arange(len(groups)), sizes)[order]

    def within(self, start: int, end: int) -> dict[int, Tensor]:
        """Return the groups with rows in [start, end), each with those rows less ``start``."""
        first, last = torch.searchsorted(self._rows, torch.tensor([start, end])).tolist()
        if first == last:
            return {}
        groups, order = self._groups[first:last].sort(stable=True)
        places = (self._rows[first:last] - start)[order]
        numbers, counts = groups.unique_consecutive(return_counts=True)
        return dict(zip(numbers.tolist(), places.split(counts.tolist()), strict=True))
