"""Keyed randomness: neighbours differ, nothing global moves, cohorts are uniform."""

import random

import numpy as np
import torch

from fedsam.randomness import initialisation, key, numpy_generator, sample_clients, torch_generator


def test_neighbouring_keys_differ():
    keys = {key(s, p, r, c) for s in (0, 1, 42) for p in "ab" for r in range(5) for c in range(5)}
    assert len(keys) == 3 * 2 * 5 * 5
    assert key(42, "plan", 1) != key(43, "plan", 0)
    assert key(1, "plan", 23) != key(12, "plan", 3)
    assert all(0 <= k < 2**63 for k in keys)


def test_a_key_is_its_own_generator():
    assert torch.equal(
        torch.rand(3, generator=torch_generator(1, "x", 2)),
        torch.rand(3, generator=torch_generator(1, "x", 2)),
    )
    assert numpy_generator(1, "x").random() == numpy_generator(1, "x").random()


def test_a_whole_run_leaves_global_randomness_alone(quick):
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    quick(algorithm="fedasam", mixup=1.0, cutout=2, augment="crop+flip", swa=True, swa_start=2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_a_run_does_not_depend_on_global_randomness(quick):
    torch.manual_seed(1)
    first = quick().folder / "model.safetensors"
    torch.manual_seed(2)
    again = quick().folder / "model.safetensors"
    assert first.read_bytes() == again.read_bytes()


def test_initialisation_is_keyed_and_puts_the_global_state_back():
    before = torch.get_rng_state()
    made = []
    for seed in (1, 1, 2):
        with initialisation(seed):
            made.append(torch.nn.Linear(3, 3).weight.detach())
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_cohorts_are_drawn_without_replacement_from_any_population():
    for clients, cohort in ((5, 5), (100, 10), (10**9, 20)):
        drawn = sample_clients(0, 1, clients, cohort)
        assert drawn == sorted(set(drawn))
        assert len(drawn) == cohort
        assert 0 <= drawn[0] <= drawn[-1] < clients


def test_cohorts_are_uniform():
    counts = np.zeros(20)
    for r in range(4000):
        counts[sample_clients(0, r, 20, 5)] += 1
    # 4000 rounds of 5 in 20: mean 1000, variance 4000 * 0.25 * 0.75; chi-square with 19 degrees
    # of freedom (clients of a round exclude each other: a factor 19/20) has its 99.9% point at 43.8
    chi_square = ((counts - 1000) ** 2 / (4000 * 0.25 * 0.75)).sum() * 19 / 20
    assert chi_square < 43.8
