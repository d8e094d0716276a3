"""Killed at any moment, by any signal, a run that is started again ends in the same bytes."""

import os
import shlex

import pytest
from conftest import ROOT
from kills import killed_again_and_again

SMALL = "--clients 20 --clients-per-round 5 --local-steps 2 --alpha 1 --eval-every 5 --device cpu"
SMALL += " --threads 1 --rounds 40"
FLOWER = "flwr.serverapp.strategy:"
RUNS = {
    "fedasam, swa, models kept": "--algorithm fedasam --swa --swa-start 12 --save-every 10",
    "scaffold, momentum, ema": "--algorithm scaffold --momentum 0.5 --average ema --swa-start 9",
    "fedsmoo": "--algorithm fedsmoo",
    "feddyn, tensorboard": "--algorithm feddyn --track tensorboard",
    "Flower's FedAdam": f"--strategy {FLOWER}FedAdam",
    "lifelong, replay": "--lifelong 3 --lifelong-options '{heads: multi, memory: 2}'",
    "fedavgm, wima, patience": "--algorithm fedavgm --average wima --swa-start 5 --lr 1e-9 "
    "--eval-every 1 --patience 25",
    "adamw, cosine, mixup, cutout": "--optimizer adamw --lr 0.001 --lr-schedule cosine --mixup 0.2 "
    "--cutout 3",
    "dropout": "--model tests.training.test_dry_pass:Dropout",
}


def words_of(name):
    return shlex.split(f"{SMALL} {RUNS[name]}")


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))


def test_killed_four_times_it_ends_in_the_same_bytes(tmp_path):
    words = words_of("scaffold, momentum, ema")
    assert sum(killed_again_and_again(tmp_path, words, 4, seed=4).values()) == 4


def test_two_that_go_on_at_once_are_one_and_a_line(tmp_path):
    words = words_of("fedasam, swa, models kept")
    assert sum(killed_again_and_again(tmp_path, words, 2, seed=1, at_once=2).values()) == 2


@pytest.mark.long
@pytest.mark.parametrize("name", RUNS)
def test_killed_twenty_times(tmp_path, name):
    counts = killed_again_and_again(tmp_path, words_of(name), 20, seed=len(name))
    print(name, counts)
    assert sum(counts.values()) == 20


@pytest.mark.long
def test_killed_ten_times_on_ray(tmp_path):
    pytest.importorskip("ray", reason="ray is not installed: pip install 'fedsam[ray]'")
    words = [*words_of("scaffold, momentum, ema"), "--engine", "ray", "--workers", "1"]
    counts = killed_again_and_again(tmp_path, words, 10, seed=5)
    print("ray", counts)
    assert sum(counts.values()) == 10


@pytest.mark.long
def test_killed_ten_times_with_two_at_once(tmp_path):
    words = words_of("fedasam, swa, models kept")
    counts = killed_again_and_again(tmp_path, words, 10, seed=6, at_once=2)
    print("two at once", counts)
    assert sum(counts.values()) == 10
