"""Plans and mini-batches: what is drawn, and that augmentation is torchvision's."""

from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import functional as F

from fedsam.base.randomness import torch_generator
from fedsam.data.augment import Crop, Cutout, Flip, Mixup
from fedsam.data.images import Batch, Images
from fedsam.data.plan import Work, make_plan

SHAPE = (32, 32)


def plan_of(images, work, round=1, client=0, seed=0):
    rows = torch.arange(images) if isinstance(images, int) else images
    return make_plan(rows, work, SHAPE, torch_generator(seed, "plan", round, client))


def rows_of(plan):
    return [plan.indices[step, :size].tolist() for step, size in enumerate(plan.sizes)]


def test_the_last_partial_batch_is_kept():
    plan = plan_of(500, Work(64))
    assert plan.sizes == [64] * 7 + [52]
    assert sorted(list(chain(*rows_of(plan)))) == list(range(500))


def test_tiny_clients():
    assert plan_of(1, Work(64)).sizes == [1]
    assert plan_of(65, Work(64)).sizes == [64, 1]
    assert plan_of(0 + 7, Work(64, local_epochs=0.0)).sizes == []


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 4))
def test_each_epoch_sees_each_image_once(images, batch, epochs):
    work = Work(batch, float(epochs))
    plan = plan_of(images, work)
    assert len(plan) == work.steps(images) == epochs * -(-images // batch)
    seen = list(chain(*rows_of(plan)))
    for epoch in range(epochs):
        assert sorted(seen[epoch * images : (epoch + 1) * images]) == list(range(images))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 30))
def test_local_steps_go_on_over_reshuffled_epochs(images, batch, steps):
    plan = plan_of(images, Work(batch, local_steps=steps))
    assert len(plan) == steps
    whole = plan_of(images, Work(batch, local_epochs=40.0))
    assert rows_of(plan) == rows_of(whole)[:steps]


def test_epochs_are_shuffled_anew():
    plan = plan_of(64, Work(64, 2.0))
    assert rows_of(plan)[0] != rows_of(plan)[1]


def test_fractions_are_rounded_to_steps_and_at_least_one():
    assert [Work(64, e).steps(500) for e in (0.0, 0.001, 0.25, 0.5, 1.5)] == [0, 1, 2, 4, 12]


FULL = Work(16, 2.0, augmentations=(Crop(4), Flip(), Cutout(8), Mixup(1.0)))


def test_a_plan_is_its_key():
    first, again = plan_of(50, FULL), plan_of(50, FULL)
    assert first.sizes == again.sizes
    assert list(first.choices) == ["index", "corner", "flip", "centre", "partner", "lambda"]
    for name, value in first.choices.items():
        assert torch.equal(value, again.choices[name])
    for change in ({"round": 2}, {"client": 1}, {"seed": 1}):
        assert not torch.equal(first.indices, plan_of(50, FULL, **change).indices)


def frequencies(values, least):
    return values.flatten().bincount(minlength=least) / values.numel()


def test_what_is_drawn_has_the_right_distribution():
    plan = plan_of(2000, Work(2000, 20.0, augmentations=(Crop(4), Flip(), Cutout(16), Mixup(0.5))))
    corners = frequencies(plan.choices["corner"], 9)
    assert len(corners) == 9
    assert (corners - 1 / 9).abs().max() < 0.005
    assert plan.choices["flip"].double().mean() == pytest.approx(0.5, abs=0.01)
    holes = frequencies(plan.choices["centre"], 32)
    assert len(holes) == 32
    assert (holes - 1 / 32).abs().max() < 0.005
    for step, size in enumerate(plan.sizes):
        assert sorted(plan.choices["partner"][step, :size].tolist()) == list(range(size))


@pytest.mark.parametrize("a", [0.2, 1.0, 4.0])
def test_mixups_lambda_is_beta(a):
    lambdas = plan_of(1, Work(1, local_steps=20_000, augmentations=(Mixup(a),))).choices["lambda"]
    assert lambdas.mean().item() == pytest.approx(0.5, abs=0.01)
    assert lambdas.var().item() == pytest.approx(1 / (4 * (2 * a + 1)), rel=0.05)


def data(channels, size=23):
    generator = torch.Generator().manual_seed(7)
    pixels = torch.randint(0, 256, (size, channels, 32, 32), generator=generator).to(torch.uint8)
    mean, std = [0.4914, 0.4822, 0.4465][:channels], [0.247, 0.2435, 0.2616][:channels]
    return pixels, torch.arange(size) % 10, mean, std


