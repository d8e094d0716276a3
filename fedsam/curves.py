"""The curves of one run: accuracy and loss over rounds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


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
