"""Targets that follow the pixels: an image whose red channel is its own mask says where it went."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsam.base.randomness import torch_generator
from fedsam.data.augment import Crop, Cutout, Flip, Jitter, Mixup, ResizedCrop, Rotation, Scale
from fedsam.data.images import Images
from fedsam.data.packed import Packing
from fedsam.data.plan import Work, make_plan
from fedsam.data.sources.load import load

HEIGHT, WIDTH, MANY = 6, 8, 7
IGNORE = 255
GENERATOR = torch.Generator().manual_seed(5)
MASKS = torch.randint(1, 201, (MANY, HEIGHT, WIDTH), generator=GENERATOR).to(torch.uint8)
OTHERS = torch.randint(0, 256, (MANY, 2, HEIGHT, WIDTH), generator=GENERATOR).to(torch.uint8)
PIXELS = torch.cat([MASKS[:, None], OTHERS], 1)


def images_of(padding=0, pixels=PIXELS, masks=MASKS):
    """Images whose normalised numbers are the pixels' own."""
    scale = (1 / 255,) * pixels.shape[1]
    zero = (0.0,) * pixels.shape[1]
    return Images(pixels, masks, zero, scale, padding=padding, dtype=torch.float64)


def red(batch):
    return batch.images[..., 0, :, :].round().long()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 3), st.booleans(), st.sampled_from([(), (180.0, 0.0)]))
def test_a_mask_goes_wherever_its_image_goes(seed, padding, flip, angles):
    augmentations = (
        ([Crop(padding)] if padding else [])
        + ([Rotation(angles)] if angles else [])
        + ([Flip()] if flip else [])
    )
    work = Work(3, 2.0, augmentations=tuple(augmentations)).of(0)
    plan = make_plan(torch.arange(MANY), work, (HEIGHT, WIDTH), torch_generator(seed, "plan"))
    images = images_of(work.padding)
    for step, size in enumerate(plan.sizes):
        batch = images.batch(plan, step)
        assert batch.aligned
        assert batch.targets.shape == (size, HEIGHT, WIDTH)
        inside = batch.targets != IGNORE
        assert (red(batch)[inside] == batch.targets[inside].long()).all()
        # outside of the image there is nothing to see, and nothing said
        assert (red(batch)[~inside] == 0).all()
        if not padding:
            assert inside.all()


def test_a_turn_between_pixels_takes_the_nearest_and_says_nothing_outside():
    square = torch.arange(1, 26, dtype=torch.uint8).view(1, 5, 5)
    images = images_of(pixels=square[:, None], masks=square)
    work = Work(1, 1.0, augmentations=(Rotation((45.0,)),))
    plan = make_plan(torch.arange(1), work, (5, 5), torch_generator(0, "plan"))
    targets = images.batch(plan, 0).targets[0]
    assert targets.dtype == torch.uint8
    assert int(targets[2, 2]) == 13  # the centre stays
    # counter-clockwise: what comes to lie above the centre was up and to the right of it
    assert int(targets[1, 2]) in (8, 9, 14)
    assert {int(targets[0, 0]), int(targets[0, 4]), int(targets[4, 0])} == {IGNORE}
    assert set(targets.flatten().tolist()) <= {*range(1, 26), IGNORE}


