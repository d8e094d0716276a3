"""Keyed randomness: neighbours differ, nothing global moves, cohorts are uniform."""

import random

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

from fedsam.base.randomness import (
    global_streams,
    key,
    normal,
    numpy_generator,
    sample_clients,
    torch_generator,
)


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
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    quick(algorithm="fedasam", mixup=1.0, cutout=2, augment="crop+flip", swa=True, swa_start=2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]


def test_a_run_does_not_depend_on_global_randomness(quick):
    torch.manual_seed(1)
    first = quick().folder / "model.safetensors"
    torch.manual_seed(2)
    again = quick().folder / "model.safetensors"
    assert first.read_bytes() == again.read_bytes()


def global_states():
    return torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()


def test_global_streams_are_keyed_and_put_back_even_by_an_error():
    before = global_states()
    drawn = []
    for seed in (1, 1, 2):
        with global_streams(seed, "initialisation"):
            drawn.append((float(torch.rand(())), float(np.random.rand()), random.random()))
    assert drawn[0] == drawn[1]
    assert not set(drawn[0]) & set(drawn[2])
    with pytest.raises(KeyError), global_streams(1, "strategy", 1):
        raise KeyError
    after = global_states()
    assert torch.equal(after[0], before[0])
    assert (after[1] == before[1]).all()
    assert after[2] == before[2]


def test_a_strategy_that_draws_from_global_generators_follows_the_seed(quick):
    """Flower's differential privacy adds NumPy's global noise; its sampling is Python's."""
    noisy = {"strategy": "tests.base.test_randomness:noisy", "rounds": 1}
    first, again, other = (
        (quick(seed=seed, **noisy).folder / "model.safetensors").read_bytes() for seed in (1, 1, 2)
    )
    assert first == again != other


def noisy(**arguments):
    return DifferentialPrivacyServerSideFixedClipping(
        FlowerFedAvg(**arguments), noise_multiplier=0.1, clipping_norm=1.0, num_sampled_clients=2
    )


def test_cohorts_are_drawn_without_replacement_from_any_population():
    for clients, cohort in ((5, 5), (100, 10), (10**9, 20)):
        drawn = sample_clients(0, 1, clients, cohort)
        assert drawn == sorted(set(drawn))
        assert len(drawn) == cohort
        assert 0 <= drawn[0] <= drawn[-1] < clients


def test_every_part_of_a_key_moves_the_generators():
    keys = [(1, "plan", 2, 3), (2, "plan", 2, 3), (1, "split", 2, 3), (1, "plan", 3, 2)]
    keys += [(1, "plan", 2), (1, "plans", 2, 3)]
    assert len({numpy_generator(*k).random() for k in keys}) == len(keys)
    assert len({float(torch.rand((), generator=torch_generator(*k))) for k in keys}) == len(keys)


def test_cohorts_depend_on_seed_and_round_and_on_nothing_else():
    first = sample_clients(7, 3, 1000, 10)
    np.random.seed(1)
    random.seed(1)
    before = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()
    assert sample_clients(7, 3, 1000, 10) == first
    assert sample_clients(8, 3, 1000, 10) != first
    assert sample_clients(7, 4, 1000, 10) != first
    assert (np.random.get_state()[1] == before[0]).all()
    assert random.getstate() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_cohorts_are_uniform():
    counts = np.zeros(20)
    for r in range(4000):
        counts[sample_clients(0, r, 20, 5)] += 1
    # 4000 rounds of 5 in 20: mean 1000, variance 4000 * 0.25 * 0.75; chi-square with 19 degrees
    # of freedom (clients of a round exclude each other: a factor 19/20) has its 99.9% point at 43.8
    chi_square = ((counts - 1000) ** 2 / (4000 * 0.25 * 0.75)).sum() * 19 / 20
    assert chi_square < 43.8


def test_normal_numbers_of_keys_are_normal_and_each_keys_own():
    keys = torch.arange(400)
    drawn = normal(keys, (3, 8, 8), torch.float64)
    assert drawn.shape == (400, 3, 8, 8)
    n = drawn.numel()
    assert float(drawn.mean()) == pytest.approx(0, abs=4 / n**0.5)
    assert float(drawn.var()) == pytest.approx(1, abs=4 * (2 / n) ** 0.5)
    assert float((drawn**4).mean()) == pytest.approx(3, abs=4 * (96 / n) ** 0.5)
    between = torch.corrcoef(drawn.flatten(1)[:50])
    assert (between - torch.eye(50)).abs().max() < 5 / 192**0.5
    assert torch.equal(normal(keys[7:9].view(2, 1), (3, 8, 8), torch.float64)[:, 0], drawn[7:9])
    assert float(normal(torch.arange(10**5), (10,), torch.float32).abs().max()) < 5.4
