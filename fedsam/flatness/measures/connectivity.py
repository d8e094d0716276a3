"""Linear mode connectivity: what lies on the straight line between two models.

The barrier is that of Entezari et al. (ICLR 2022),

    B = max over t in [0, 1] of L(w_t) - ((1 - t) L(w_0) + t L(w_1)),  w_t = (1 - t) w_0 + t w_1

which is >= 0, as the ends count. Frankle et al. (ICML 2020) subtract the mean of L(w_0) and L(w_1):
the same where the two models are equally good. Units are not permuted: the models should come from
one initialisation. BatchNorm statistics lie on the line, too.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from fedsam.base.errors import UsageError
from fedsam.flatness.measures.landscape import (
    Named,
    check_alike,
    combined,
    distance,
    evaluate,
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
    found = evaluate(subject, states, len(couples) * points, rows, tick)
    pairs: list[dict[str, Any]] = []
    for number, ((a, one), (b, two)) in enumerate(couples):
        mine = slice(number * points, (number + 1) * points)
        lines = {name: values[mine] for name, values in found.items()}
        heights = {f"{name}_barrier": barrier(t, values) for name, values in lines.items()}
        pairs.append({"models": [a, b], "distance": distance(one.w, two.w), **heights, **lines})
    scalars: dict[str, float] = {}
    for name in found:
        over = [pair[f"{name}_barrier"] for pair in pairs]
        scalars |= {f"{name}_barrier": sum(over) / len(over), f"{name}_barrier_max": max(over)}
    settings = settings_of(subject, rows, points=points)
    return {"scalars": scalars, "settings": settings, "t": t, "pairs": pairs}
