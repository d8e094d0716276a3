"""Plans: whose rows, how they are paired, and that nothing global is touched."""

import random
from dataclasses import replace
from itertools import chain

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from fedsam.base.randomness import torch_generator
from fedsam.data.augment import Augmentation, Crop, Cutout, Double, Flip, Keys, Mirror, Mixup
from fedsam.data.images import Images
from fedsam.data.packed import Packing
from fedsam.data.plan import Work, make_plan

FULL = Work(8, 2.0, augmentations=(Crop(4), Flip(), Cutout(8), Mixup(1.0)))


def plan_of(rows, work, shape=(32, 32), key=0):
    return make_plan(torch.as_tensor(rows), work, shape, torch_generator(key, "plan"))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=30, unique=True), st.integers(1, 9))
def test_a_plan_holds_the_clients_own_rows_and_no_others(rows, batch):
    plan = plan_of(rows, Work(batch))
    kept = [plan.indices[step, :size].tolist() for step, size in enumerate(plan.sizes)]
    assert sorted(chain(*kept)) == sorted(rows)
    assert [len(part) for part in kept] == plan.sizes
    assert set(plan.indices.flatten().tolist()) == set(rows)  # the unused ends as well


def test_a_last_mini_batch_of_one_image_has_all_it_needs():
    plan = plan_of(range(100, 109), Work(4, augmentations=(Crop(2), Flip(), Cutout(2), Mixup(1.0))))
    assert plan.sizes == [4, 4, 1]
    assert (
        plan.indices.shape == plan.choices["flip"].shape == plan.choices["partner"].shape == (3, 4)
    )
    assert plan.choices["corner"].shape == plan.choices["centre"].shape == (3, 4, 2)
    assert plan.choices["partner"][2, 0] == 0  # mixed with itself
    assert plan.choices["lambda"].shape == (3, 4)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 3), st.integers(0, 7))
def test_a_mini_batch_too_small_joins_the_one_before_it(images, batch, least, steps):
    batch = max(batch, least)
    work = Work(batch, 2.0, steps, least=least)
    sizes = plan_of(range(images), work).sizes
    assert len(sizes) == work.steps(images)
    if images < least:
        assert sizes == []
        return
    full, rest = divmod(images, batch)
    epoch = [batch] * full + [rest] * (rest > 0)
    if full and 0 < rest < least:
        epoch = [batch] * (full - 1) + [batch + rest]
    assert sizes == (epoch * 10)[: steps or 2 * len(epoch)] or steps > len(epoch) * 10
    assert min(sizes) >= least
    if not steps:
        rows = plan_of(range(images), work).indices
        seen = [rows[step, :size] for step, size in enumerate(sizes)]
        assert sorted(torch.cat(seen).tolist()) == sorted([*range(images)] * 2)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 3), st.sampled_from([1, 2]))
def test_a_short_last_mini_batch_is_left_out_as_by_pytorchs_loader(images, batch, least, copies):
    augmentations = (Mirror(),) if copies == 2 else ()
    work = Work(max(batch, least), 3.0, augmentations=augmentations, least=least, drop_last=True)
    plan = plan_of(range(images), work)
    loader = DataLoader(range(copies * images), work.batch_size, drop_last=True)
    if len(loader):
        assert plan.sizes == [work.batch_size] * 3 * len(loader)
    else:  # there it would train on nothing, here on what it has
        assert plan.sizes == [copies * images] * 3 * (copies * images >= least)
    assert len(plan) == work.steps(images)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 9), st.sampled_from([Mirror(), Double()]))
def test_an_epoch_of_copies_has_each_image_twice_and_maybe_one_of_them_mirrored(
    images, batch, twice
):
    plan = plan_of(range(100, 100 + images), Work(batch, 2.0, augmentations=(twice,)))
    mirrored = plan.choices.get("flip", torch.zeros_like(plan.indices, dtype=torch.bool))
    seen = [
        (int(row), bool(flip))
        for step, size in enumerate(plan.sizes)
        for row, flip in zip(plan.indices[step, :size], mirrored[step, :size], strict=True)
    ]
    second = isinstance(twice, Mirror)
    epoch = [(row, flip) for row in range(100, 100 + images) for flip in (False, second)]
    assert sorted(seen[: 2 * images]) == sorted(seen[2 * images :]) == epoch


def test_partners_are_shuffled_anew_in_each_mini_batch():
    plan = plan_of(range(64), Work(32, augmentations=(Mixup(1.0),)))
    first, second = plan.choices["partner"].tolist()
    assert sorted(first) == sorted(second) == list(range(32))
    assert first != second
    assert list(range(32)) not in (first, second)


