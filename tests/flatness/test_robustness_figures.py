"""Figures of robustness: they show the numbers that the measures return."""

import little
import pytest

from fedsam.flatness.figures.robustness import (
    draw_adversarial,
    draw_clients,
    draw_corruptions,
    draw_quantisation,
    draw_weight_noise,
)
from fedsam.flatness.measures.adversarial import adversarial
from fedsam.flatness.measures.clients import clients
from fedsam.flatness.measures.corruptions import corruptions
from fedsam.flatness.measures.quantisation import quantisation
from fedsam.flatness.measures.weight_noise import weight_noise


@pytest.fixture(scope="module")
def subject():
    return little.subject(test=20, side=32)


def percent(values):
    return pytest.approx([100 * value for value in values])


def test_corruptions(subject):
    found = corruptions(subject)
    axes = draw_corruptions(found).axes[0]
    shown = [float(text.get_text()) for text in axes.texts]
    flat = [100 * value for row in found["accuracies"].values() for value in row]
    assert shown == pytest.approx(flat, abs=0.051)
    assert axes.get_yticklabels()[0].get_text() == "gaussian noise"
    assert "not CIFAR-10-C" in axes.get_title()


def test_weight_noise(subject):
    found = weight_noise(subject, sigmas=(0.3, 0.6), draws=2)
    (axes,) = draw_weight_noise(found).axes
    names = ("accuracy", "accuracy_sigma_0.3", "accuracy_sigma_0.6")
    assert axes.lines[0].get_ydata().tolist() == percent(found["scalars"][name] for name in names)
    assert axes.lines[0].get_xdata().tolist() == [0, 0.3, 0.6]


def test_quantisation(subject):
    found = quantisation(subject)
    (axes,) = draw_quantisation(found).axes
    names = ("int8_tensor", "int4_tensor", "int8_channel", "int4_channel")
    expected = percent(found["scalars"][f"accuracy_{name}"] for name in names)
    assert [bar.get_height() for bar in axes.patches] == expected


def test_adversarial(subject):
    found = adversarial(subject, linf=(1, 2), l2=(9,), steps=2)
    left, right = draw_adversarial(found).axes
    clean = found["scalars"]["accuracy"]
    for line, attack in zip((*left.lines, *right.lines), found["accuracies"], strict=True):
        expected = percent([clean, *found["accuracies"][attack].values()])
        assert line.get_ydata().tolist() == expected


def test_clients(subject):
    found = clients(subject)
    left, right = draw_clients(found).axes
    for axes, metric, factor in ((left, "accuracy", 100), (right, "loss", 1)):
        curve, worst = axes.lines[:2]
        values = found["quantiles"][f"train_{metric}"]
        assert curve.get_xdata().tolist() == pytest.approx([factor * value for value in values])
        tenth = factor * found["scalars"][f"train_{metric}_worst_tenth"]
        assert worst.get_xdata()[0] == pytest.approx(tenth)
