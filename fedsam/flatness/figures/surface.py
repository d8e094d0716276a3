"""Pictures of loss surfaces, planes of models, the lines between them, and a round's clients."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVELS = 10  # of a contour plot
SHARE = 0.02  # of the range of values: the first level above the lowest
METRICS = {"loss": ("loss (nats)", 1), "error": ("error (%)", 100)}
COLOURS = {"train": "C0", "test": "C3"}
MARKS = "o^sD"  # of three models and their mean


def draw_line(result: Mapping[str, Any], name: str = "the model") -> Any:
    """Return a figure of a ``surface_line``: a thin line a direction, a thick one their mean."""
    figure, panels = _panels(2, 3.7)
    for axes, what in zip(panels, METRICS, strict=True):
        label, factor = METRICS[what]
        for on, colour in COLOURS.items():
            lines = factor * _numbers(result[f"{on}_{what}"])
            axes.plot(result["t"], lines.T, color=colour, lw=0.7, alpha=0.35)
            axes.plot(result["t"], lines.mean(0), color=colour, lw=2, label=on)
        axes.axvline(0, color="0.6", lw=0.8, ls=":")
        axes.set(xlabel="t, along filter-normalised directions", ylabel=label)
        _plain(axes)
    panels[0].legend(frameon=False)
    count = result["settings"]["directions"]
    figure.suptitle(f"Around {name}: {count} random direction{'s' * (count != 1)}, and their mean")
    return figure


def draw_surface(result: Mapping[str, Any], name: str = "the model") -> Any:
    """Return a figure of a ``surface``: train loss and test error as contours."""
    figure, panels = _panels(2, 4.2)
    for axes, (on, what) in zip(panels, (("train", "loss"), ("test", "error")), strict=True):
        _contours(figure, axes, result, on, what)
        axes.plot(0, 0, "w+", ms=12, mew=2)
        axes.set(xlabel="x, filter-normalised", ylabel="y, filter-normalised", aspect="equal")
    figure.suptitle(f"Around {name}, the white cross, along two random directions")
    return figure


def draw_plane(result: Mapping[str, Any]) -> Any:
    """Return a figure of a ``plane``: train loss and test error, with the models marked."""
    figure, panels = _panels(2, 5.0)
    for axes, (on, what) in zip(panels, (("train", "loss"), ("test", "error")), strict=True):
        _contours(figure, axes, result, on, what)
        _, factor = METRICS[what]
        for mark, model in zip(MARKS, result["models"], strict=True):
            value = factor * model[f"{on}_{what}"]
            axes.plot(
                model["x"],
                model["y"],
                mark,
                color="white",
                markeredgecolor="black",
                ms=9,
                ls="none",
                label=f"{model['name']}: {value:.3g}",
            )
        axes.set(xlabel="x, l2 distance", ylabel="y, l2 distance", aspect="equal")
        axes.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, -0.13),
            ncols=2,
            frameon=False,
            fontsize=9,
            columnspacing=1,
            handletextpad=0.3,
        )
    figure.suptitle("The plane of three models, and their mean")
    return figure


def draw_connectivity(result: Mapping[str, Any]) -> Any:
    """Return a figure of ``connectivity``: test (solid) and train (dashed) between two models."""
    pairs = result["pairs"]
    rows = -(-len(pairs) // 2)
    figure, panels = _panels(2, 3.8 + 0.22 * rows)
    for axes, what in zip(panels, METRICS, strict=True):
        label, factor = METRICS[what]
        for number, pair in enumerate(pairs):
            for on, dashes in (("test", "-"), ("train", "--")):
                values = factor * _numbers(pair[f"{on}_{what}"])
                shown = " to ".join(pair["models"]) if on == "test" else None
                axes.plot(result["t"], values, dashes, color=f"C{number % 10}", label=shown)
        axes.set(xlabel="t, from the first model to the second", ylabel=label)
        _plain(axes)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    worst = result["scalars"]["test_loss_barrier_max"]
    figure.suptitle(
        f"On the line between models: test solid, train dashed; highest test barrier {worst:.3g}"
    )
    return figure


def draw_cohort(result: Mapping[str, Any]) -> Any:
    """Return a figure of a ``cohort_spread``: cosines of updates, and losses before and after."""
    figure, (left, right) = _panels(2, 4.2)
    cosines, clients = _numbers(result["cosines"]), [row["client"] for row in result["clients"]]
    image = left.imshow(cosines, cmap="RdBu_r", vmin=-1, vmax=1)
    figure.colorbar(image, ax=left, label="cosine", shrink=0.8)
    places = range(len(clients))
    left.set_xticks(places, clients, rotation=90 if len(clients) > 6 else 0)
    left.set_yticks(places, clients)
    left.set(title="Between the clients' updates", xlabel="client", ylabel="client")
    if len(clients) <= 10:
        for i in places:
            for j in places:
                dark = abs(cosines[i, j]) > 0.6
                text = f"{cosines[i, j]:.2f}".replace("0.", ".", 1)
                left.text(j, i, text, ha="center", va="center", c="w" if dark else "k", size=8)
    losses = (
        ("own_loss_before", "own images, before", "C0", "o"),
        ("own_loss_after", "own images, after", "C2", "v"),
        ("test_loss", "test set, after", "C3", "s"),
    )
    for key, label, colour, mark in losses:
        values = [row[key] for row in result["clients"]]
        right.plot(places, values, mark, color=colour, label=label)
    average = result["scalars"]["test_loss"]
    right.axhline(average, color="k", lw=1.2, ls="--", label="test set, their average")
    right.set_yscale("log")  # a client's own loss may fall by a factor of thousands
    right.set_xticks(places, clients, rotation=90 if len(clients) > 6 else 0)
    right.set(title="What a round of training does", xlabel="client", ylabel="loss (nats)")
    right.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    _plain(right)
    return figure


def levels(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return contour levels that grow from the lowest value by a factor.

    So a flat minimum shows its form and a wall does not fill the picture. Of values of which none
    is finite: 0 and 1.
    """
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        return np.array([low, high + 1.0])
    between = low + np.geomspace(SHARE, 1.0, LEVELS)[:-1] * (high - low)
    return np.concatenate([[low], between, [high]])


def _contours(figure: Any, axes: Any, result: Mapping[str, Any], on: str, what: str) -> None:
    from matplotlib.colors import BoundaryNorm

    label, factor = METRICS[what]
    values = factor * _numbers(result[f"{on}_{what}"])
    steps = levels(values)
    norm = BoundaryNorm(steps, 256)
    drawn = axes.contourf(result["x"], result["y"], values, steps, cmap="viridis", norm=norm)
    axes.contour(result["x"], result["y"], values, steps, colors="k", linewidths=0.4, alpha=0.5)
    bar = figure.colorbar(drawn, ax=axes, shrink=0.75, ticks=steps)
    digits = max(0, math.ceil(-math.log10(np.diff(steps).min())))
    bar.ax.set_yticklabels([f"{step:.{digits}f}" for step in steps], fontsize=8)
    axes.set_title(f"{on} {label}")


def _numbers(values: Sequence[Any]) -> NDArray[np.float64]:
    return np.array(values, dtype=np.float64)  # None, where JSON had no number, is NaN


def _panels(count: int, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # a second of import that only this needs

    figure = Figure(figsize=(4.5 * count, height), layout="constrained")
    return figure, figure.subplots(1, count)


def _plain(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
