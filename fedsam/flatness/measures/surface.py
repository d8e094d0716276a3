"""The loss around one model along random directions: filter-normalised surfaces.

Li, Xu, Taylor, Studer, Goldstein: Visualizing the Loss Landscape of Neural Nets, NeurIPS 2018.

Each filter of a Gaussian direction gets the length of the model's filter, so that surfaces of
models whose weights differ in scale can be compared. BatchNorm statistics stay those of the model.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedsam.base.errors import UsageError
from fedsam.base.randomness import torch_generator
from fedsam.base.vector import along
from fedsam.flatness.measures.landscape import evaluate, folded, samples, settings_of
from fedsam.flatness.subject import Subject, Tick, silent

NORMALISED = "each filter as long as the model's; biases and norm layers' parameters zero"


def direction(subject: Subject, number: int) -> Tensor:
    """Return the filter-normalised direction (P,) of this number and the subject's seed."""
    layout = subject.network.layout
    generator = torch_generator(subject.seed, "surface", number)
    return layout.filter_normalised(
        torch.randn(layout.trainable, generator=generator).to(subject.w), subject.w
    )


def offsets(points: int, reach: float) -> list[float]:
    """Return ``points`` steps from -reach to reach, exactly zero in the middle."""
    if points < 3 or points % 2 == 0:
        raise UsageError(
            f"points: must be odd and at least 3, so that the model is one; got {points}"
        )
    if reach <= 0:
        raise UsageError(f"reach: must be > 0, got {reach}")
    return [reach * (2 * i - (points - 1)) / (points - 1) for i in range(points)]


def surface_line(
    subject: Subject,
    *,
    directions: int = 3,
    points: int = 21,
    reach: float = 1.0,
    images: int = 1000,
    update_bn: int = 0,
    tick: Tick = silent,
) -> dict[str, Any]:
    """Return loss and error at w + t d for some random directions d.

    Parameters
    ----------
    subject : Subject
        The model and its data.
    directions : int
        How many lines.
    points : int
        Of each line; odd.
    reach : float
        t goes from -reach to reach; at 1 a filter is moved by its own length.
    images : int
        Of each set, at most; 0: all.
    update_bn : int
        Training images on which BatchNorm's statistics are computed anew at each point; 0: kept.
    tick : callable
        Is told how many points are done.

    Returns
    -------
    dict
        ``t``, and ``train_loss``, ``train_error``, ``test_loss``, ``test_error`` as a list a
        direction. The scalars are those of the model itself, and each one's ``_rise``: the mean
        over all points of all lines, less the model's own.

    Raises
    ------
    UsageError
        If a number is out of its range.
    """
    if directions < 1:
        raise UsageError(f"directions: must be at least 1, got {directions}")
    t, rows = offsets(points, reach), samples(subject, images)

    def states() -> Iterator[Tensor]:
        for number in range(directions):
            d = direction(subject, number)
            yield from (moved(subject, along(subject.w, step, d)) for step in t)

    curves = evaluate(subject, states(), directions * points, rows, tick, update_bn=update_bn)
    settings = settings_of(
        subject,
        rows,
        directions=directions,
        points=points,
        reach=reach,
        direction=NORMALISED,
        update_bn=update_bn,
    )
    lines = {name: folded(values, points) for name, values in curves.whole.items()}
    return {**curves.summarised(partial(rises, points)), "settings": settings, "t": t, **lines}


def surface(
    subject: Subject,
    *,
    points: int = 15,
    reach: float = 1.0,
    images: int = 500,
    update_bn: int = 0,
    tick: Tick = silent,
) -> dict[str, Any]:
    """Return loss and error at w + x d_0 + y d_1 for two random directions.

    Parameters
    ----------
    subject : Subject
        The model and its data.
    points : int
        Of each axis; odd.
    reach : float
        x and y go from -reach to reach.
    images : int
        Of each set, at most; 0: all.
    update_bn : int
        Training images on which BatchNorm's statistics are computed anew at each point; 0: kept.
    tick : callable
        Is told how many points are done.

    Returns
    -------
    dict
        ``x``, ``y``, and loss and error of train and test as a list for each y. Scalars as those of
        ``surface_line``.

    Raises
    ------
    UsageError
        If a number is out of its range.
    """
    t, rows = offsets(points, reach), samples(subject, images)
    d, e = direction(subject, 0), direction(subject, 1)
    states = (moved(subject, along(along(subject.w, x, d), y, e)) for y in t for x in t)
    curves = evaluate(subject, states, points**2, rows, tick, update_bn=update_bn)
    settings = settings_of(
        subject, rows, points=points, reach=reach, direction=NORMALISED, update_bn=update_bn
    )
    grid = {name: folded(values, points) for name, values in curves.whole.items()}
    summary = curves.summarised(partial(rises, points))
    return {**summary, "settings": settings, "x": t, "y": t, **grid}


def moved(subject: Subject, w: Tensor) -> Tensor:
    """Return the subject's state (S,) with other parameters (P,)."""
    return torch.cat([w, subject.state[len(w) :]])


def rises(points: int, values_by_name: dict[str, list[float]]) -> dict[str, float]:
    """Return the value in the middle of the middle line, and the mean of all less that."""
    scalars: dict[str, float] = {}
    for name, values in values_by_name.items():
        lines = len(values) // points
        own = values[lines // 2 * points + points // 2]
        scalars |= {name: own, f"{name}_rise": sum(values) / len(values) - own}
    return scalars
