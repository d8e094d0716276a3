"""How the training images are split over the clients: one function a method.

Each takes the labels (n,), the number of clients and a generator, and returns a ``Partition``
that is a true one: no image twice, no client empty.
"""

import csv as csv_file
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsam.errors import UsageError

TRIES = 1000  # draws of a split whose smallest client may be too small


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
        return self.indices[self.offsets[client] : self.offsets[client + 1]]

    @cached_property
    def sizes(self) -> Tensor:
        """Images of each client, (clients,)."""
        return self.offsets.diff()

    def counts(self, labels: Tensor, classes: int) -> Tensor:
        """Return how many images of each class each client holds, int64 (clients, classes)."""
        owner = torch.repeat_interleave(torch.arange(len(self)), self.sizes)
        cells = owner * classes + labels[self.indices]
        return torch.bincount(cells, minlength=len(self) * classes).view(-1, classes)

    def save(self, path: Path) -> None:
        """Write a NumPy archive with the keys ``indices`` and ``offsets``."""
        np.savez_compressed(path, indices=self.indices.numpy(), offsets=self.offsets.numpy())

    @classmethod
    def load(cls, path: Path) -> "Partition":
        """Return what ``save`` wrote."""
        with np.load(path, allow_pickle=False) as archive:
            return cls(*(torch.from_numpy(archive[key]) for key in ("indices", "offsets")))


def iid(labels: Tensor, clients: int, generator: np.random.Generator) -> Partition:
    """Shuffle all images and deal them out; sizes differ by at most one."""
    order = generator.permutation(len(labels))
    return _cut(order, _even_sizes(len(labels), clients))


def dirichlet(
    labels: Tensor, clients: int, generator: np.random.Generator, *, alpha: float
) -> Partition:
    """Split as the FedSAM paper does: balanced clients, each with its own class prior.

    For each client in turn q ~ Dirichlet(alpha p) with p uniform over the C classes, so alpha is
    the TOTAL concentration and each class gets alpha / C; then its images are taken from what is
    left of each class, as near to q as that allows. alpha = 0 is one class a client.

    Parameters
    ----------
    labels : Tensor
        int64 (n,).
    clients : int
        N; each gets n // N images, the first n mod N one more.
    generator : numpy.random.Generator
        Drawn from.
    alpha : float
        Concentration; large is IID.

    Returns
    -------
    Partition
        Of every image, each once.

    References
    ----------
    Hsu, Qi, Brown, "Federated Visual Classification with Real-World Data Distribution", ECCV 2020.
    """
    if alpha < 0:
        raise UsageError(f"--alpha {alpha:g}: must be at least 0")
    pools = _pools(labels, generator)
    if alpha == 0:
        return _one_class_each(pools, clients, generator)
    sizes = _even_sizes(len(labels), clients)
    priors = generator.dirichlet(np.full(len(pools), alpha / len(pools)), size=clients)
    counts = _fill(priors, sizes, np.array([len(pool) for pool in pools]))
    return _deal(pools, counts)


def dirichlet_per_class(
    labels: Tensor,
    clients: int,
    generator: np.random.Generator,
    *,
    alpha: float,
    min_size: int = 10,
) -> Partition:
    """Split each class over the clients by proportions ~ Dirichlet(alpha, ..., alpha).

    Clients are unbalanced. Drawn anew until the smallest client has ``min_size`` images.

    Parameters
    ----------
    labels : Tensor
        int64 (n,).
    clients : int
        N.
    generator : numpy.random.Generator
        Drawn from.
    alpha : float
        Concentration for each client (not the total, as in ``dirichlet``).
    min_size : int
        Images that each client must have; 10 in the reference.

    References
    ----------
    Li, Diao, Chen, He, "Federated Learning on Non-IID Data Silos", ICDE 2022 (NIID-Bench).
    """
    if alpha <= 0:
        raise UsageError(f"--alpha {alpha:g}: must be above 0 for --partition dirichlet-per-class")
    if min_size < 1:
        raise UsageError(f"--partition-options: min_size must be at least 1, got {min_size}")
    _check_enough(len(labels), clients * min_size, clients, f" with {min_size} images each")
    pools = _pools(labels, generator)
    for _ in range(TRIES):
        counts = np.empty((clients, len(pools)), dtype=np.int64)
        for number, pool in enumerate(pools):
            shares = generator.dirichlet(np.full(clients, alpha))
            # a client that has its fair share already gets no more, as in the reference
            if number:
                shares = shares * (counts[:, :number].sum(1) < len(labels) / clients)
            total = shares.sum()
            shares = shares / total if total > 0 else np.full(clients, 1 / clients)
            edges = (np.cumsum(shares)[:-1] * len(pool)).astype(np.int64)
            counts[:, number] = np.diff(np.concatenate([[0], edges, [len(pool)]]))
        if counts.sum(1).min() >= min_size:
            return _deal(pools, counts)
    raise UsageError(
        f"--alpha {alpha:g}: in {TRIES} draws some of --clients {clients} had fewer than "
        f"{min_size} images; try a larger alpha, fewer clients, or "
        "--partition-options '{min_size: 1}'"
    )


