"""A split of the training images over the clients, and the pieces that splits are made of."""

import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsam.base.errors import UsageError
from fedsam.base.system import write_whole


@dataclass(frozen=True)
class Partition:
    """Which training images are whose.

    Attributes
    ----------
    indices : Tensor
        int64 (n,), rows of the training set, client after client.
    offsets : Tensor
        int64 (clients + 1,), where each client's rows begin.
    """

    indices: Tensor
    offsets: Tensor

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, client: int) -> Tensor:
        if not 0 <= client < len(self):
            raise IndexError(f"client {client} of {len(self)}")
        return self.indices[self._bounds[client] : self._bounds[client + 1]]

    def size(self, client: int) -> int:
        """Return how many images a client holds."""
        return int(self._bounds[client + 1] - self._bounds[client])

    @cached_property
    def _bounds(self) -> NDArray[np.int64]:
        """The offsets, as numbers that are quick to look up."""
        return self.offsets.numpy()

    @cached_property
    def sizes(self) -> Tensor:
        """Images of each client, (clients,)."""
        return self.offsets.diff()

    def counts(self, labels: Tensor, classes: int) -> Tensor:
        """Return how many images of each class each client holds, int64 (clients, classes)."""
        owner = torch.repeat_interleave(torch.arange(len(self)), self.sizes)
        cells = owner * classes + labels[self.indices]
        return torch.bincount(cells, minlength=len(self) * classes).view(-1, classes)

    def save(self, path: Path, counts: Tensor) -> None:
        """Write a NumPy archive: ``indices``, ``offsets``, and ``counts`` (clients, classes)."""
        indices, offsets = self.indices.numpy(), self.offsets.numpy()
        archive = io.BytesIO()
        np.savez_compressed(archive, indices=indices, offsets=offsets, counts=counts.numpy())
        write_whole(path, archive.getvalue())

    def same_as(self, other: "Partition") -> bool:
        """Return whether every client holds the same images in the same order."""
        mine, theirs = (self.indices, self.offsets), (other.indices, other.offsets)
        return all(map(torch.equal, mine, theirs))

    @classmethod
    def load(cls, path: Path) -> "Partition":
        """Return what ``save`` wrote."""
        with np.load(path, allow_pickle=False) as archive:
            return cls(*(torch.from_numpy(archive[key]) for key in ("indices", "offsets")))


def heterogeneity(counts: Tensor) -> dict[str, float]:
    """Return how unlike the clients of a split are in size and in labels.

    With p_k the shares of the classes at client k, and p those of all clients together::

        images_min, _mean, _max     images a client holds
        classes_min, _mean, _max    classes it holds any image of
        squares                     mean_k sum_c p_kc^2: 1 is one class a client
        distance_mean, _max         sum_c |p_kc - p_c| / 2, total variation: 0 is IID

    Parameters
    ----------
    counts : Tensor
        int64 (clients, classes); each client holds an image.
    """
    shares = counts / counts.sum(1, keepdim=True, dtype=torch.float64)
    whole = counts.sum(0) / counts.sum().double()
    distance = (shares - whole).abs().sum(1) / 2
    out: dict[str, float] = {}
    for name, held in {"images": counts.sum(1), "classes": (counts > 0).sum(1)}.items():
        out[f"{name}_min"], out[f"{name}_max"] = int(held.min()), int(held.max())
        out[f"{name}_mean"] = float(held.double().mean())
    out["squares"] = float(shares.square().sum(1).mean())
    return out | {"distance_mean": float(distance.mean()), "distance_max": float(distance.max())}


def check_enough(images: int, needed: int, clients: int, why: str = "") -> None:
    """Raise UsageError if there are fewer than ``needed`` images."""
    if needed > images:
        raise UsageError(f"--clients {clients}{why}: there are only {images} training images")


def check(partition: Partition, images: int, clients: int, where: str) -> None:
    """Raise UsageError if somebody's split, made by ``where``, is not a true one.

    Parameters
    ----------
    partition : Partition
        Images may be left out.
    images : int
        How many there are.
    clients : int
        Each must have an image at least.
    where : str
        What the message begins with.
    """
    if not isinstance(partition, Partition):
        kind = type(partition).__name__
        raise UsageError(f"{where}: must return a fedsam.data.partition.Partition, not {kind}")
    if len(partition) != clients:
        made = len(partition)
        raise UsageError(f"--clients {clients}: {where} makes {made}; give --clients {made}")
    if int(partition.sizes.min()) < 1:
        empty = int(partition.sizes.argmin())
        raise UsageError(f"{where}: client {empty} has no images; each needs one at least")
    if int(partition.indices.min()) < 0 or int(partition.indices.max()) >= images:
        raise UsageError(f"{where}: images must lie in 0..{images - 1}")
    owners = torch.bincount(partition.indices, minlength=images)
    if int(owners.max()) > 1:
        raise UsageError(f"{where}: image {int(owners.argmax())} is given out more than once")


def even_sizes(images: int, clients: int) -> NDArray[np.int64]:
    """Return sizes (clients,) that differ by at most one and sum to ``images``."""
    check_enough(images, clients, clients)
    sizes = np.full(clients, images // clients)
    sizes[: images % clients] += 1
    return sizes


def pools_of(labels: Tensor, generator: np.random.Generator) -> list[NDArray[np.int64]]:
    """Return the images of each class that occurs, shuffled."""
    order = generator.permutation(len(labels))
    shuffled = labels.numpy()[order]
    by_class = order[np.argsort(shuffled, kind="stable")]
    edges = np.flatnonzero(np.diff(np.sort(shuffled))) + 1
    return np.split(by_class, edges)


def cut(order: NDArray[np.int64], sizes: NDArray[np.int64]) -> Partition:
    """Return the partition that hands ``order`` out in pieces of these sizes."""
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return Partition(torch.from_numpy(order.astype(np.int64)), torch.from_numpy(offsets))


def deal(pools: list[NDArray[np.int64]], counts: NDArray[np.int64]) -> Partition:
    """Return the partition in which client k holds counts[k, c] images of pool c."""
    owner = [np.repeat(np.arange(len(counts)), counts[:, c]) for c in range(len(pools))]
    by_client = np.argsort(np.concatenate(owner), kind="stable")
    return cut(np.concatenate(pools)[by_client], counts.sum(1))


def shares_of_test(
    partition: Partition, labels: Tensor, test_labels: Tensor, generator: np.random.Generator
) -> Partition:
    """Return the test images of each client: of every class the share that it trains on.

    Parameters
    ----------
    partition : Partition
        Of the training images.
    labels, test_labels : Tensor
        int64 (N,) and (M,), the classes of the training and the test images.
    generator : numpy.random.Generator
        Says which image of a class is whose.

    Returns
    -------
    Partition
        Rows of the test set, each to one client; a client with few images may have none. Of a class
        without training images nobody has any.
    """
    classes = 1 + int(max(labels.max(), test_labels.max()))
    held = partition.counts(labels, classes).numpy()
    pools = pools_of(test_labels, generator)
    of_pool = held[:, test_labels.unique().numpy()]
    share = of_pool.cumsum(0) / of_pool.sum(0).clip(min=1)
    ends = np.rint(share * [len(pool) for pool in pools]).astype(np.int64)
    given = [pool[: ends[-1, number]] for number, pool in enumerate(pools)]
    return deal(given, np.diff(ends, axis=0, prepend=0))
