"""Robustness to noise on the weights: the headline at w * (1 + sigma z), z standard normal.

Mordido et al., "Lookbehind-SAM: k steps back, 1 step forward" (ICML 2024, arXiv 2307.16704), test
trained networks under multiplicative Gaussian noise and average over noisy copies. Neither the
paper's levels nor its number of copies could be verified, so those here are this project's own.
"""

from collections.abc import Sequence
from statistics import stdev
from typing import Any

import torch
from torch import Tensor

from fedsam.base.errors import UsageError
from fedsam.base.randomness import torch_generator
from fedsam.flatness.measures.evaluation import Headlines, Sample, mean_of
from fedsam.flatness.sampling import standard_error
from fedsam.flatness.subject import Subject


def weight_noise(
    subject: Subject,
    *,
    sigmas: Sequence[float] = (0.05, 0.1, 0.2, 0.3, 0.5),
    draws: int = 10,
    images: int = 2000,
) -> dict[str, Any]:
    """Return the headline on test images with noisy weights, mean and deviation over draws.

    Parameters
    ----------
    subject : Subject
        Every trainable parameter is multiplied, biases and norm layers' scales too; BatchNorm's
        statistics stay those of the trained model.
    sigmas : sequence of float
        Standard deviations relative to each parameter.
    draws : int
        Noisy copies, at least 2. Copy i has the same z at every sigma and in every model of P
        parameters with the subject's seed, so differences between levels are paired.
    images : int
        Test images, a keyed sample; 0 for all.

    Returns
    -------
    dict
        ``scalars``: the headline without noise, such as ``accuracy``; for each sigma
        ``accuracy_sigma_S``, and ``deviation_sigma_S``, the sample standard deviation over the
        draws. ``accuracies``: the headline of every draw, by sigma. ``settings``.
    """
    if draws < 2 or min(sigmas, default=-1) < 0:
        raise UsageError("weight noise: draws must be 2 at least, and sigmas not negative")
    test = Sample.of(subject, images)
    by_sigma: dict[str, list[Headlines]] = {f"{sigma:g}": [] for sigma in sigmas}
    for draw in range(draws):
        z = standard_normal(subject, draw)
        for sigma in sigmas:
            by_sigma[f"{sigma:g}"].append(test.headlines_at(subject.w * (1 + sigma * z)))
    means = {f"{test.headline}_sigma_{sigma}": mean_of(each) for sigma, each in by_sigma.items()}
    result = test.result(
        {test.headline: test.headlines_at(subject.w), **means},
        noise="w * (1 + sigma z), z ~ N(0, 1), on every trainable parameter",
        sigmas=list(sigmas),
        levels="fedsam's own; the paper's are unverified",
        draws=draws,
        batch_norm="statistics kept",
    )
    by_draw = {sigma: [float(one[0]) for one in each] for sigma, each in by_sigma.items()}
    for name, values in by_draw.items():
        result["scalars"][f"deviation_sigma_{name}"] = stdev(values)
    result["errors"]["draws"] = {
        f"{test.headline}_sigma_{sigma}": standard_error(values)
        for sigma, values in by_draw.items()
    }
    return {**result, "accuracies": by_draw}


def standard_normal(subject: Subject, draw: int) -> Tensor:
    """Return z (P,) of a draw."""
    layout = subject.network.layout
    generator = torch_generator(subject.seed, "weight noise", draw)
    z = torch.randn(layout.trainable, generator=generator, dtype=torch.float32)
    return z.to(layout.device, layout.dtype)
