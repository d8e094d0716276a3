"""How the training images are split over the clients: one function a method.

Each takes the labels (n,), the number of clients and a generator, and returns a ``Partition``
that is a true one: no image twice, no client empty.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedsam.base.errors import UsageError
from fedsam.data.partition import Partition, check_enough, cut, deal, even_sizes, pools_of
from fedsam.data.partitions.csv import csv

Redrawn = Callable[[NDArray[np.int64]], NDArray[np.float64]]  # another prior, over what is left
TRIES = 1000  # draws of a split whose smallest client may be too small
AHEAD = 1 << 20  # cells (clients x classes) that are filled at once, to bound the memory
LEAST = 1e-300  # concentration of a class: what NumPy's draws can bear


def iid(labels: Tensor, clients: int, generator: np.random.Generator) -> Partition:
    """Shuffle all images and deal them out; sizes differ by at most one."""
    order = generator.permutation(len(labels))
    return cut(order, even_sizes(len(labels), clients))


def dirichlet(
    labels: Tensor,
    clients: int,
    generator: np.random.Generator,
    *,
    alpha: float,
    prior: str = "shares",
    run_out: str = "redraw",
) -> Partition:
    """Split as the FedSAM paper does: balanced clients, each with its own class prior.

    For each client in turn q ~ Dirichlet(alpha p) with p the classes' shares of all images, so
    alpha is the TOTAL concentration and, of C equal classes, each gets alpha / C; then its images
    are taken from what is left of each class, as near to q as that allows. What a class cannot
    give any more is shared out by another draw, over the classes that are left. alpha = 0 is one
    class a client.

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
    prior : str
        p: "shares" of the classes, or "uniform" (whatever their sizes, as fedsam 0.1 had it).
    run_out : str
        What a class cannot give: "redraw", or "renormalize" (by the client's q over the classes
        that are left, as fedsam 0.1 had it).

    Returns
    -------
    Partition
        Of every image, each once.

    References
    ----------
    Hsu, Qi, Brown, "Federated Visual Classification with Real-World Data Distribution", ECCV 2020,
    and "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification", arXiv 1909.06335. "redraw" is inferred from the published files, whose
    statistics it has; with "renormalize" their clients would hold fewer classes.
    """
    if alpha < 0:
        raise UsageError(f"--alpha {alpha:g}: must be at least 0")
    _one_of("prior", prior, ("shares", "uniform"))
    _one_of("run_out", run_out, ("redraw", "renormalize"))
    pools = pools_of(labels, generator)
    if alpha == 0:
        return _one_class_each(pools, clients, generator)
    sizes = even_sizes(len(labels), clients)
    pool = np.array([len(rows) for rows in pools])
    parts = len(labels) / pool if prior == "shares" else np.full(len(pool), float(len(pool)))
    concentration = np.maximum(alpha / parts, LEAST)
    priors = generator.dirichlet(concentration, size=clients)
    redrawn = partial(_drawn, concentration, generator) if run_out == "redraw" else None
    return deal(pools, _fill(priors, sizes, pool, redrawn))


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
    if not isinstance(min_size, int) or min_size < 1:
        raise UsageError(
            f"--partition-options: min_size must be a whole number, at least 1, got {min_size!r}"
        )
    check_enough(len(labels), clients * min_size, clients, f" with {min_size} images each")
    pools = pools_of(labels, generator)
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
            return deal(pools, counts)
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
    if not isinstance(shards, int) or shards < 1:
        raise UsageError(
            f"--partition-options: shards must be a whole number, at least 1, got {shards!r}"
        )
    check_enough(len(labels), clients * shards, clients, f" with {shards} shards each")
    order = np.concatenate(pools_of(labels, generator))
    pieces = np.array_split(order, clients * shards)
    dealt = generator.permutation(clients * shards).reshape(clients, shards)
    mine = [np.concatenate([pieces[piece] for piece in hand]) for hand in dealt]
    return cut(np.concatenate(mine), np.array([len(rows) for rows in mine]))


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
    check_enough(len(labels), clients, clients)
    shares = generator.dirichlet(np.full(clients, alpha))
    spare = len(labels) - clients
    edges = (np.cumsum(shares)[:-1] * spare).astype(np.int64)
    sizes = 1 + np.diff(np.concatenate([[0], edges, [spare]]))
    return cut(generator.permutation(len(labels)), sizes)


def natural(
    labels: Tensor, clients: int, generator: np.random.Generator, *, owners: Tensor | None
) -> Partition:
    """Let each image be its owner's, where the data set says whose it is.

    Parameters
    ----------
    labels : Tensor
        int64 (n,).
    clients : int
        As many as there are owners.
    generator : numpy.random.Generator
        Not used.
    owners : Tensor or None
        int64 (n,), from 0.
    """
    if owners is None:
        raise UsageError("--partition natural: this data set does not say whose an image is")
    sizes = owners.bincount()
    if len(sizes) != clients:
        raise UsageError(
            f"--clients {clients}: the data have {len(sizes)} owners; give --clients {len(sizes)}"
        )
    return cut(owners.argsort(stable=True).numpy(), sizes.numpy())


def domains(
    labels: Tensor,
    clients: int,
    generator: np.random.Generator,
    *,
    domains: Tensor | None,
    alpha: float,
    within: str = "iid",
) -> Partition:
    """Give each client images of one domain, where the data set says of which an image is.

    A domain's number of clients goes by its size (largest remainders); one that is due less than a
    client has one all the same. They come one after the other, in the order of the domains.

    Parameters
    ----------
    labels : Tensor
        int64 (n,).
    clients : int
        As many as there are domains, or more.
    generator : numpy.random.Generator
        Drawn from.
    domains : Tensor or None
        int64 (n,), from 0.
    alpha : float
        Concentration within a domain, where it is not iid.
    within : str
        How a domain's images are split over its clients: "iid" or "dirichlet".

    As the clients of FedLGF (ECCV 2024) are made.
    """
    _one_of("within", within, ("iid", "dirichlet"))
    if domains is None:
        raise UsageError("--partition domains: this data set does not say of which an image is")
    numbers, sizes = (found.numpy() for found in domains.unique(return_counts=True))
    if clients < len(numbers):
        raise UsageError(
            f"--clients {clients}: --partition domains needs one at least for each of the "
            f"{len(numbers)} domains"
        )
    rows, held = [], []
    for number, many in zip(numbers, _clients_by(sizes, clients), strict=True):
        of_domain = (domains == int(number)).nonzero()[:, 0]
        try:
            if within == "iid":
                part = iid(labels[of_domain], int(many), generator)
            else:
                part = dirichlet(labels[of_domain], int(many), generator, alpha=alpha)
        except UsageError as error:
            raise UsageError(
                f"--partition domains: {many} clients of domain {number}: {error}"
            ) from error
        rows.append(of_domain[part.indices].numpy())
        held.append(part.sizes.numpy())
    return cut(np.concatenate(rows), np.concatenate(held))


METHODS: dict[str, Callable[..., Partition]] = {
    "dirichlet": dirichlet,
    "iid": iid,
    "dirichlet-per-class": dirichlet_per_class,
    "shards": shards,
    "quantity": quantity,
    "csv": csv,
    "natural": natural,
    "domains": domains,
}


def _clients_by(sizes: NDArray[np.int64], clients: int) -> NDArray[np.int64]:
    """Return how many of so many clients each domain has, in proportion to its size."""
    rest = np.full(len(sizes), True)  # of those that are due one at least
    while (small := rest & ((clients - (~rest).sum()) * sizes < sizes[rest].sum())).any():
        rest &= ~small
    many, left = np.ones_like(sizes), clients - (~rest).sum()
    many[rest] = _rounded((left * sizes[rest] / sizes[rest].sum())[None], np.array([left]))[0]
    return many


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
        check_enough(len(pool), many, clients, " at --alpha 0 (one class has too few images)")
    counts = np.zeros((clients, len(pools)), dtype=np.int64)
    client = iter(generator.permutation(clients))
    for c, pool in enumerate(pools):
        for size in even_sizes(len(pool), owners[c]):
            counts[next(client), c] = size
    return deal(pools, counts)


def _one_of(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(
            f"--partition-options: {option} must be {' or '.join(choices)}, got {value!r}"
        )


def _fill(
    priors: NDArray[np.float64],
    sizes: NDArray[np.int64],
    pool: NDArray[np.int64],
    redrawn: Redrawn | None,
) -> NDArray[np.int64]:
    """Return counts (clients, classes) near sizes * priors that just use up the pools.

    Clients are served in turn. As many as have what they wish for are served at once; the next
    one alone, and then the priors of those who come after are those over the classes that are left.
    """
    counts = np.empty(priors.shape, dtype=np.int64)
    left, before = pool.copy(), pool.copy()
    client, block = 0, 1
    while client < len(sizes):
        rest = sizes[client : client + block]
        q, mass = _over(priors[client : client + block], before)
        wishes = _rounded(q * rest[:, None], rest)
        fits = (np.cumsum(wishes, axis=0) <= left).all(axis=1)
        if redrawn:
            fits &= mass
        many = int(np.argmin(np.append(fits, False)))
        counts[client : client + many] = wishes[:many]
        left -= wishes[:many].sum(axis=0)
        client += many
        block = min(2 * block, max(1, AHEAD // len(pool)))
        if many < len(wishes):
            counts[client] = _alone(priors[client], int(sizes[client]), left, redrawn)
            left -= counts[client]
            before = left.copy()
            client, block = client + 1, 1
    return counts


def _alone(
    prior: NDArray[np.float64], size: int, left: NDArray[np.int64], redrawn: Redrawn | None
) -> NDArray[np.int64]:
    """Return one client's counts, though a class runs out."""
    taken = np.zeros_like(left)
    while missing := size - int(taken.sum()):
        q, mass = _over(prior[None], left - taken)
        if redrawn and (taken.any() or not mass[0]):
            q = redrawn(left - taken)
        wish = _rounded(q * missing, np.array([missing]))[0]
        taken += np.minimum(wish, left - taken)
    return taken


