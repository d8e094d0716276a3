"""The error of sampling images: by hand, against many samples, and zero where all are looked at."""

import math
from dataclasses import replace
from statistics import mean, stdev

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_hessian import mlp, subject_of
from worlds import network

from fedsam.flatness.measures.connectivity import connectivity
from fedsam.flatness.measures.hessian import hessian, trace
from fedsam.flatness.measures.sharpness import average_sharpness, sharpness
from fedsam.flatness.measures.slope import slope
from fedsam.flatness.measures.surface import surface_line
from fedsam.flatness.measures.weight_noise import weight_noise
from fedsam.flatness.sampling import PARTS, parts_of, sampling_error, standard_error


def test_by_hand():
    # a mean over images: 1/2 of the set was looked at, so half of the variance is left
    values = [1.0, 2.0, 4.0, 5.0]
    expected = stdev(values) / 2 * math.sqrt(1 / 2)
    assert sampling_error(3.0, values, [10] * 4, 80) == pytest.approx(expected)
    # no mean: 6 on the parts, 3 on four times as many images; 2 is where 1 / n goes, 1 off
    assert sampling_error(3.0, [6.0] * 4, [10] * 4, 10**9) == pytest.approx(1.0)
    assert sampling_error(3.0, [3.0], [40], 40) == 0.0
    assert math.isnan(sampling_error(3.0, [3.0], [1], 40))
    assert standard_error(values) == pytest.approx(stdev(values) / 2)
    assert math.isnan(standard_error([1.0]))


@given(size=st.integers(1, 40), more=st.integers(0, 3), seed=st.integers(0, 99))
def test_parts_are_a_partition_of_the_sample(size, more, seed):
    rows = torch.arange(100, 100 + size)
    parts = parts_of(rows, size + more, seed)
    assert sorted(torch.cat(parts).tolist()) == rows.tolist()
    assert len(parts) == (1 if more == 0 else -(-size // max(1, -(-size // PARTS))))
    assert all(len(part) for part in parts)


@pytest.mark.parametrize(
    ("measure", "scalar"),
    [
        (slope, "loss"),
        (slope, "gradient_norm"),
        (lambda s, images: trace(s, images=images, probes=2), "trace"),
        (lambda s, images: average_sharpness(s, images=images, probes=2), "average"),
        (lambda s, images: sharpness(s, images=images, batch=12, steps=1, rho=0.2), "one_step"),
        (lambda s, images: hessian(s, images=images, eigenvalues=1), "lambda_1"),
    ],
)
def test_the_error_is_how_far_samples_lie_from_all_images(measure, scalar):
    """Samples of 48 of 200 images, by their seeds; the model's noise is the same in each."""
    subject = subject_of(mlp, images=200)
    off, said = [], []
    for seed in range(12):
        found = measure(replace(subject, seed=seed), images=48)
        whole = measure(replace(subject, seed=seed), images=0)
        assert whole["errors"]["images"][scalar] == 0
        off.append(found["scalars"][scalar] - whole["scalars"][scalar])
        said.append(found["errors"]["images"][scalar])
    real = math.sqrt(mean(o * o for o in off))
    estimated = math.sqrt(mean(s * s for s in said))
    assert 0.4 < estimated / real < 2.5


def test_measures_of_points_and_of_robustness_carry_it_too():
    made = network()
    line = surface_line(made, directions=1, points=3, images=12)
    names = {"train_loss", "train_loss_rise", "test_error", "test_error_rise"}
    assert names <= set(line["errors"]["images"]) == set(line["scalars"])
    assert all(line["errors"]["images"][name] > 0 for name in ("train_loss", "test_loss_rise"))
    other = connectivity([("a", made), ("b", network(1))], points=3, images=12)
    assert other["errors"]["images"]["test_loss_barrier_max"] > 0
    whole = connectivity([("a", made), ("b", network(1))], points=3, images=0)
    assert set(whole["errors"]["images"].values()) == {0.0}
    noisy = weight_noise(made, sigmas=(0.5,), draws=4, images=12)
    values = noisy["accuracies"]["0.5"]
    assert noisy["errors"]["draws"]["accuracy_sigma_0.5"] == pytest.approx(stdev(values) / 2)
    assert set(noisy["errors"]["images"]) == {"accuracy", "accuracy_sigma_0.5"}
