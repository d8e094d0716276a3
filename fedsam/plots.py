"""The pictures of one run: its curves, and its partition."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

SHOWN = 100  # clients in the picture of a partition


def draw_curves(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw test accuracy, and test and train loss, over the rounds of metrics.jsonl's ``lines``."""
    from matplotlib.figure import Figure  # a second of import that only this needs

    tests = [line for line in lines if "accuracy" in line]
    trains = [line for line in lines if line.get("train_loss") is not None]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    rounds = [line["round"] for line in tests]
    left.plot(rounds, [100 * line["accuracy"] for line in tests], color="C0")
    left.set(xlabel="round", ylabel="test accuracy (%)", ylim=(0, 100))
    right.plot(
        [line["round"] for line in trains],
        [line["train_loss"] for line in trains],
        color="0.75",
        linewidth=0.6,
        label="train (cohort)",
    )
    right.plot(rounds, [line["loss"] for line in tests], color="C3", label="test")
    right.set(xlabel="round", ylabel="loss (nats)")
    right.set_ylim(bottom=0)
    right.legend(frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def draw_partition(counts: Tensor, path: Path) -> None:
    """Draw which client holds how much of which class, as bubbles.

    Parameters
    ----------
    counts : Tensor
        int64 (clients, classes); the first 100 clients are shown.
    path : Path
        Where the PNG goes.
    """
    from matplotlib.figure import Figure

    clients, classes = counts.shape
    shown = counts[:SHOWN]
    figure = Figure(figsize=(11, 1.4 + min(classes, 100) * 0.22), layout="constrained")
    axes = figure.subplots()
    client, cls = shown.nonzero(as_tuple=True)
    share = shown[client, cls] / counts.max()
    axes.scatter(client, cls, s=4 + 120 * share, c=cls % 10, cmap="tab10", vmin=0, vmax=9, lw=0)
    axes.set(xlabel="client", ylabel="class", xlim=(-1, len(shown)), ylim=(-0.8, classes - 0.2))
    if classes <= 20:
        axes.set_yticks(range(classes))
    first = "" if clients <= SHOWN else f"the first {SHOWN} of "
    axes.set_title(
        f"{first}{clients:,} clients; area: images of a class, the largest is {int(counts.max())}",
        fontsize="medium",
    )
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