def _over(
    priors: NDArray[np.float64], left: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the priors (clients, classes) over the classes that are left, and who has any.

    A client whose classes are all gone (or their priors too small to be told from zero) gets the
    shares of what is left.
    """
    q = np.where(left > 0, priors, 0.0)
    mass = q.sum(axis=1, keepdims=True)
    some = mass > 0
    return np.where(some, q / np.where(some, mass, 1.0), left / left.sum()), some[:, 0]


def _drawn(
    concentration: NDArray[np.float64], generator: np.random.Generator, left: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Draw q (1, classes) ~ Dirichlet(concentration) over the classes that are left.

    Gamma variates of shape a are those of a + 1 times U^(1 / a) (Marsaglia and Tsang, "A Simple
    Method for Generating Gamma Variables", 2000): in logarithms, no a is too small for them.
    """
    alive = left > 0
    a = concentration[alive]
    power = generator.standard_exponential(len(a)) * (a.max() / a)
    with np.errstate(over="ignore"):
        drawn = np.exp((power.min() - power) / a.max()) * generator.standard_gamma(a + 1)
    q = np.zeros((1, len(left)))
    q[0, alive] = drawn / drawn.max()
    return q / q.sum()


def _rounded(wishes: NDArray[np.float64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Round each row (largest remainders first) to integers that sum to its size."""
    counts = np.floor(wishes).astype(np.int64)
    rest = sizes - counts.sum(axis=1)
    order = np.argsort(counts - wishes, axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(order.shape[1])[None], axis=1)
    return counts + (rank < rest[:, None])