@pytest.mark.parametrize("size", [None, (4, 12)])
@pytest.mark.parametrize("between", [(0.5, 1.0), (1.0, 1.0), (1.5, 2.5)])
def test_a_scaled_window_is_read_where_the_formula_says(between, size):
    # what lies in an image is its own place: red its column, green its row, the mask its number
    rows, columns = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    pixels = torch.stack([columns + 1, rows + 1]).to(torch.uint8)[None]
    masks = (rows * WIDTH + columns).to(torch.uint8)[None]
    work = Work(1, 40.0, augmentations=(Scale(*between, size),))
    plan = make_plan(torch.arange(1), work, (HEIGHT, WIDTH), torch_generator(3, "plan"))
    height, width = size or (HEIGHT, WIDTH)
    images, some = images_of(pixels=pixels, masks=masks), set()
    for step in range(len(plan)):
        batch, s = images.batch(plan, step), float(plan.choices["factor"][step, 0])
        assert batch.images.shape == (1, 2, height, width)
        assert between[0] <= s <= between[1]
        where = []
        for axis, (side, window) in enumerate(((HEIGHT, height), (WIDTH, width))):
            shift = (
                (2 * float(plan.choices["place"][step, 0, axis]) - 1) * abs(s * side - window) / 2
            )
            out = torch.arange(window).double() + 0.5 - window / 2
            where.append((out + shift) / s + side / 2 - 0.5)  # in pixels of the image
        row, column = torch.meshgrid(*where, indexing="ij")
        inside = (row > 0) & (row < HEIGHT - 1) & (column > 0) & (column < WIDTH - 1)
        red, green = batch.images[0] - 1
        torch.testing.assert_close(red[inside], column[inside], rtol=0, atol=1e-5)
        torch.testing.assert_close(green[inside], row[inside], rtol=0, atol=1e-5)
        said = batch.targets[0].long()
        outside = (row < -0.51) | (row > HEIGHT - 0.49) | (column < -0.51) | (column > WIDTH - 0.49)
        assert (said[outside] == IGNORE).all()
        assert ((said // WIDTH)[inside] - row[inside]).abs().max() <= 0.501
        assert ((said % WIDTH)[inside] - column[inside]).abs().max() <= 0.501
        some.add(round(s, 6))
    assert len(some) == (1 if between[0] == between[1] else 40)


def boxes(crop, shape, many):
    work = Work(many, 1.0, augmentations=(crop,))
    plan = make_plan(torch.arange(many), work, shape, torch_generator(6, "plan"))
    return plan.choices["box"][0]


def test_a_box_is_stretched_to_the_window_and_its_mask_with_it():
    rows, columns = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    pixels = torch.stack([columns, rows]).to(torch.uint8)[None]
    masks = (rows * WIDTH + columns).to(torch.uint8)[None]
    work = Work(1, 40.0, augmentations=(ResizedCrop(0.2, 1.5, (5, 9)),))
    plan = make_plan(torch.arange(1), work, (HEIGHT, WIDTH), torch_generator(3, "plan"))
    images = images_of(pixels=pixels, masks=masks)
    for step in range(len(plan)):
        batch, box = images.batch(plan, step), plan.choices["box"][step, 0].double()
        where = []
        for axis, (side, window) in enumerate(((HEIGHT, 5), (WIDTH, 9))):
            assert 0 <= box[axis] <= side - box[2 + axis]
            steps = (torch.arange(window).double() + 0.5) / window
            where.append((box[axis] + steps * box[2 + axis] - 0.5).clamp(0, side - 1))
        row, column = torch.meshgrid(*where, indexing="ij")
        red, green = batch.images[0]
        torch.testing.assert_close(red, column, rtol=0, atol=1e-5)
        torch.testing.assert_close(green, row, rtol=0, atol=1e-5)
        said = batch.targets[0].long()
        assert (said != IGNORE).all()
        assert ((said // WIDTH) - row).abs().max() <= 0.501
        assert ((said % WIDTH) - column).abs().max() <= 0.501


@pytest.mark.parametrize("shape", [(1024, 1856), (96, 96), (200, 60)])
def test_boxes_are_torchvisions(shape):
    from torchvision.transforms.v2 import RandomResizedCrop

    ours = boxes(ResizedCrop(0.5, 2.0, (512, 928)), shape, 2000)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = RandomResizedCrop((512, 928), scale=(0.5, 2.0))
        image = torch.zeros(1, *shape)
        drawn = [theirs.make_params([image]) for _ in range(2000)]
    expected = torch.tensor([[p["top"], p["left"], p["height"], p["width"]] for p in drawn]).float()
    sides = torch.tensor([*shape, *shape])
    for moment in (lambda x: x.mean(0), lambda x: x.std(0)):
        torch.testing.assert_close(
            moment(ours / sides), moment(expected / sides), rtol=0, atol=0.015
        )
    whole = (ours == ours.mode(0).values).all(1).float().mean()  # of those that did not fit
    theirs_whole = (expected == expected.mode(0).values).all(1).float().mean()
    assert float(whole) == pytest.approx(float(theirs_whole), abs=0.04)


def test_jitter_is_torchvisions_three_changes_in_a_row():
    from torchvision.transforms import functional

    pixels = OTHERS[:, :1].repeat(1, 3, 1, 1) // 2 + PIXELS // 2
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    images = Images(pixels, torch.arange(MANY), mean, std, dtype=torch.float64)
    work = Work(4, 2.0, augmentations=(Jitter(0.4),))
    plan = make_plan(torch.arange(MANY), work, (HEIGHT, WIDTH), torch_generator(4, "plan"))
    for step, size in enumerate(plan.sizes):
        batch = images.batch(plan, step)
        for i in range(size):
            factors = plan.choices["jitter"][step, i].tolist()
            assert all(0.6 <= factor <= 1.4 for factor in factors)
            expected = pixels[plan.indices[step, i]].double() / 255
            for change, factor in zip(
                ("brightness", "contrast", "saturation"), factors, strict=True
            ):
                expected = getattr(functional, f"adjust_{change}")(expected, factor)
            expected = functional.normalize(expected, mean, std)
            # torchvision's grey is 0.2989, 0.587, 0.114
            torch.testing.assert_close(batch.images[i], expected, rtol=0, atol=2e-3)


def test_grey_images_have_brightness_and_contrast_and_their_format_is_kept():
    pixels = OTHERS[:, :1]
    images = Images(pixels, torch.arange(MANY), (0.3,), (0.2,))
    work = Work(MANY, 1.0, augmentations=(Jitter(1.0), Scale(0.5, 2.0)))
    plan = make_plan(torch.arange(MANY), work, (HEIGHT, WIDTH), torch_generator(5, "plan"))
    plain, changed = images.rows(plan.indices[0]), images.batch(plan, 0)
    assert changed.images.shape == plain.images.shape
    assert not torch.equal(changed.images, plain.images)
    assert torch.equal(changed.targets, plain.targets)
    low, high = plain.pixels.low, plain.pixels.high
    assert (changed.images >= low - 1e-5).all()
    assert (changed.images <= high + 1e-5).all()


def test_cutout_and_mixup_leave_masks_as_they_are():
    work = Work(MANY, 1.0, augmentations=(Cutout(4), Mixup(1.0)))
    plan = make_plan(torch.arange(MANY), work, (HEIGHT, WIDTH), torch_generator(1, "plan"))
    batch = images_of().batch(plan, 0)
    assert torch.equal(batch.targets, MASKS[plan.indices[0]])
    partners = plan.choices["partner"][0]
    assert torch.equal(batch.mixed_targets, MASKS[plan.indices[0]][partners])


def test_a_cohort_sees_what_each_client_sees():
    work = Work(3, 1.0, augmentations=(Crop(2), Flip()))
    shape, images = (HEIGHT, WIDTH), images_of(2)
    plans = [
        make_plan(rows, work, shape, torch_generator(2, "plan", k))
        for k, rows in enumerate((torch.arange(5), torch.arange(5, 7)))
    ]
    packing = Packing(work)
    packed = torch.empty(packing.planes, 2, 2, 3, dtype=torch.int32)
    packing.pack(plans, packed)
    together = images.take(packing.choices(packed[:, :, 0]), work.augmentations)
    assert together.aligned
    assert together.targets.shape == (2, 3, HEIGHT, WIDTH)
    for k, plan in enumerate(plans):
        alone = images.batch(plan, 0)
        assert torch.equal(together.targets[k, : plan.sizes[0]], alone.targets)


def test_other_images_of_the_same_kind_bring_their_own_masks():
    turned = images_of(3).with_raw(PIXELS.permute(0, 2, 3, 1).flip(1), MASKS.flip(1))
    batch = turned.rows(torch.tensor([4, 2]))
    assert torch.equal(red(batch), MASKS.flip(1)[[4, 2]].long())
    assert torch.equal(batch.targets, MASKS.flip(1)[[4, 2]])


def halves_of(plane):
    """The two ways to cut a canvas into two halves, each with the nine windows of a half."""
    for rows, columns in ((8, 16), (16, 8)):
        places = [(r, c) for r in range(0, 17 - rows, 8) for c in range(0, 17 - columns, 8)]
        halves = [plane[r : r + rows, c : c + columns] for r, c in places]
        shifts = [(r, c) for r in range(rows - 7) for c in range(columns - 7)]
        yield [[half[r : r + 8, c : c + 8] for r, c in shifts] for half in halves]


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_scene_holds_two_digits_of_its_part_and_a_mask_that_the_ink_explains(part):
    scenes, digits = load("digit-scenes", Path()), load("digits", Path())
    images, masks, first = (
        getattr(scenes, f"{part}_{what}") for what in ("images", "labels", "classes")
    )
    assert images.shape == ({"train": 2000, "test": 500}[part], 1, 16, 16)
    assert torch.equal(masks == 0, images[:, 0] < 32)
    assert torch.equal(masks == IGNORE, (images[:, 0] >= 32) & (images[:, 0] < 96))
    ink, labels = (getattr(digits, f"{part}_{what}") for what in ("images", "labels"))
    known = {bytes(i.flatten().tolist()): int(c) for i, c in zip(ink[:, 0], labels, strict=True)}
    for image, mask, cls in zip(images[:80, 0], masks[:80], first[:80], strict=True):
        whole = int(image.sum())
        readings = set()
        for pixels, said in zip(halves_of(image), halves_of(mask), strict=True):
            for one, mask_of_one in zip(pixels[0], said[0], strict=True):
                for two, mask_of_two in zip(pixels[1], said[1], strict=True):
                    keys = [bytes(window.flatten().tolist()) for window in (one, two)]
                    if int(one.sum()) + int(two.sum()) == whole and all(k in known for k in keys):
                        readings.add(tuple(known[k] for k in keys))
                        for key, held in zip(keys, (mask_of_one, mask_of_two), strict=True):
                            assert set(held.unique().tolist()) - {0, IGNORE} == {known[key] + 1}
        # digits that lie across from each other may be read either way
        assert len({tuple(sorted(classes)) for classes in readings}) == 1
        assert int(cls) in {classes[0] for classes in readings}


def test_no_digit_is_in_both_parts_and_the_statistics_are_the_scenes():
    scenes = load("digit-scenes", Path())
    pixels = scenes.train_images.double() / 255
    assert float(pixels.mean()) == pytest.approx(scenes.mean[0], abs=5e-5)
    assert float(pixels.std(correction=0)) == pytest.approx(scenes.std[0], abs=5e-5)
    # each training digit stands in two or three scenes
    assert int(scenes.train_classes.bincount().min()) >= 160
    assert (scenes.task, scenes.classes) == ("segmentation", 11)