def shards(
    labels: Tensor, clients: int, generator: np.random.Generator, *, shards: int = 2
) -> Partition:
    """Sort by label, cut into ``shards`` pieces a client, and deal the pieces out.

    References
    ----------
    McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
    AISTATS 2017, section 3: two shards of 300 images for each of 100 clients.
    """
    if shards < 1:
        raise UsageError(f"--partition-options: shards must be at least 1, got {shards}")
    _check_enough(len(labels), clients * shards, clients, f" with {shards} shards each")
    order = np.concatenate(_pools(labels, generator))
    pieces = np.array_split(order, clients * shards)
    dealt = generator.permutation(clients * shards).reshape(clients, shards)
    mine = [np.concatenate([pieces[piece] for piece in hand]) for hand in dealt]
    return _cut(np.concatenate(mine), np.array([len(rows) for rows in mine]))


def quantity(
    labels: Tensor, clients: int, generator: np.random.Generator, *, alpha: float
) -> Partition:
    """Shuffle all images and give each client a share ~ Dirichlet(alpha, ..., alpha).

    Sizes are skewed, labels are not; each client has at least one image.

    References
    ----------
    Li, Diao, Chen, He, "Federated Learning on Non-IID Data Silos", ICDE 2022 (NIID-Bench).
    """
    if alpha <= 0:
        raise UsageError(f"--alpha {alpha:g}: must be above 0 for --partition quantity")
    _check_enough(len(labels), clients, clients)
    shares = generator.dirichlet(np.full(clients, alpha))
    spare = len(labels) - clients
    edges = (np.cumsum(shares)[:-1] * spare).astype(np.int64)
    sizes = 1 + np.diff(np.concatenate([[0], edges, [spare]]))
    return _cut(generator.permutation(len(labels)), sizes)


def csv(labels: Tensor, clients: int, generator: np.random.Generator, *, path: str) -> Partition:
    """Read a published federated split: a CSV file with user_id, image_id and class.

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

    References
    ----------
    Hsu, Qi, Brown, ECCV 2020: the files of the "Federated Vision Datasets".
    """
    owners: dict[str, list[int]] = {}
    seen = np.zeros(len(labels), dtype=bool)
    truth = labels.tolist()
    where = f"--partition-options: {path}"
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            lines = csv_file.DictReader(file)
            wanted = {"user_id", "image_id", "class"}
            if not wanted <= set(lines.fieldnames or ()):
                raise UsageError(f"{where}: needs a header with user_id, image_id and class")
            for line in lines:
                image = _image(line, truth, seen, f"{where}, line {lines.line_num}")
                owners.setdefault(line["user_id"], []).append(image)
    except (OSError, UnicodeDecodeError, csv_file.Error) as error:
        raise UsageError(f"{where}: cannot be read ({error})") from error
    if len(owners) != clients:
        raise UsageError(f"--clients {clients}: {path} has {len(owners)} users")
    users = sorted(
        owners, key=lambda user: (not user.isdecimal(), len(user) * user.isdecimal(), user)
    )
    rows = [owners[user] for user in users]
    sizes = np.array([len(mine) for mine in rows])
    return _cut(np.concatenate([np.array(mine, dtype=np.int64) for mine in rows]), sizes)


METHODS: dict[str, Callable[..., Partition]] = {
    "dirichlet": dirichlet,
    "iid": iid,
    "dirichlet-per-class": dirichlet_per_class,
    "shards": shards,
    "quantity": quantity,
    "csv": csv,
}


def _image(line: dict[str, str], truth: list[int], seen: NDArray[np.bool_], where: str) -> int:
    """Return one line's image, checked, and mark it as seen."""
    image, label = line["image_id"], line["class"]
    if not (image or "").isdecimal() or int(image) >= len(truth):
        raise UsageError(f"{where}: image_id must lie in 0..{len(truth) - 1}, got {image!r}")
    index = int(image)
    if seen[index]:
        raise UsageError(f"{where}: image {index} has an owner already")
    if str(truth[index]) != label:
        raise UsageError(f"{where}: image {index} is of class {truth[index]}, not {label!r}")
    seen[index] = True
    return index


