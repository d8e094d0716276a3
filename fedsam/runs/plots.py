"""The pictures of one run: its curves, and its partition."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedsam.data.partition import heterogeneity
from fedsam.runs.metrics import LOSS, TRAIN_LOSS, curve, headline_in, matrix, of_tasks, words_of

SHOWN = 100  # clients in the picture of a partition


def curves_of(lines: Sequence[dict[str, Any]]) -> Any:
    """Return a figure of the headline, and test and train loss, over metrics.jsonl's rounds."""
    from matplotlib.figure import Figure  # a second of import that only this needs

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    headline = headline_in(lines)
    shown, loss, train = (curve(lines, key) for key in (headline, LOSS, TRAIN_LOSS))
    left.plot(list(shown), [100 * value for value in shown.values()], color="C0")
    left.set(xlabel="round", ylabel=f"test {words_of(headline)} (%)", ylim=(0, 100))
    grey = {"color": "0.75", "linewidth": 0.6, "label": "train (cohort)"}
    right.plot(list(train), list(train.values()), **grey)
    right.plot(list(loss), list(loss.values()), color="C3", label="test")
    right.set(xlabel="round", ylabel="loss (nats)")
    right.set_ylim(bottom=0)
    right.legend(frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_curves(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the figure of ``curves_of`` as a PNG."""
    curves_of(lines).savefig(path, dpi=120)


def draw_partition(counts: Tensor, path: Path) -> None:
    """Draw which client holds how much of which class, as bubbles, into a PNG.

    ``counts`` is int64 (clients, classes).
    """
    from matplotlib.figure import Figure

    split = heterogeneity(counts)
    row = min(0.24, 10 / counts.shape[1])  # inches
    figure = Figure(figsize=(11, 1.4 + row * counts.shape[1]), layout="constrained")
    axes = figure.subplots()
    bubbles(axes, counts, row)
    classes = "{classes_mean:.1f} classes a client ({classes_min} to {classes_max})"
    said = f"{classes}, distance to the whole {{distance_mean:.2f}}".format(**split)
    axes.set_title(f"{axes.get_title()}; {said}", fontsize="medium")
    figure.savefig(path, dpi=120)


def bubbles(axes: Any, counts: Tensor, row: float) -> None:
    """Draw images by client and class onto axes of 10 inches; the first 100 clients are shown.

    Parameters
    ----------
    axes : Axes
        Matplotlib's.
    counts : Tensor
        int64 (clients, classes).
    row : float
        Height of a class in inches.
    """
    shown = counts[:SHOWN]
    clients, classes = shown.shape
    largest = max(int(shown.max()), 1)
    # the largest bubble is as wide as the narrower of a row and a column, and a fifth more
    points = 1.2 * 72 * min(row, max(10 / clients, 0.12))
    client, cls = shown.nonzero(as_tuple=True)
    area = (points**2 * shown[client, cls] / largest).clamp(min=2)  # below, a dot is not seen
    axes.scatter(client, cls, s=area, c=cls % 10, cmap="tab10", vmin=0, vmax=9, lw=0)
    axes.set(xlabel="client", ylabel="class", xlim=(-1, clients), ylim=(-0.9, classes - 0.1))
    for axis, length in ((axes.xaxis, clients), (axes.yaxis, classes)):
        axis.set_ticks(range(0, length, 1 if length <= 20 else 10 * -(-length // 100)))
    first = "" if clients == len(counts) else f"the first {SHOWN} of "
    many = f"{len(counts):,} client{'s' * (len(counts) != 1)}"
    axes.set_title(f"{first}{many}; the largest bubble is {largest:,} images", fontsize="medium")
    axes.set_axisbelow(True)
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)


def draw_lifelong(lines: Sequence[dict[str, Any]], ends: Sequence[int], path: Path) -> None:
    """Draw the headline of each task over metrics.jsonl's rounds, and after each task, into a PNG.

    ``ends`` are the last rounds of the tasks.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    headline = headline_in(lines)
    by_round = curve(lines, of_tasks(headline)[0])
    for task in range(len(ends)):
        points = {number: 100 * a[task] for number, a in by_round.items() if len(a) > task}
        if points:
            color, label = f"C{task % 10}", f"task {task + 1}"
            left.plot(list(points), list(points.values()), color=color, label=label)
    for end in ends[:-1]:
        left.axvline(end, color="0.6", linewidth=0.7, linestyle=":")
    left.set(xlabel="round (dotted: the next task begins)", ylabel=f"test {words_of(headline)} (%)")
    left.set_ylim(0, 103)
    left.grid(alpha=0.25)
    left.spines[["top", "right"]].set_visible(False)
    if by_round:  # a signal came first
        left.legend(frameon=False, fontsize="small", ncols=-(-len(ends) // 10))
    a = [[100 * value for value in row] for row in matrix(lines, ends)]
    if a:
        cells = [row + [float("nan")] * (len(ends) - len(row)) for row in a]
        shown = right.imshow(cells, vmin=0, vmax=100, cmap="viridis")
        figure.colorbar(shown, ax=right, label=f"{words_of(headline)} (%)", shrink=0.85)
        if len(ends) <= 10:
            for k, row in enumerate(a):
                for j, value in enumerate(row):
                    ink = "white" if value < 60 else "black"
                    right.text(j, k, f"{value:.0f}", ha="center", va="center", color=ink)
    ticks = range(0, len(ends), -(-len(ends) // 10))
    for axis in (right.xaxis, right.yaxis):
        axis.set_ticks(ticks, [str(task + 1) for task in ticks])
    right.set(xlabel="on task", ylabel="after task")
    figure.savefig(path, dpi=120)


def draw_answers(
    images: NDArray[np.uint8], truth: NDArray[Any], answers: NDArray[Any], outside: int, path: Path
) -> None:
    """Draw images, and below them what is true and what is said of each pixel, into a PNG.

    Parameters
    ----------
    images : ndarray
        uint8 (n, H, W, C), C one or three.
    truth, answers : ndarray
        Whole numbers (n, H, W), each a class.
    outside : int
        What the truth says of pixels of no class, which are white in both.
    path : Path
        Of the picture.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    nothing = truth == outside
    classes = np.union1d(truth[~nothing], answers)
    palette = colormaps["tab10" if len(classes) <= 10 else "tab20"]
    colors = np.array([palette(number % palette.N)[:3] for number in range(len(classes))])
    many, height, width = truth.shape
    figure = Figure(figsize=(1.5 * many, 4.5 * height / width + 0.9), layout="constrained")
    rows = figure.subplots(3, many, squeeze=False)
    for column, image in enumerate(images):
        rows[0, column].imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray")
        for row, values in ((1, truth), (2, answers)):
            shown = colors[np.searchsorted(classes, values[column]).clip(max=len(classes) - 1)]
            shown[nothing[column]] = 1
            rows[row, column].imshow(shown, interpolation="nearest")
    for row, text in zip(rows, ("image", "truth", "answer"), strict=True):
        row[0].set_ylabel(text)
        for axes in row:
            axes.set(xticks=[], yticks=[])
    patches = [Patch(color=c, label=str(n)) for n, c in zip(classes, colors, strict=True)]
    figure.legend(
        handles=patches,
        title="class (white: none)",
        loc="outside lower center",
        ncols=min(len(patches), 2 * many),
        frameon=False,
        fontsize="small",
        title_fontsize="small",
        handlelength=1,
        columnspacing=1,
    )
    figure.savefig(path, dpi=120)