def by_torchvision(pixels, mean, std, corner=None, flip=False, hole=None, side=0):
    """One image through the transforms that everybody uses."""
    image = pixels.float() / 255
    if corner is not None:
        image = F.crop(F.pad(image, 4), *corner, 32, 32)
    if flip:
        image = F.hflip(image)
    image = F.normalize(image, mean, std)
    if hole is not None:
        (row, column), half = hole, side // 2
        image[:, max(row - half, 0) : row + half, max(column - half, 0) : column + half] = 0
    return image


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "work",
    [
        Work(8),
        Work(8, augmentations=(Crop(4),)),
        Work(8, augmentations=(Flip(),)),
        Work(8, augmentations=(Crop(4), Flip(), Cutout(16))),
    ],
    ids=["plain", "crop", "flip", "all"],
)
def test_augmentation_is_torchvisions(channels, work):
    pixels, labels, mean, std = data(channels)
    images = Images(pixels, labels, tuple(mean), tuple(std), padding=work.padding)
    plan = plan_of(23, work)
    for step in range(len(plan)):
        batch, chosen = images.batch(plan, step), plan.step(step)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        for i, row in enumerate(rows_of(plan)[step]):
            expected = by_torchvision(
                pixels[row],
                mean,
                std,
                corner=chosen["corner"][i].tolist() if "corner" in chosen else None,
                flip="flip" in chosen and bool(chosen["flip"][i]),
                hole=chosen["centre"][i].tolist() if "centre" in chosen else None,
                side=16,
            )
            torch.testing.assert_close(batch.images[i], expected, rtol=1e-5, atol=1e-5)
            assert batch.targets[i] == labels[row]


def test_evaluation_is_to_tensor_and_normalise_also_where_training_is_padded():
    pixels, labels, mean, std = data(3)
    images = Images(pixels, labels, tuple(mean), tuple(std), padding=4)
    batch = images.rows(torch.tensor([3, 20]))
    for i, row in enumerate((3, 20)):
        torch.testing.assert_close(
            batch.images[i], by_torchvision(pixels[row], mean, std), rtol=1e-5, atol=1e-5
        )


def test_mixup_mixes_images_and_remembers_both_labels():
    pixels, labels, mean, std = data(3)
    images = Images(pixels, labels, tuple(mean), tuple(std))
    plan = plan_of(23, Work(8, augmentations=(Mixup(1.0),)))
    for step, rows in enumerate(rows_of(plan)):
        batch, lam = images.batch(plan, step), plan.choices["lambda"][step, 0]
        partners = [rows[k] for k in plan.choices["partner"][step, : len(rows)].tolist()]
        plain = images.rows(torch.tensor(rows)).images, images.rows(torch.tensor(partners)).images
        torch.testing.assert_close(batch.images, lam * plain[0] + (1 - lam) * plain[1])
        assert batch.targets.tolist() == labels[rows].tolist()
        assert batch.mixed_targets.tolist() == labels[partners].tolist()
        assert batch.lam.tolist() == [lam] * len(rows)


def test_a_hole_is_clipped_at_the_border():
    image = torch.ones(2, 1, 8, 8)
    batch = Batch(image, torch.zeros(2))
    cut = Cutout(4).apply(batch, {"centre": torch.tensor([[0, 0], [4, 7]])}).images
    assert cut[0, 0, :2, :2].sum() == 0
    assert int(cut[0].sum()) == 64 - 4
    assert cut[1, 0, 2:6, 5:].sum() == 0
    assert int(cut[1].sum()) == 64 - 12
    assert image.eq(1).all()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 23),
    st.integers(1, 8),
    st.integers(1, 9),
    st.sampled_from([0, 2]),
    st.sampled_from([(), (Flip(),), (Crop(2), Mixup(0.4))]),
    st.sampled_from([(), (8, 8)]),
)
def test_a_round_gathered_at_once_is_its_steps(images, size, steps, padding, augmentations, mask):
    generator = torch.Generator().manual_seed(images)
    pixels = torch.randint(0, 256, (23, 3, 8, 8), dtype=torch.uint8, generator=generator)
    targets = torch.randint(0, 9, (23, *mask), generator=generator)
    padding = max(padding, *(a.padding for a in augmentations)) if augmentations else padding
    data = Images(pixels, targets, (0.4,) * 3, (0.3,) * 3, padding=padding)
    work = Work(size, local_steps=steps, augmentations=() if mask else augmentations)
    plan = make_plan(torch.arange(images), work, (8, 8), torch_generator(1, "plan"))
    every = list(data.batches(plan))
    assert len(every) == steps
    for step, batch in enumerate(every):
        alone = data.batch(plan, step)
        assert torch.equal(batch.images, alone.images)
        assert torch.equal(batch.targets, alone.targets)
        assert batch.images.shape == (plan.sizes[step], 3, 8, 8)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
