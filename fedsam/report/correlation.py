"""Kendall's tau between two quantities of the same runs, with a confidence interval."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedsam.base.errors import UsageError
from fedsam.base.randomness import numpy_generator

FEWEST = 3  # runs
RESAMPLES = 2000
CONFIDENCE = 0.95


class Correlation(NamedTuple):
    """Kendall's tau-b in [-1, 1], its interval, and of how many runs; NaN where it is undefined."""

    tau: float
    low: float
    high: float
    runs: int


def kendall(x: Sequence[float], y: Sequence[float], seed: int = 0) -> Correlation:
    """Return Kendall's tau-b of two quantities, and its 95% percentile bootstrap interval.

    tau-b = (concordant - discordant) / sqrt(pairs not tied in x * pairs not tied in y), over all
    pairs of runs (Kendall 1945); undefined where all x, or all y, are equal. The bootstrap draws
    as many runs again, with replacement, and leaves out draws of which it is undefined.

    Parameters
    ----------
    x, y : sequence of float
        One value of each a run, finite.
    seed : int
        Of the resampling.

    Raises
    ------
    UsageError
        If there are fewer than three runs.
    """
    runs = len(x)
    if runs < FEWEST:
        raise UsageError(f"Kendall's tau: needs {FEWEST} runs at least, got {runs}")
    signs = [np.sign(np.subtract.outer(values, values)) for values in (x, y)]
    draws = numpy_generator(seed, "bootstrap", runs).multinomial(
        runs, [1 / runs] * runs, size=RESAMPLES
    )
    (tau,) = _tau(np.ones((1, runs)), *signs)
    again = _tau(draws.astype(float), *signs)
    again = again[~np.isnan(again)]
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(again, [tail, 100 - tail]) if len(again) else (np.nan, np.nan)
    return Correlation(float(tau), float(low), float(high), runs)


def _tau(
    times: NDArray[np.float64], sx: NDArray[np.float64], sy: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return tau-b of samples in which each run occurs so many ``times``, (samples, runs)."""

    def pairs(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
        return ((times @ matrix) * times).sum(1)

    untied = pairs(sx**2) * pairs(sy**2)
    with np.errstate(invalid="ignore"):
        return np.where(untied > 0, pairs(sx * sy) / np.sqrt(untied), np.nan)
