"""Robustness to corrupted images: CIFAR-10-C and CIFAR-100-C, or what of them can be made here."""

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsam.base.errors import UsageError
from fedsam.base.randomness import numpy_generator
from fedsam.flatness.measures.evaluation import accuracy
from fedsam.flatness.measures.made_corruptions import MADE, SIDE, SOURCE, corrupt
from fedsam.flatness.measures.published_corruptions import (
    BENCHMARK,
    EXTRA,
    OFFICIAL,
    SEVERITIES,
    read_published,
)
from fedsam.flatness.subject import Subject

CHUNK = 1000  # images made at a time
Pictures = Callable[[str, int], Tensor]


def corruptions(subject: Subject, *, folder: str = "", images: int = 2000) -> dict[str, Any]:
    """Return the accuracy on corrupted test images.

    Parameters
    ----------
    subject : Subject
        Trained on clean images.
    folder : str
        Of the published files: labels.npy and a file for each corruption. Without it, those
        corruptions that can be are made here from the run's own test images; that is not
        CIFAR-10-C, and its scalars have other names.
    images : int
        Test images to make corruptions of, a keyed sample; 0 for all. Without meaning for the
        published files, which are always used whole.

    Returns
    -------
    dict
        ``scalars``: ``accuracy``, on the same images clean; ``corruption_accuracy``, the mean over
        corruptions and severities, and ``corruption_accuracy_severity_S``; with all 15 of the
        benchmark ``corruption_accuracy_15``, over those alone. Where made here, every name but the
        first begins with ``made_``. ``accuracies``: five severities of each corruption.
        ``settings``: among them what is ``missing``.

    Raises
    ------
    UsageError
        If the files are not what they should be, or the images not 32 x 32 in colour.
    """
    return _on_published(subject, Path(folder)) if folder else _on_made(subject, images)


def _on_published(subject: Subject, folder: Path) -> dict[str, Any]:
    test = subject.test
    published = read_published(folder, tuple(test.raw.shape[1:]), test.targets.cpu())
    count = len(published.labels)
    settings = {
        "source": "published files",
        "folder": str(folder),
        "images": count,
        "official_count": count == OFFICIAL,
    }
    found = _accuracies(subject, list(published.files), published.images, published.labels)
    return _result(accuracy(subject, test), found, settings, "")


def _on_made(subject: Subject, images: int) -> dict[str, Any]:
    if tuple(subject.test.raw.shape[1:]) != (SIDE, SIDE, 3):
        raise UsageError(
            f"corruptions: the published parameters are for {SIDE} x {SIDE} images in colour"
        )
    rows = subject.sample("test", images)
    clean = subject.test.raw[rows.to(subject.test.padded.device)].cpu().numpy()

    def pictures(name: str, severity: int) -> Tensor:
        rng = numpy_generator(subject.seed, f"corruption {name}", severity)
        starts = range(0, len(clean), CHUNK)
        parts = [corrupt(name, clean[i : i + CHUNK], severity, rng) for i in starts]
        return torch.from_numpy(np.concatenate(parts))

    targets = subject.test.targets.cpu()[rows]
    settings = {
        "source": "made here, not CIFAR-10-C",
        "parameters": SOURCE,
        "images": len(rows),
        "seed": subject.seed,
    }
    found = _accuracies(subject, list(MADE), pictures, targets)
    return _result(accuracy(subject, subject.test, rows), found, settings, "made_")


def _accuracies(
    subject: Subject, names: list[str], pictures: Pictures, targets: Tensor
) -> dict[str, list[float]]:
    return {
        name: [
            accuracy(subject, subject.test.with_raw(pictures(name, severity), targets))
            for severity in range(1, SEVERITIES + 1)
        ]
        for name in names
    }


def _result(
    clean: float, found: Mapping[str, list[float]], settings: dict[str, Any], prefix: str
) -> dict[str, Any]:
    total = f"{prefix}corruption_accuracy"
    scalars = {"accuracy": clean, total: mean(map(mean, found.values()))}
    if set(BENCHMARK) <= set(found):
        scalars[f"{total}_{len(BENCHMARK)}"] = mean(mean(found[name]) for name in BENCHMARK)
    for severity in range(SEVERITIES):
        of_all = mean(values[severity] for values in found.values())
        scalars[f"{total}_severity_{severity + 1}"] = of_all
    missing = [name for name in (*BENCHMARK, *EXTRA) if name not in found]
    settings |= {"corruptions": list(found), "missing": missing}
    return {"scalars": scalars, "settings": settings, "accuracies": dict(found)}
