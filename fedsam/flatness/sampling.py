"""How far a number that was measured on a sample of images lies from that on all of them."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedsam.base.randomness import torch_generator

PARTS = 4
Errors = dict[str, dict[str, float]]  # by cause ("images", "probes", ...), then by scalar


def parts_of(rows: Tensor, population: int, seed: int) -> list[Tensor]:
    """Return a sample's images in disjoint parts, on each of which a number is measured as well.

    A sample that is the whole population has no sampling error, and is one part.

    Parameters
    ----------
    rows : Tensor
        int64 (n,), the sample.
    population : int
        How many images it was drawn from.
    seed : int
        Which image lies in which part is keyed by it.
    """
    if len(rows) == population:
        return [rows]
    order = torch.randperm(len(rows), generator=torch_generator(seed, "measure parts"))
    return list(rows[order.to(rows.device)].split(max(1, -(-len(rows) // PARTS))))


def sampling_error(
    whole: float, values: Sequence[float], sizes: Sequence[int], population: int
) -> float:
    """Return the root mean square error of a number on n of N images against that on all N.

    With x_c on part c of G, s_c its share of the sample, m = sum_c s_c x_c, f = 1 - n / N::

        sqrt( f G / (G - 1) sum_c s_c^2 (x_c - m)^2  +  (f (m - x) / (G - 1))^2 )

    The first term is the standard error; the second, for what is no mean over images, a bias that
    falls as 1 / n (Quenouille's jackknife): a top eigenvalue is larger on fewer images.

    Parameters
    ----------
    whole : float
        x, on the sample.
    values : sequence of float
        x_c, on its disjoint parts.
    sizes : sequence of int
        Images of each.
    population : int
        N.

    Returns
    -------
    float
        0 where the sample is the population, NaN where it cannot be parted.
    """
    n, count = sum(sizes), len(values)
    if n == population:
        return 0.0
    if count < 2:
        return math.nan
    f = 1 - n / population
    shares = [size / n for size in sizes]
    mean = sum(s * x for s, x in zip(shares, values, strict=True))
    squares = sum((s * (x - mean)) ** 2 for s, x in zip(shares, values, strict=True))
    return math.hypot(
        math.sqrt(f * count / (count - 1) * squares), f * (mean - whole) / (count - 1)
    )


def errors_of_images(
    whole: Mapping[str, float],
    parts: Sequence[Mapping[str, float]],
    sizes: Sequence[int],
    population: int,
) -> dict[str, float]:
    """Return ``sampling_error`` of each scalar."""
    return {
        name: sampling_error(value, [part[name] for part in parts], sizes, population)
        for name, value in whole.items()
    }


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean of independent values; NaN of fewer than two."""
    if len(values) < 2:
        return math.nan
    return torch.tensor(values, dtype=torch.float64).std().item() / math.sqrt(len(values))


def errors_of_means(samples: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return ``standard_error`` of each scalar's values."""
    return {name: standard_error(values) for name, values in samples.items()}
