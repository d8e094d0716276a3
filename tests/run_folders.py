"""Folders of finished runs, written by hand: what reports are made of."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from fedsam.config.schema import dump, resolve


def write_run(folder: Path, accuracies: list[float], **given: Any) -> Path:
    """Write a finished run whose rounds 10, 20, ... had these accuracies, a second a round."""
    folder.mkdir(parents=True)
    rounds = 10 * len(accuracies)
    config = resolve({"rounds": rounds} | given)
    (folder / "config.yaml").write_text(dump(config))
    at = dict(zip(range(10, rounds + 1, 10), accuracies, strict=True))
    lines = [{"round": 0, "accuracy": 0.1, "loss": 2.3}]
    for number in range(1, rounds + 1):
        line = {"round": number, "seconds": 1.0, "train_loss": 1.0}
        lines.append(line | ({"accuracy": at[number], "loss": 1.0} if number in at else {}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {
        "finished": True,
        "ended": "all rounds done",
        "final_accuracy": sum(accuracies) / len(accuracies),
        "last_accuracy": accuracies[-1],
        "best_accuracy": max(accuracies),
        "rounds": rounds,
        "seconds": float(rounds),
        "versions": {"fedsam": "0"},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    counts = [[5, 0], [2, 3]]
    np.savez(folder / "partition.npz", indices=range(10), offsets=[0, 5, 10], counts=counts)
    return folder


def measure(run: Path, train: float, test: float, **measures: dict[str, float]) -> Path:
    """Write what fedsam.flatness would: the fit, and a scalar a measure."""
    fit = {"train accuracy": train, "test accuracy": test, "train loss": 0.1, "test loss": 0.5}
    results = {"fit": {"scalars": fit}} | {
        name: {"scalars": scalars, "settings": {"batch": 64}, "curve": [1, 2]}
        for name, scalars in measures.items()
    }
    (run / "flatness.json").write_text(json.dumps({"model": results, "models/000010": {"x": 3}}))
    return run