def test_one_lambda_serves_one_mini_batch():
    lambdas = plan_of(range(64), Work(16, 2.0, augmentations=(Mixup(1.0),))).choices["lambda"]
    assert len(lambdas) == len(lambdas.unique()) == 8
    assert torch.equal(lambdas, lambdas[:, :1].expand(8, 16))
    assert ((lambdas > 0) & (lambdas < 1)).all()


def test_holes_lie_anywhere_in_an_image_that_is_not_square():
    holes = plan_of(
        [0], Work(1, local_steps=2000, augmentations=(Cutout(2),)), shape=(3, 11)
    ).choices["centre"][:, 0]
    assert holes[:, 0].unique().tolist() == list(range(3))
    assert holes[:, 1].unique().tolist() == list(range(11))


def test_corners_are_uniform_in_both_directions_and_independent():
    corners = plan_of([0], Work(1, local_steps=20_000, augmentations=(Crop(1),))).choices["corner"][
        :, 0
    ]
    cells = (3 * corners[:, 0] + corners[:, 1]).bincount(minlength=9).double()
    expected = 20_000 / 9
    assert ((cells - expected) ** 2 / expected).sum() < 26.1  # chi-square, 8 degrees, 99.9%


def test_flips_are_fair():
    flips = plan_of([0], Work(1, local_steps=40_000, augmentations=(Flip(),))).choices["flip"]
    assert abs(int(flips.sum()) - 20_000) < 3.3 * 100  # 3.3 standard deviations


def test_what_is_not_asked_for_is_not_drawn():
    assert list(plan_of(range(5), Work(2)).choices) == ["index"]


def test_drawing_a_plan_moves_nothing_global_and_keeps_the_clients_rows():
    rows = torch.arange(20)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    make_plan(rows, FULL, (32, 32), torch_generator(0, "plan"))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]
    assert torch.equal(rows, torch.arange(20))


def test_a_packed_cohort_takes_what_its_clients_take_one_by_one():
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (30, 3, 6, 9), generator=generator, dtype=torch.uint8)
    work = Work(4, 1.5, augmentations=(Crop(2), Flip(), Cutout(4), Mixup(0.4), Keys()))
    images = Images(pixels, torch.arange(30), (0.4,) * 3, (0.3,) * 3, padding=work.padding)
    plans = [plan_of(r, work, (6, 9), k) for k, r in enumerate([range(11), [12], range(20, 26)])]
    packing = Packing(work)
    packed = torch.full((packing.planes, 3, 4, 4), -1, dtype=torch.int32)
    packing.pack(plans, packed)
    for step in range(4):
        batch = images.take(packing.choices(packed[:, :, step]), work.augmentations)
        for k, plan in enumerate(plans):
            size = plan.sizes[step] if step < len(plan) else 0
            assert batch.valid[k].tolist() == [True] * size + [False] * (4 - size)
            assert batch.images[k].is_contiguous(memory_format=torch.channels_last)
            if not size:
                continue
            one = images.batch(plan, step)
            for name in ("images", "targets", "mixed_targets", "lam", "keys"):
                assert torch.equal(getattr(batch, name)[k, :size], getattr(one, name)), name
                assert getattr(batch, name).dtype == getattr(one, name).dtype


def test_an_augmentation_of_ones_own_needs_no_other_file():
    class Invert(Augmentation):
        def draw(self, seen, generator):
            return {"sign": 1 - 2 * torch.randint(0, 2, seen.places, generator=generator)}

        def apply(self, batch, choices):
            signs = choices["sign"][..., None, None, None]
            return replace(batch, images=batch.images * signs)

    work = Work(4, augmentations=(Invert(),))
    images = Images(
        torch.arange(144).view(9, 1, 4, 4).to(torch.uint8), torch.arange(9), (0.4,), (1,)
    )
    plans = [plan_of(range(9), work, (4, 4), key) for key in (0, 1)]
    signs = torch.cat([plan.choices["sign"] for plan in plans])
    assert set(signs.flatten().tolist()) == {-1, 1}
    packing = Packing(work)
    packed = torch.zeros(packing.planes, 2, 3, 4, dtype=torch.int32)
    packing.pack(plans, packed)
    together = images.take(packing.choices(packed[:, :, 0]), work.augmentations)
    for k, plan in enumerate(plans):
        plain = images.rows(plan.indices[0]).images
        expected = plain * plan.choices["sign"][0][:, None, None, None]
        assert torch.equal(images.batch(plan, 0).images, expected)
        assert torch.equal(together.images[k], expected)
