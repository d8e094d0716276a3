"""Robustness to quantised weights: the headline (accuracy) with weights rounded to a few bits."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedsam.base.errors import UsageError
from fedsam.base.vector import Layout
from fedsam.flatness.measures.evaluation import Sample
from fedsam.flatness.subject import Subject


def quantised(weight: Tensor, bits: int, *, by_channel: bool) -> Tensor:
    """Return a weight rounded to the nearest point of a symmetric grid, in its own dtype.

    With q = 2^(bits - 1) - 1 (127 for int8, 7 for int4) and scale s = max |weight| / q::

        s * round(weight / s)        halves to even

    Nothing is clipped, since s follows from the largest weight. -q - 1, the one integer more that
    the type has on the negative side, is not used.

    Parameters
    ----------
    weight : Tensor
        (out, ...).
    bits : int
        At least 2.
    by_channel : bool
        A scale for each row of the first dimension (output channel); otherwise one for all.
    """
    q = 2 ** (bits - 1) - 1
    dims = tuple(range(1, weight.dim())) if by_channel else tuple(range(weight.dim()))
    scale = weight.abs().amax(dims, keepdim=True) / q
    scale = torch.where(scale > 0, scale, 1)  # a channel of zeros stays zero
    return (weight / scale).round() * scale


def quantised_weights(layout: Layout, w: Tensor, bits: int, *, by_channel: bool) -> Tensor:
    """Return a copy of w (P,) whose weights of convolutions and linear layers are quantised.

    Those are the parameters of two dimensions or more that ``layout.weights`` calls weights;
    biases, norm layers and embeddings of positions keep their values.
    """
    result = w.clone()
    for entry in layout.parameters:
        if len(entry.shape) > 1 and layout.weights[entry.offset]:
            entry.view(result).copy_(quantised(entry.view(w), bits, by_channel=by_channel))
    return result


def quantisation(
    subject: Subject, *, bits: Sequence[int] = (8, 4), images: int = 0
) -> dict[str, Any]:
    """Return the headline on test images with quantised weights.

    Only weights are quantised, and back to floats at once ("fake" quantisation): what is measured
    is the loss of precision, not a speed. Round to nearest, no calibration, no retraining.

    Parameters
    ----------
    subject : Subject
        The model.
    bits : sequence of int
        Each from 2 to 16.
    images : int
        Test images, a keyed sample; 0 for all.

    Returns
    -------
    dict
        ``scalars``: the headline as trained, such as ``accuracy``; ``accuracy_intB_tensor`` with
        one scale a tensor and ``accuracy_intB_channel`` with one an output channel. ``rounding``:
        |w_quantised - w| / |w| under the same names. ``settings``.
    """
    if not all(2 <= number <= 16 for number in bits):
        raise UsageError("quantisation: bits must lie in 2..16")
    test, layout, w = Sample.of(subject, images), subject.network.layout, subject.w
    headlines = {test.headline: test.headlines_at(w)}
    errors = {}
    for number in bits:
        for scales in ("tensor", "channel"):
            rounded = quantised_weights(layout, w, number, by_channel=scales == "channel")
            name = f"int{number}_{scales}"
            headlines[f"{test.headline}_{name}"] = test.headlines_at(rounded)
            errors[name] = float((rounded - w).norm() / w.norm())
    result = test.result(
        headlines,
        bits=list(bits),
        scheme="symmetric, round to nearest, weights only; biases and norm layers kept",
    )
    return {**result, "rounding": errors}
