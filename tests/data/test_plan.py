"""Plans: whose rows, how they are paired, and that nothing global is touched."""

import random
from itertools import chain

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsam.base.randomness import torch_generator
from fedsam.data.plan import Work, make_plan

FULL = Work(8, 2.0, crop=4, flip=True, cutout=8, mixup=1.0)


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
    plan = plan_of(range(100, 109), Work(4, crop=2, flip=True, cutout=2, mixup=1.0))
    assert plan.sizes == [4, 4, 1]
    assert plan.indices.shape == plan.flips.shape == plan.partners.shape == (3, 4)
    assert plan.corners.shape == plan.holes.shape == (3, 4, 2)
    assert plan.partners[2, 0] == 0  # mixed with itself
    assert len(plan.lambdas) == 3


def test_partners_are_shuffled_anew_in_each_mini_batch():
    plan = plan_of(range(64), Work(32, mixup=1.0))
    first, second = plan.partners.tolist()
    assert sorted(first) == sorted(second) == list(range(32))
    assert first != second
    assert list(range(32)) not in (first, second)


def test_one_lambda_serves_one_mini_batch():
    lambdas = plan_of(range(64), Work(16, 2.0, mixup=1.0)).lambdas
    assert len(set(lambdas)) == len(lambdas) == 8
    assert all(0 < lam < 1 for lam in lambdas)


def test_holes_lie_anywhere_in_an_image_that_is_not_square():
    holes = plan_of([0], Work(1, local_steps=2000, cutout=2), shape=(3, 11)).holes[:, 0]
    assert holes[:, 0].unique().tolist() == list(range(3))
    assert holes[:, 1].unique().tolist() == list(range(11))


def test_corners_are_uniform_in_both_directions_and_independent():
    corners = plan_of([0], Work(1, local_steps=20_000, crop=1)).corners[:, 0]
    cells = (3 * corners[:, 0] + corners[:, 1]).bincount(minlength=9).double()
    expected = 20_000 / 9
    assert ((cells - expected) ** 2 / expected).sum() < 26.1  # chi-square, 8 degrees, 99.9%


def test_flips_are_fair():
    flips = plan_of([0], Work(1, local_steps=40_000, flip=True)).flips
    assert abs(int(flips.sum()) - 20_000) < 3.3 * 100  # 3.3 standard deviations


def test_what_is_not_asked_for_is_not_drawn():
    plan = plan_of(range(5), Work(2))
    assert (plan.corners, plan.flips, plan.holes) == (None, None, None)
    assert (plan.partners, plan.lambdas) == (None, None)


def test_drawing_a_plan_moves_nothing_global_and_keeps_the_clients_rows():
    rows = torch.arange(20)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    make_plan(rows, FULL, (32, 32), torch_generator(0, "plan"))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]
    assert torch.equal(rows, torch.arange(20))
