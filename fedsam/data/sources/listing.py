"""What a data set consists of before a pixel is read: where pictures lie, and what they show."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedsam.base.randomness import numpy_generator

HELD_OUT = 5  # of so many images of a class one is for testing, where no part is


@dataclass(frozen=True)
class Encoded:
    """A picture that lies in no file of its own.

    Attributes
    ----------
    name : str
        What messages call it.
    content : bytes
        A JPEG, PNG, ... as a file would hold it.
    """

    name: str
    content: bytes


Picture = str | Encoded  # a str is a path


@dataclass(frozen=True)
class Part:
    """The pictures for training, or those for testing.

    Attributes
    ----------
    images : sequence of str or Encoded
        Paths, or what is encoded, which may be made row by row; length N.
    targets : array or sequence of str
        int64 (N,), numbers of classes; or the paths of N masks.
    owners : array, optional
        int64 (N,), whose each is: a number of ``Listing.owners``.
    domains : array, optional
        int64 (N,), of which domain each is: a number of ``Listing.domains``.
    """

    images: Sequence[Picture]
    targets: NDArray[np.int64] | Sequence[str]
    owners: NDArray[np.int64] | None = None
    domains: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Listing:
    """A data set whose pixels are still in its files.

    Attributes
    ----------
    name : str
        What it is called.
    train, test : Part
        Each of one picture at least.
    classes : tuple of str
        The names of the classes, by number.
    owners, domains : tuple of str
        The names of owners and domains, by number; empty where there are none.
    task : str
        What reads the targets, unless --task says something else.
    ignore : int, optional
        What masks say of pixels of no class.
    """

    name: str
    train: Part
    test: Part
    classes: tuple[str, ...]
    owners: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    task: str = "classification"
    ignore: int | None = None


def held_out(targets: NDArray[np.int64], *within: NDArray[np.int64] | None) -> NDArray[np.bool_]:
    """Return which images are for testing where no part is: a fifth of each class.

    The same whatever the run's seed. A class has n // 5 of its n images there, spread evenly over
    ``within``: of m images of a class in one domain m / 5, one more or less.

    Parameters
    ----------
    targets : array
        int64 (N,).
    *within : array or None
        int64 (N,), domains and owners.

    Returns
    -------
    array
        bool (N,).
    """
    shuffled = numpy_generator(0, "held out").permutation(len(targets))
    keys = [shuffled, *(column for column in reversed(within) if column is not None), targets]
    order = np.lexsort(keys)
    of_class = targets[order]
    rank = np.arange(len(order)) - np.searchsorted(of_class, of_class)
    out = np.zeros(len(targets), dtype=bool)
    out[order] = rank % HELD_OUT == HELD_OUT - 1
    return out


def taken(part: Part, rows: NDArray[np.int64]) -> Part:
    """Return the images of a part at rows (n,)."""

    def at(column: NDArray[np.int64] | None) -> NDArray[np.int64] | None:
        return None if column is None else column[rows]

    targets = part.targets
    return replace(
        part,
        images=[part.images[row] for row in rows],
        targets=targets[rows] if isinstance(targets, np.ndarray) else [targets[r] for r in rows],
        owners=at(part.owners),
        domains=at(part.domains),
    )
