"""Attacks: where the best one is known in closed form, and what they may never leave."""

import little
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fedsam.base.errors import UsageError
from fedsam.data.images import Pixels
from fedsam.flatness.measures.adversarial import adversarial
from fedsam.training.attack import Attack, drawn_in_ball

GREY = Pixels(unit=1.0, low=0.0, high=255.0)  # images whose numbers are 255ths of the range


def fgsm(losses, images, eps):
    return pgd(losses, images, eps, eps, 1)


def pgd(losses, images, eps, step, n, *, norm="linf", generator=None):
    begin = torch.zeros_like(images)
    if generator is not None:
        begin = drawn_in_ball(tuple(images.shape), eps, norm, generator).to(images)
    attack = Attack(eps, step, n, norm)
    return attack.worst(images, lambda x: losses(x).sum(), begin, GREY)


@pytest.fixture(scope="module")
def linear():
    """Return a binary linear model: weights, images well inside the box, labels, losses."""
    generator = torch.Generator().manual_seed(0)
    w = 0.02 * torch.randn(3, 4, 4, generator=generator, dtype=torch.float64)  # does not saturate
    images = 100 + 55 * torch.rand(200, 3, 4, 4, generator=generator, dtype=torch.float64)
    signs = torch.randint(0, 2, (200,), generator=generator) * 2.0 - 1

    def margins(x):
        return signs * ((x - 127.5) * w).sum((1, 2, 3))

    def losses(x):
        return F.softplus(-margins(x))  # its gradient is -sigmoid(-margin) times the margin's

    return w, images, margins, losses


@pytest.mark.parametrize("eps", [1.0, 8.0, 30.0])
def test_attacks_on_a_linear_model_reach_the_exact_optimum(linear, eps):
    w, images, margins, losses = linear
    best = margins(images) - eps * w.abs().sum()
    torch.testing.assert_close(margins(fgsm(losses, images, eps)), best)
    draw = torch.Generator().manual_seed(1)
    walked = pgd(losses, images, eps, eps / 4, 10, generator=draw)
    torch.testing.assert_close(margins(walked), best)
    # from anywhere in the ball: the first steps leave it, so all end at the same corner
    best = margins(images) - eps * w.norm()
    straight = pgd(losses, images, eps, eps, 1, norm="l2")
    torch.testing.assert_close(margins(straight), best)
    draw = torch.Generator().manual_seed(1)
    walked = pgd(losses, images, eps, eps / 4, 200, norm="l2", generator=draw)
    torch.testing.assert_close(margins(walked), best)


def test_accuracy_on_a_linear_model_falls_with_the_radius(linear):
    _, images, margins, losses = linear
    radii = (0, 0.5, 1, 2, 4, 8, 16)
    accuracies = [float((margins(fgsm(losses, images, eps)) > 0).double().mean()) for eps in radii]
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[0] == float((margins(images) > 0).double().mean())
    assert accuracies[-1] < accuracies[2] < accuracies[0]


@settings(max_examples=40, deadline=None)
@given(
    st.floats(0, 400),
    st.floats(0, 100),
    st.integers(0, 6),
    st.sampled_from(["linf", "l2"]),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_ball_and_pixel_range_are_never_left(eps, step, n, norm, start, seed):
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (3, 2, 4, 5), generator=draw).float()
    images[0] = 255
    weights = torch.randn(2, 4, 5, generator=draw)
    before = images.clone()
    generator = draw if start else None
    attacked = pgd(
        lambda x: torch.sin(x * weights).sum((1, 2, 3)),
        images,
        eps,
        step,
        n,
        norm=norm,
        generator=generator,
    )
    assert torch.equal(images, before)
    assert not attacked.requires_grad
    assert 0 <= float(attacked.min()) <= float(attacked.max()) <= 255
    offset = (attacked - images).flatten(1)
    lengths = offset.abs().amax(1) if norm == "linf" else offset.norm(dim=1)
    assert float(lengths.max()) <= eps * (1 + 1e-5) + 1e-4
    if eps == 0 or (n == 0 and not start):
        assert torch.equal(attacked, images)


@pytest.mark.parametrize(("norm", "mean"), [("linf", 0.5), ("l2", 48 / 49)])
def test_the_random_start_is_uniform_in_the_ball(norm, mean):
    images = torch.full((4000, 3, 4, 4), 127.0, dtype=torch.float64)
    draw = torch.Generator().manual_seed(5)
    offset = (pgd(lambda x: x, images, 10, 1, 0, norm=norm, generator=draw) - images) / 10
    flat = offset.flatten(1)
    found = flat.abs() if norm == "linf" else flat.norm(dim=1)  # E |u| = 1/2, E r = d / (d + 1)
    assert float(found.mean()) == pytest.approx(mean, abs=0.003)
    assert float(flat.mean(0).abs().max()) < 0.05


def test_the_measure_attacks_pixels_in_eval_mode():
    subject = little.subject()
    found = adversarial(subject, linf=(0, 4, 40), l2=(0, 300), steps=3, images=0)
    module = little.module_of(subject)
    clean = little.naive_accuracy(module, subject.test)
    scalars = found["scalars"]
    assert scalars["accuracy"] == scalars["accuracy_fgsm_0"] == clean
    assert scalars["accuracy_pgd_linf_0"] == scalars["accuracy_pgd_l2_0"] == clean
    right = 0
    for row in range(len(subject.test)):
        pixels = subject.test.raw[row].permute(2, 0, 1)[None].double().requires_grad_(True)
        label = subject.test.targets[row : row + 1]
        loss = F.cross_entropy(module((pixels / 255 - 0.4) / 0.3), label)
        (g,) = torch.autograd.grad(loss, pixels)
        moved = (pixels + 40 * g.sign()).clamp(0, 255)
        right += bool(module((moved / 255 - 0.4) / 0.3).argmax() == label)
    assert scalars["accuracy_fgsm_40"] == right / len(subject.test) < clean
    assert adversarial(subject, linf=(0, 4, 40), l2=(0, 300), steps=3, images=0) == found


@pytest.mark.parametrize("given", [{"steps": 0}, {"linf": (-1,)}, {"images": -1}])
def test_what_makes_no_sense_is_refused(given):
    with pytest.raises(UsageError):
        adversarial(little.subject(), **given)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_normalised_images_are_attacked_as_pixels_are(norm):
    """The channels' scales differ: a ball of pixels is none of normalised images."""
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(6, 2, 3, 3, generator=generator, dtype=torch.float64) * 255
    weight = torch.randn(18, 4, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])

    def losses(x):
        return F.cross_entropy(torch.tanh(x / 255).flatten(1) @ weight, labels, reduction="none")

    mean = torch.tensor([0.4, 0.5], dtype=torch.float64).view(1, 2, 1, 1)
    std = torch.tensor([0.25, 0.1], dtype=torch.float64).view(1, 2, 1, 1)
    pixels = Pixels(unit=1 / (255 * std), low=-mean / std, high=(1 - mean) / std)
    worst = Attack(eps=8, step=3, steps=4, norm=norm).worst(
        (images / 255 - mean) / std,
        lambda x: losses((x * std + mean) * 255).sum(),
        torch.zeros_like(images),
        pixels,
    )
    expected = pgd(losses, images, 8, 3, 4, norm=norm)
    torch.testing.assert_close((worst * std + mean) * 255, expected)
    assert not torch.equal(expected, images)
