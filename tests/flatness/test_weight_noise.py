"""Noise on the weights: its distribution, and an image-by-image twin."""

from statistics import mean, stdev

import little
import pytest
import torch

from fedsam.base.errors import UsageError
from fedsam.flatness.measures.weight_noise import standard_normal, weight_noise


def test_the_accuracy_is_that_of_a_module_whose_parameters_were_multiplied():
    subject = little.subject()
    found = weight_noise(subject, sigmas=(0.0, 0.7), draws=3, images=0)
    by_hand = []
    for draw in range(3):
        module = little.module_of(subject)
        z = standard_normal(subject, draw)
        for entry in subject.network.layout.parameters:
            parameter = module.get_parameter(entry.name)
            parameter.data.mul_(1 + 0.7 * entry.view(z))
        by_hand.append(little.naive_accuracy(module, subject.test))
    assert found["accuracies"]["0.7"] == by_hand
    assert len(set(by_hand)) > 1
    clean = little.naive_accuracy(little.module_of(subject), subject.test)
    assert found["accuracies"]["0"] == [clean] * 3
    scalars = found["scalars"]
    assert scalars["accuracy"] == scalars["accuracy_sigma_0"] == clean
    assert scalars["accuracy_sigma_0.7"] == pytest.approx(mean(by_hand))
    assert scalars["deviation_sigma_0.7"] == pytest.approx(stdev(by_hand))
    assert weight_noise(subject, sigmas=(0.0, 0.7), draws=3, images=0) == found


def test_the_noise_is_standard_normal_and_another_in_each_draw():
    subject = little.subject(classes=2000, train=2000)  # 34,116 parameters
    first, second = standard_normal(subject, 0), standard_normal(subject, 1)
    n = len(first)
    assert n == len(subject.w) > 30_000
    for z in (first, second):
        assert abs(float(z.mean())) < 4 / n**0.5
        assert float(z.var()) == pytest.approx(1, abs=4 * (2 / n) ** 0.5)
        inside = float((z.abs() < 1).double().mean())
        assert inside == pytest.approx(0.6827, abs=4 * (0.22 / n) ** 0.5)
    assert abs(float(first @ second / n)) < 4 / n**0.5


def test_a_measure_leaves_the_model_alone():
    subject = little.subject()
    before = subject.state.clone()
    weight_noise(subject, draws=2)
    assert torch.equal(subject.state, before)


@pytest.mark.parametrize("given", [{"draws": 1}, {"sigmas": (-0.1,)}, {"sigmas": ()}])
def test_what_makes_no_sense_is_refused(given):
    with pytest.raises(UsageError, match="weight noise"):
        weight_noise(little.subject(), **given)