def _check_enough(images: int, needed: int, clients: int, why: str = "") -> None:
    if needed > images:
        raise UsageError(f"--clients {clients}{why}: there are only {images} training images")


def _even_sizes(images: int, clients: int) -> NDArray[np.int64]:
    """Return sizes (clients,) that differ by at most one and sum to ``images``."""
    _check_enough(images, clients, clients)
    sizes = np.full(clients, images // clients)
    sizes[: images % clients] += 1
    return sizes


def _pools(labels: Tensor, generator: np.random.Generator) -> list[NDArray[np.int64]]:
    """Return the images of each class that occurs, shuffled."""
    order = generator.permutation(len(labels))
    shuffled = labels.numpy()[order]
    by_class = order[np.argsort(shuffled, kind="stable")]
    edges = np.flatnonzero(np.diff(np.sort(shuffled))) + 1
    return np.split(by_class, edges)


def _cut(order: NDArray[np.int64], sizes: NDArray[np.int64]) -> Partition:
    """Return the partition that hands ``order`` out in pieces of these sizes."""
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return Partition(torch.from_numpy(order.astype(np.int64)), torch.from_numpy(offsets))


def _deal(pools: list[NDArray[np.int64]], counts: NDArray[np.int64]) -> Partition:
    """Return the partition in which client k holds counts[k, c] images of pool c."""
    owner = [np.repeat(np.arange(len(counts)), counts[:, c]) for c in range(len(pools))]
    by_client = np.argsort(np.concatenate(owner), kind="stable")
    return _cut(np.concatenate(pools)[by_client], counts.sum(1))


def _one_class_each(
    pools: list[NDArray[np.int64]], clients: int, generator: np.random.Generator
) -> Partition:
    """Share out each class evenly among its clients, every client in one class only."""
    if clients < len(pools):
        raise UsageError(
            f"--clients {clients}: --alpha 0 is one class a client and needs {len(pools)} or more"
        )
    owners = np.bincount(np.arange(clients) % len(pools))
    for pool, many in zip(pools, owners, strict=True):
        _check_enough(len(pool), many, clients, " at --alpha 0 (one class has too few images)")
    counts = np.zeros((clients, len(pools)), dtype=np.int64)
    client = iter(generator.permutation(clients))
    for c, pool in enumerate(pools):
        for size in _even_sizes(len(pool), owners[c]):
            counts[next(client), c] = size
    return _deal(pools, counts)


def _fill(
    priors: NDArray[np.float64], sizes: NDArray[np.int64], pool: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return counts (clients, classes) near sizes * priors that just use up the pools.

    Clients are served in turn; where a class has run out, a client's prior is renormalised over
    the classes that are left. Blocks of clients whose wishes fit into the pools are served at once.
    """
    wishes = _rounded(priors * sizes[:, None], sizes)
    counts = np.empty_like(wishes)
    left = pool.copy()
    client = 0
    while client < len(sizes):
        fits = (np.cumsum(wishes[client:], axis=0) <= left).all(axis=1)
        many = int(np.argmin(np.append(fits, False)))
        block = slice(client, client + many)
        counts[block] = wishes[block]
        left -= wishes[block].sum(axis=0)
        client += many
        if client < len(sizes):
            counts[client] = _from_what_is_left(priors[client], int(sizes[client]), left)
            left -= counts[client]
            client += 1
    return counts


def _from_what_is_left(
    prior: NDArray[np.float64], size: int, left: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return one client's counts, renormalising its prior each time that a class runs out."""
    taken = np.zeros_like(left)
    while (missing := size - taken.sum()) > 0:
        free = left - taken
        q = np.where(free > 0, prior, 0.0)
        if q.sum() <= 0:  # its classes are gone, or their priors too small to be told from zero
            q = free.astype(np.float64)
        wish = _rounded((q / q.sum() * missing)[None], np.array([missing]))[0]
        taken += np.minimum(wish, free)
    return taken


def _rounded(wishes: NDArray[np.float64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Round each row (largest remainders first) to integers that sum to its size."""
    counts = np.floor(wishes).astype(np.int64)
    rest = sizes - counts.sum(axis=1)
    order = np.argsort(-(wishes - counts), axis=1, kind="stable")
    rank = np.argsort(order, axis=1, kind="stable")
    return counts + (rank < rest[:, None])
