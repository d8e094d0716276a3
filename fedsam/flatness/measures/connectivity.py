"""Linear mode connectivity: what lies on the straight line between two models.

The barrier is that of Entezari et al. (ICLR 2022),

    B = max over t in [0, 1] of L(w_t) - ((1 - t) L(w_0) + t L(w_1)),  w_t = (1 - t) w_0 + t w_1

which is >= 0, as the ends count. Frankle et al. (ICML 2020) subtract the mean of L(w_0) and L(w_1):
the same where the two models are equally good. Units are not permuted: the models should come from
one initialisation. BatchNorm statistics lie on the line, too, unless they are computed anew there.
"""

from collections.abc import Sequence
from functools import partial
from itertools import combinations
from typing import Any

from fedsam.base.errors import UsageError
from fedsam.flatness.measures.landscape import (
    Named,
    check_alike,
    combined,
    distance,
    evaluate,
    folded,
    samples,
    settings_of,
)
from fedsam.flatness.subject import Tick, silent


def barrier(t: Sequence[float], values: Sequence[float]) -> float:
    """Return the most that values at ``t`` in [0, 1] lie above the line between their ends."""
    first, last = values[0], values[-1]
    return max(value - ((1 - s) * first + s * last) for s, value in zip(t, values, strict=True))


def steps(points: int) -> list[float]:
    """Return ``points`` values from 0 to 1."""
    if points < 3:
        raise UsageError(f"points: a line needs 3 at least, got {points}")
    return [i / (points - 1) for i in range(points)]


def connectivity(
    subjects: Sequence[Named],
    *,
    points: int = 11,
    images: int = 1000,
    update_bn: int = 0,
    tick: Tick = silent,
) -> dict[str, Any]:
    """Return loss and error between every two of some models.

    Parameters
    ----------
    subjects : sequence of (str, Subject)
        Two models or more by name; data and seed are those of the first.
    points : int
        Of each line, with its ends.
    images : int
        Of each set, at most; 0: all.
    update_bn : int
        Training images on which BatchNorm's statistics are computed anew at each point; 0: they lie
        on the line.
    tick : callable
        Is told how many points are done.

    Returns
    -------
    dict
        ``t``, and ``pairs``: two names, their l2 ``distance``, loss and error of train and test
        along the line, and each one's ``_barrier``. The scalars are the barriers' mean and maximum
        over pairs.

    Raises
    ------
    UsageError
        If there are not two models of one network and one data set.
    """
    check_alike(subjects)
    t, subject = steps(points), subjects[0][1]
    rows, trainable = samples(subject, images), subject.network.layout.trainable
    couples = list(combinations(subjects, 2))
    states = (
        combined((one.state, two.state), (1 - s, s), trainable)
        for (_, one), (_, two) in couples
        for s in t
    )
    total = len(couples) * points
    curves = evaluate(subject, states, total, rows, tick, update_bn=update_bn)
    lines = {name: folded(values, points) for name, values in curves.whole.items()}
    pairs: list[dict[str, Any]] = []
    for number, ((a, one), (b, two)) in enumerate(couples):
        of_pair = {name: each[number] for name, each in lines.items()}
        heights = {f"{name}_barrier": barrier(t, values) for name, values in of_pair.items()}
        pairs.append({"models": [a, b], "distance": distance(one.w, two.w), **heights, **of_pair})
    settings = settings_of(subject, rows, points=points, update_bn=update_bn)
    summary = curves.summarised(partial(barriers, t))
    return {**summary, "settings": settings, "t": t, "pairs": pairs}


def barriers(t: Sequence[float], values_by_name: dict[str, list[float]]) -> dict[str, float]:
    """Return the mean and the largest of the barriers of some lines, one after the other."""
    scalars: dict[str, float] = {}
    for name, values in values_by_name.items():
        heights = [barrier(t, line) for line in folded(values, len(t))]
        scalars[f"{name}_barrier"] = sum(heights) / len(heights)
        scalars[f"{name}_barrier_max"] = max(heights)
    return scalars
