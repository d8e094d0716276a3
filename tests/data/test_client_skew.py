"""Clients whose images differ: noise that grows from client to client, and turned images."""

from dataclasses import replace

import pytest
import torch
from conftest import quick_config
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsam.base.errors import UsageError
from fedsam.base.randomness import torch_generator
from fedsam.config.schema import from_run_config, resolve
from fedsam.data.augment import Crop, Cutout, Flip, Mixup, Noise, Rotation
from fedsam.data.images import Images
from fedsam.data.packed import Packing
from fedsam.data.plan import Work, make_plan
from fedsam.simulate.build.data import load_dataset
from fedsam.simulate.build.trainer import new_trainer
from fedsam.simulate.build.work import new_work

QUARTERS = Rotation((0.0, 90.0, 180.0, 270.0))


def images_of(channels=3, side=6, height=None, count=20):
    generator = torch.Generator().manual_seed(1)
    shape = (count, channels, height or side, side)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    mean, std = (0.4,) * channels, (0.25,) * channels
    return Images(pixels, torch.arange(count), mean, std, dtype=torch.float64)


def seen(images, work, client, round=1):
    """The first mini-batch of a client that holds every image, and the rows in it."""
    shape = (images.height, images.width)
    generator = torch_generator(0, "plan", round, client)
    plan = make_plan(torch.arange(len(images)), work.of(client), shape, generator)
    return images.batch(plan, 0), plan.indices[0, : plan.sizes[0]]


@pytest.mark.parametrize("client", range(9))
def test_a_quarter_turn_loses_nothing(client):
    images = images_of()
    batch, rows = seen(images, Work(8, augmentations=(QUARTERS,)), client)
    plain = images.rows(rows).images
    assert torch.equal(batch.images, torch.rot90(plain, client % 4, (-2, -1)))
    assert torch.equal(batch.targets, rows)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    back = torch.rot90(batch.images, -(client % 4), (-2, -1))
    assert torch.equal(back, plain)


@settings(max_examples=40, deadline=None)
@given(st.floats(-400, 400), st.integers(0, 5))
def test_any_angle_is_a_bilinear_turn_around_the_middle(angle, client):
    # along a plane brightness is linear, so that bilinear interpolation is exact inside
    side = 9
    y, x = torch.meshgrid(*[torch.arange(side) - 4.0] * 2, indexing="ij")
    pixels = (128 + 9 * x + 3 * y).to(torch.uint8).expand(6, 1, side, side)
    images = Images(pixels, torch.arange(6), (0.4,), (0.25,), dtype=torch.float64)
    batch, _ = seen(images, Work(3, augmentations=(Rotation((angle,)),)), client)
    phi = torch.tensor(angle, dtype=torch.float32).double().deg2rad()
    # counter-clockwise, with y downwards: what is seen at p lay at p turned clockwise
    lay_x, lay_y = phi.cos() * x - phi.sin() * y, phi.sin() * x + phi.cos() * y
    expected = ((128 + 9 * lay_x + 3 * lay_y) / 255 - 0.4) / 0.25
    inside = x**2 + y**2 <= 16
    assert torch.allclose(batch.images[:, 0, inside], expected[inside].double(), atol=2e-3)


def test_corners_that_come_from_outside_are_black():
    images = images_of(1, side=8)
    batch, _ = seen(images, Work(4, augmentations=(Rotation((45.0,)),)), 0)
    assert torch.allclose(batch.images[..., 0, 0], torch.tensor(-0.4 / 0.25).double(), atol=1e-6)


def test_an_image_that_is_not_square_is_turned_over_or_a_little():
    images = images_of(1, side=11, height=5)
    work = Work(4, augmentations=(Rotation((180.0, 0.0)),))
    batch, rows = seen(images, work, 0)
    assert torch.equal(batch.images, images.rows(rows).images.flip(-2, -1))
    ones = Images(torch.full((4, 1, 5, 11), 255).byte(), torch.arange(4), (0.0,), (1.0,))
    batch, _ = seen(ones, Work(4, augmentations=(Rotation((30.0,)),)), 0)
    # a pixel is a square: at 30 degrees, 2.5 rows up from the middle leave the image
    assert float(batch.images[0, 0, 2].min()) < 1
    assert batch.images[0, 0, 2, 2:9] == pytest.approx(torch.ones(7), abs=1e-5)


