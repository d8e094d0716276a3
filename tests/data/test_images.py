"""Mini-batches of pictures that are not square, in float64, against torchvision."""

import pytest
import torch
from torchvision.transforms import functional as F

from fedsam.base.randomness import torch_generator
from fedsam.config.schema import resolve
from fedsam.data.augment import Crop, Cutout, Flip, Mixup
from fedsam.data.images import Images
from fedsam.data.plan import Work, make_plan
from fedsam.simulate.build.trainer import new_trainer

HEIGHT, WIDTH = 6, 9
STATISTICS = {1: ((0.3,), (0.2,)), 3: ((0.3, 0.5, 0.6), (0.2, 0.25, 0.3))}
channels = pytest.mark.parametrize("channels", [1, 3])
FULL = Work(4, 2.0, augmentations=(Crop(2), Flip(), Cutout(4)))


def pixels_of(channels):
    generator = torch.Generator().manual_seed(4)
    return torch.randint(0, 256, (11, channels, HEIGHT, WIDTH), generator=generator).to(torch.uint8)


def images_of(channels, padding=0, dtype=torch.float64):
    mean, std = STATISTICS[channels]
    labels = torch.arange(11) % 3
    return Images(pixels_of(channels), labels, mean, std, padding=padding, dtype=dtype)


def plan_of(work):
    return make_plan(torch.arange(11), work, (HEIGHT, WIDTH), torch_generator(0, "plan"))


def by_hand(pixels, plan, step, i, padding):
    """Pad, crop, mirror, normalise, cut: one image, in the order of the official transforms."""
    top, left = plan.choices["corner"][step, i].tolist()
    image = F.pad(pixels.double() / 255, padding)
    image = F.crop(image, top, left, HEIGHT, WIDTH)
    if plan.choices["flip"][step, i]:
        image = F.hflip(image)
    image = F.normalize(image, *STATISTICS[len(pixels)])
    row, column = plan.choices["centre"][step, i].tolist()
    half = 4 // 2
    image[:, max(row - half, 0) : row + half, max(column - half, 0) : column + half] = 0
    return image


@channels
def test_height_and_width_are_not_mixed_up(channels):
    plan, images, pixels = plan_of(FULL), images_of(channels, FULL.padding), pixels_of(channels)
    for step, size in enumerate(plan.sizes):
        batch = images.batch(plan, step)
        assert batch.images.shape == (size, channels, HEIGHT, WIDTH)
        for i in range(size):
            expected = by_hand(pixels[plan.indices[step, i]], plan, step, i, FULL.padding)
            torch.testing.assert_close(batch.images[i], expected, rtol=1e-13, atol=1e-13)


@channels
@pytest.mark.parametrize("padding", [0, 3])
def test_evaluation_sees_the_whole_picture_whatever_the_padding(channels, padding):
    images, pixels = images_of(channels, padding), pixels_of(channels)
    batch = images.rows(torch.arange(11))
    expected = F.normalize(pixels.double() / 255, *STATISTICS[channels])
    torch.testing.assert_close(batch.images, expected, rtol=1e-13, atol=1e-13)


@channels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mixup", [(), (Mixup(1.0),)])
def test_batches_have_the_dtype_that_was_asked_for_and_are_channels_last(channels, dtype, mixup):
    work = Work(4, augmentations=(Crop(2), Flip(), Cutout(4), *mixup))
    images = images_of(channels, 2, dtype).batch(plan_of(work), 0).images
    assert images.dtype == dtype
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_mixup_mixes_what_was_already_augmented():
    mixed = plan_of(Work(4, augmentations=(Crop(2), Flip(), Cutout(4), Mixup(1.0))))
    images = images_of(3, 2)
    plain = plan_of(Work(4, augmentations=(Crop(2), Flip(), Cutout(4))))
    for step in range(len(mixed)):
        # mixup is drawn last, so both plans hold the same crops, flips and holes
        assert all(torch.equal(mixed.choices[name], value) for name, value in plain.choices.items())
        one, two = images.batch(mixed, step), images.batch(plain, step)
        chosen = mixed.step(step)
        order, lam = chosen["partner"], float(chosen["lambda"][0])
        expected = lam * two.images + (1 - lam) * two.images[order]
        torch.testing.assert_close(one.images, expected, rtol=1e-14, atol=1e-14)
        assert torch.equal(one.mixed_targets, two.targets[order])


def test_taking_batches_changes_no_pixel_and_no_batch_before():
    given = pixels_of(1)
    images = Images(given, torch.arange(11) % 3, *STATISTICS[1])
    before = given.clone()
    first = images.batch(plan_of(Work(4, augmentations=(Flip(), Cutout(4), Mixup(1.0)))), 0).images
    kept = first.clone()
    images.batch(plan_of(Work(4, augmentations=(Flip(), Cutout(4), Mixup(1.0)))), 1)
    images.rows(torch.arange(11))
    assert torch.equal(given, before)
    assert torch.equal(first, kept)


@pytest.mark.parametrize(
    ("normalize", "low", "high"), [("none", 0.0, 1.0), ("half", -1.0, 1.0)], ids=str
)
def test_normalisation_is_what_the_flag_says(normalize, low, high):
    trainer, _ = new_trainer(resolve({"normalize": normalize, "clients": 10, "device": "cpu"}))
    rows = torch.arange(50)
    mine = trainer.train.rows(rows).images
    centre = trainer.train.padding
    pixels = trainer.train.padded[rows][:, centre : centre + 8, centre : centre + 8]
    expected = low + (high - low) * pixels.movedim(-1, 1) / 255
    torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)
    assert float(trainer.train.pixels.low) == pytest.approx(low)
    assert float(trainer.train.pixels.high) == pytest.approx(high)
    assert float(trainer.train.pixels.unit) == pytest.approx((high - low) / 255)


def test_by_default_each_channel_has_mean_zero_and_deviation_one():
    trainer, _ = new_trainer(resolve({"clients": 10, "device": "cpu"}))
    images = trainer.train.rows(torch.arange(len(trainer.train))).images.double()
    assert float(images.mean()) == pytest.approx(0, abs=1e-4)
    assert float(images.std(correction=0)) == pytest.approx(1, abs=1e-4)


@channels
def test_pixels_are_the_images_and_others_are_normalised_alike(channels):
    images = images_of(channels, padding=2)
    assert torch.equal(images.raw.permute(0, 3, 1, 2), pixels_of(channels))
    order = torch.tensor([5, 0, 3])
    other = images.with_raw(images.raw[order], images.targets[order])
    assert torch.equal(other.raw, images.raw[order])
    theirs, mine = other.rows(torch.arange(3)), images.rows(order)
    assert torch.equal(theirs.images, mine.images)
    assert torch.equal(theirs.targets, mine.targets)
    assert torch.equal(images.raw.permute(0, 3, 1, 2), pixels_of(channels))


@pytest.mark.parametrize(
    ("size", "at_a_time"), [((8, 8), 500), ((64, 64), 500), ((180, 240), 47), ((1024, 2048), 1)]
)
def test_large_images_are_looked_at_a_few_at_a_time(size, at_a_time):
    images = Images(torch.zeros(1, 1, *size, dtype=torch.uint8), torch.zeros(1), (0.5,), (0.5,))
    assert images.at_a_time(500) == at_a_time
