"""Robustness to corrupted images: CIFAR-10-C and CIFAR-100-C, or what of them can be made here."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsam.base.errors import UsageError
from fedsam.base.randomness import numpy_generator
from fedsam.flatness.measures.evaluation import Headlines, Sample, mean_of
from fedsam.flatness.measures.made_corruptions import MADE, SIDE, SOURCE, corrupt
from fedsam.flatness.measures.published_corruptions import (
    BENCHMARK,
    EXTRA,
    OFFICIAL,
    SEVERITIES,
    read_published,
)
from fedsam.flatness.subject import Subject, name_of
from fedsam.runs import files

CHUNK = 1000  # images made at a time
MADE_HERE = "made here, not CIFAR-10-C"
Pictures = Callable[[str, int], Tensor]


def corruptions(
    subject: Subject, *, folder: str = "", baseline: str = "", images: int = 2000
) -> dict[str, Any]:
    """Return the headline on corrupted test images.

    Parameters
    ----------
    subject : Subject
        Trained on clean images.
    folder : str
        Of the published files: labels.npy and a file for each corruption. Without it, those
        corruptions that can be are made here from the run's own test images; that is not
        CIFAR-10-C, and its scalars have other names.
    baseline : str
        A run's folder whose model was measured in the same way: its errors are the unit of mCE.
    images : int
        Test images to make corruptions of, a keyed sample; 0 for all. Without meaning for the
        published files, which are always used whole.

    Returns
    -------
    dict
        ``scalars``: ``accuracy``, or whatever the headline is called, on the same images clean (NaN
        where a folder holds fewer images, and its labels are not those of the first of them);
        ``corruption_accuracy``, the mean over the benchmark's 15 corruptions and the severities,
        and ``corruption_accuracy_severity_S``; ``extra_corruption_accuracy``, over those of the 4
        others that there are. Where only some of the 15 are in the folder the names begin with
        ``partial_``, where they were made here with ``made_``. With a ``baseline``, ``mce``: the
        mean over the corruptions of the sum of errors over severities, divided by the baseline's.
        ``accuracies``: the headline at five severities of each corruption. ``settings``: among them
        what is ``missing``.

    Raises
    ------
    UsageError
        If the files are not what they should be, or the images not 32 x 32 in colour.

    References
    ----------
    Hendrycks and Dietterich, Benchmarking neural network robustness to common corruptions and
    perturbations (ICLR 2019, arXiv 1903.12261); mCE is in section 4, of AlexNet there.
    """
    if folder:
        return _on_published(subject, Path(folder), baseline)
    return _on_made(subject, images, baseline)


def _on_published(subject: Subject, folder: Path, baseline: str) -> dict[str, Any]:
    test = subject.test
    labels = test.targets.cpu()
    published = read_published(folder, tuple(test.raw.shape[1:]), labels)
    count = len(published.labels)
    sample = Sample(subject, torch.arange(count))
    aligned = torch.equal(published.labels, labels[:count])
    clean = sample.headlines_at(subject.w) if aligned else np.full(len(sample.parts) + 1, math.nan)
    settings = {
        "source": "published files",
        "folder": str(folder),
        "official_count": count == OFFICIAL,
        "unknown_files": published.unknown,
    }
    headlines = _on_pictures(sample, list(published.files), published.images, published.labels)
    whole = set(BENCHMARK) <= set(headlines)
    return _result(sample, clean, headlines, settings, "" if whole else "partial_", baseline)


def _on_made(subject: Subject, images: int, baseline: str) -> dict[str, Any]:
    if tuple(subject.test.raw.shape[1:]) != (SIDE, SIDE, 3):
        raise UsageError(
            f"corruptions: the published parameters are for {SIDE} x {SIDE} images in colour"
        )
    sample = Sample.of(subject, images)
    held = subject.test.only(sample.rows.to(subject.test.targets.device))
    clean = held.raw.cpu().numpy()

    def pictures(name: str, severity: int) -> Tensor:
        rng = numpy_generator(subject.seed, f"corruption {name}", severity)
        starts = range(0, len(clean), CHUNK)
        parts = [corrupt(name, clean[i : i + CHUNK], severity, rng) for i in starts]
        return torch.from_numpy(np.concatenate(parts))

    targets = held.targets.cpu()
    headlines = _on_pictures(sample, list(MADE), pictures, targets)
    settings = {"source": MADE_HERE, "parameters": SOURCE}
    as_trained = sample.headlines_at(subject.w)
    return _result(sample, as_trained, headlines, settings, "made_", baseline)


def _on_pictures(
    sample: Sample, names: Sequence[str], pictures: Pictures, targets: Tensor
) -> dict[str, list[Headlines]]:
    test = sample.subject.test
    return {
        name: [
            sample.headlines_on(test.with_raw(pictures(name, severity), targets))
            for severity in range(1, SEVERITIES + 1)
        ]
        for name in names
    }


def _result(
    sample: Sample,
    clean: Headlines,
    headlines: Mapping[str, list[Headlines]],
    settings: dict[str, Any],
    prefix: str,
    baseline: str,
) -> dict[str, Any]:
    benchmark = [headlines[name] for name in BENCHMARK if name in headlines]
    extra = [headlines[name] for name in EXTRA if name in headlines]
    headline = sample.headline
    named = {headline: clean}
    if benchmark:
        total = f"{prefix}corruption_{headline}"
        named[total] = mean_of([mean_of(each) for each in benchmark])
        for severity in range(SEVERITIES):
            named[f"{total}_severity_{severity + 1}"] = mean_of([a[severity] for a in benchmark])
    if extra:
        of_extra = mean_of([mean_of(each) for each in extra])
        named[f"{prefix}extra_corruption_{headline}"] = of_extra
    if baseline and benchmark:
        compared = {**settings, "images": len(sample), "seed": sample.subject.seed}
        names = [name for name in BENCHMARK if name in headlines]
        theirs = errors_of_baseline(Path(baseline), compared, names)
        named[f"{prefix}mce"] = mean_of(
            [np.sum([1 - a for a in headlines[name]], axis=0) / e for name, e in theirs.items()]
        )
        settings["baseline"] = f"{name_of(Path(baseline), files.MODEL)} in {baseline}"
    missing = [name for name in (*BENCHMARK, *EXTRA) if name not in headlines]
    settings |= {"corruptions": list(headlines), "missing": missing}
    by_severity = {name: [float(one[0]) for one in each] for name, each in headlines.items()}
    return {**sample.result(named, **settings), "accuracies": by_severity}


def errors_of_baseline(
    run: Path, settings: Mapping[str, Any], names: Sequence[str]
) -> dict[str, float]:
    """Return the sum over severities of the errors of a run's model on some corruptions.

    Raises
    ------
    UsageError
        If they were not measured of it, or of other pictures, or it makes no error.
    """
    try:
        result = json.loads((run / files.FLATNESS).read_text())[files.MODEL]["corruptions"]
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"--baseline {run}: measure its corruptions first: none in {files.FLATNESS}"
        ) from error
    drawn = ("seed",) if settings["source"] == MADE_HERE else ()
    for key in ("source", "images", *drawn):
        other = result["settings"].get(key)
        if other != settings[key]:
            said = f"its corruptions have {key} {other}, not {settings[key]}"
            raise UsageError(f"--baseline {run}: {said}")
    if lacking := [name for name in names if name not in result["accuracies"]]:
        raise UsageError(f"--baseline {run}: {lacking[0]} was not measured of it")
    errors = {name: math.fsum(1 - a for a in result["accuracies"][name]) for name in names}
    if perfect := [name for name, error in errors.items() if not error]:
        raise UsageError(f"--baseline {run}: makes no error on {perfect[0]}")
    return errors