@pytest.mark.parametrize("client", [0, 1, 4])
def test_noise_has_the_clients_standard_deviation(client):
    images = images_of(side=16)
    batch, rows = seen(images, Work(20, augmentations=(Noise(0.2, 5),)), client)
    added = (batch.images - images.rows(rows).images) * 0.25  # in pixels' range
    expected = 0.2 * client / 4
    n = added.numel()
    assert float(added.std()) == pytest.approx(expected, rel=4 / (2 * n) ** 0.5, abs=1e-12)
    assert float(added.mean()) == pytest.approx(0, abs=4 * expected / n**0.5 + 1e-12)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_noise_is_drawn_anew_by_round_and_is_the_same_for_the_same_key():
    images = images_of()
    work = Work(20, augmentations=(Noise(0.2, 5),))

    def added(round):
        batch, rows = seen(images, work, 4, round)
        return (batch.images - images.rows(rows).images)[rows.argsort()]

    assert torch.equal(added(1), added(1))
    first, second = added(1).flatten(), added(2).flatten()
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 5 / len(first) ** 0.5


def test_the_only_client_of_a_population_has_no_noise():
    images = images_of()
    batch, rows = seen(images, Work(8, augmentations=(Noise(0.5, 1),)), 0)
    assert torch.equal(batch.images, images.rows(rows).images)


@pytest.mark.parametrize("angles", [(0.0, 90.0, 180.0, 270.0), (0.0, 30.0, 200.0)])
def test_a_packed_cohort_sees_what_its_clients_see_one_by_one(angles):
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (30, 3, 6, 6), generator=generator, dtype=torch.uint8)
    skew = (Rotation(angles), Flip(), Noise(0.3, 4))
    work = Work(4, 1.5, augmentations=(Crop(2), *skew, Cutout(4), Mixup(0.4)))
    images = Images(pixels, torch.arange(30), (0.4,) * 3, (0.3,) * 3, padding=2)
    rows = [torch.arange(11), torch.tensor([12]), torch.arange(20, 26)]
    plans = [
        make_plan(own, work.of(client), (6, 6), torch_generator(client, "plan"))
        for client, own in enumerate(rows, 1)
    ]
    packing = Packing(work)
    packed = torch.zeros(packing.planes, 3, 4, 4, dtype=torch.int32)
    packing.pack(plans, packed)
    for step in range(4):
        batch = images.take(packing.choices(packed[:, :, step]), work.augmentations)
        for k, plan in enumerate(plans):
            if step < len(plan):
                alone, size = images.batch(plan, step), plan.sizes[step]
                assert torch.allclose(batch.images[k, :size], alone.images, atol=1e-5)
                assert batch.images[k].is_contiguous(memory_format=torch.channels_last)


def test_a_trainers_clients_differ_by_their_number(tmp_path):
    skew = {"client_noise": 0.3, "client_rotations": "0,90,180,270"}
    trainer, _ = new_trainer(quick_config(tmp_path / "run", **skew))
    plain, _ = new_trainer(quick_config(tmp_path / "run"))
    for client in (0, 6, 19):
        plan, without = (t.plan(client, 3) for t in (trainer, plain))
        assert torch.equal(plan.indices, without.indices)  # whose images, and in which order
        batch, turned = (t.train.batch(p, 0).images for t, p in ((trainer, plan), (plain, without)))
        turned = torch.rot90(turned, client % 4, (-2, -1))
        added = (batch - turned) / (255 * trainer.train.pixels.unit)
        assert float(added.std()) == pytest.approx(0.3 * client / 19, rel=0.1)


def test_what_is_not_asked_for_is_not_there():
    config = resolve({})
    assert config.client_rotations == ""
    names = {type(a) for a in new_work(config, load_dataset(config), draws=False).augmentations}
    assert not names & {Noise, Rotation}


@pytest.mark.parametrize("value", ["0,90", [0, 90], (0.0, 90.0), " 0, 90.0"])
def test_angles_are_read_from_flags_yaml_and_python(value):
    assert resolve({"client_rotations": value}).client_rotations == "0,90"
    assert resolve({"client_rotations": 45}).client_rotations == "45"
    assert from_run_config({"client-rotations": "0,90"}).client_rotations == "0,90"


@pytest.mark.parametrize("value", ["left", "0,,90", "nan", "0;90", ["a"], "inf", ","])
def test_wrong_angles_are_refused_in_one_line(value):
    with pytest.raises(UsageError, match=r"--client-rotations .*: must be angles in degrees"):
        resolve({"client_rotations": value})


def test_images_that_are_not_square_are_not_laid_on_their_side():
    config = resolve({"client_rotations": "0,90"})
    dataset = load_dataset(config)
    flat = replace(dataset, train_images=dataset.train_images[:, :, :5])
    with pytest.raises(UsageError, match=r"--client-rotations 0,90: images of 5 x 8 pixels"):
        new_work(config, flat, draws=False)
    tilted = resolve({"client_rotations": "0,20,180"})
    assert any(isinstance(a, Rotation) for a in new_work(tilted, flat, draws=False).augmentations)
