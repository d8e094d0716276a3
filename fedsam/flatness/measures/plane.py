"""The loss in the plane of three models: FedAvg, SAM and SWA, or three clients of a round.

Garipov et al. (NeurIPS 2018) and Izmailov et al. (UAI 2018). With u = w_2 - w_1 and v = w_3 - w_1
made orthogonal to it,

    P(x, y) = w_1 + x u / |u| + y v / |v|

so that distances in the picture are l2 distances of parameters. The same point is
(1 - b - c) w_1 + b w_2 + c w_3 with c = y / y_3 and b = (x - c x_3) / x_2: BatchNorm statistics
are combined by these weights, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedsam.base.errors import UsageError
from fedsam.flatness.measures.landscape import (
    Named,
    check_alike,
    combined,
    distance,
    evaluate,
    folded,
    inner,
    samples,
    settings_of,
)
from fedsam.flatness.subject import Tick, silent

FLAT = 1e-3  # a triangle this much lower than long is a line


@dataclass(frozen=True)
class Plane:
    """Three models (S,) and where they lie: the first at (0, 0), the second at (x_2, 0).

    Attributes
    ----------
    states : tuple of Tensor
        Three states (S,).
    trainable : int
        P.
    corners : tuple
        Three pairs (x, y), in units of ``|w|``.
    """

    states: tuple[Tensor, Tensor, Tensor]
    trainable: int
    corners: tuple[tuple[float, float], tuple[float, float], tuple[float, float]]

    @classmethod
    def through(cls, states: Sequence[Tensor], trainable: int) -> "Plane":
        """Return the plane of three models.

        Raises
        ------
        UsageError
            If they lie on one line.
        """
        one, two, three = (state[:trainable] for state in states)
        u, v = two - one, three - one
        length = distance(two, one)
        if not length:
            raise UsageError("the first two models are the same: no plane goes through them")
        x = inner(u, v) / length
        y = distance(v, u * (x / length))
        if y <= FLAT * max(length, abs(x)):
            raise UsageError("the three models lie on one line: measure their connectivity instead")
        return cls((states[0], states[1], states[2]), trainable, ((0, 0), (length, 0), (x, y)))

    def weights(self, x: float, y: float) -> tuple[float, float, float]:
        """Return the three models' weights at a point; they sum to one."""
        _, (x_2, _), (x_3, y_3) = self.corners
        c = y / y_3
        b = (x - c * x_3) / x_2
        return 1 - b - c, b, c

    def at(self, x: float, y: float) -> Tensor:
        """Return the state (S,) at a point."""
        return combined(self.states, self.weights(x, y), self.trainable)

    def axes(self, points: int, margin: float) -> tuple[list[float], list[float]]:
        """Return the x and y of a square grid: the models, and a margin as part of their span."""
        spans = [(min(values), max(values)) for values in zip(*self.corners, strict=True)]
        side = (1 + 2 * margin) * max(high - low for low, high in spans)
        xs, ys = (
            [(low + high) / 2 + side * (i / (points - 1) - 0.5) for i in range(points)]
            for low, high in spans
        )
        return xs, ys


def plane(
    subjects: Sequence[Named],
    *,
    points: int = 15,
    margin: float = 0.3,
    images: int = 500,
    update_bn: int = 0,
    tick: Tick = silent,
) -> dict[str, Any]:
    """Return loss and error in the plane of three models, at each of them and at their mean.

    Parameters
    ----------
    subjects : sequence of (str, Subject)
        Three models by name; data and seed are those of the first.
    points : int
        Of each axis.
    margin : float
        Around the models, as a part of their span.
    images : int
        Of each set, at most; 0: all.
    update_bn : int
        Training images on which BatchNorm's statistics are computed anew at each point; 0: they are
        combined as the weights are.
    tick : callable
        Is told how many points are done.

    Returns
    -------
    dict
        ``x``, ``y`` in units of ``|w|``, loss and error of train and test as a list for each y, and
        ``models``: name, x, y, loss and error of the three and of their plain mean. The scalars are
        those of the mean, and each one's ``_gap``: the mean's, less the mean of the three models'.

    Raises
    ------
    UsageError
        If there are not three models, of one network and one data set, that span a plane.
    """
    check_alike(subjects, 3)
    if points < 2:
        raise UsageError(f"points: must be at least 2, got {points}")
    subject = subjects[0][1]
    trainable = subject.network.layout.trainable
    flat = Plane.through([one.state for _, one in subjects], trainable)
    rows = samples(subject, images)
    xs, ys = flat.axes(points, margin)
    total = points**2 + 4
    mean = tuple(sum(values) / 3 for values in zip(*flat.corners, strict=True))
    marks = [*flat.corners, mean]
    points_of_grid = [(x, y) for y in ys for x in xs]
    states = (flat.at(*point) for point in (*marks, *points_of_grid))
    curves = evaluate(subject, states, total, rows, tick, update_bn=update_bn)
    names = [*(name for name, _ in subjects), "mean"]
    models = [
        {"name": name, "x": x, "y": y} | {what: values[i] for what, values in curves.whole.items()}
        for i, (name, (x, y)) in enumerate(zip(names, marks, strict=True))
    ]
    return {
        **curves.summarised(gaps),
        "settings": settings_of(subject, rows, points=points, margin=margin, update_bn=update_bn),
        "x": xs,
        "y": ys,
        "models": models,
        **{name: folded(values[len(marks) :], points) for name, values in curves.whole.items()},
    }


def gaps(values_by_name: dict[str, list[float]]) -> dict[str, float]:
    """Return the mean model's values, the fourth, and those less the mean of the first three."""
    scalars: dict[str, float] = {}
    for name, values in values_by_name.items():
        scalars |= {name: values[3], f"{name}_gap": values[3] - sum(values[:3]) / 3}
    return scalars
