"""Whole runs of a data set in files: the bytes of the same one in memory, on every engine."""

import json
import os
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import quick_config
from stores import packed_of
from test_flower import Deployment

from fedsam import client_app
from fedsam.base.errors import UsageError
from fedsam.base.system import Interrupted, Stop
from fedsam.config.schema import from_run_config
from fedsam.data.datasets import Dataset
from fedsam.data.images import StoredImages
from fedsam.data.sources.load import load
from fedsam.data.store import Ahead, RawStore
from fedsam.flatness.measures.landscape import check_alike
from fedsam.flatness.subject import objective_on, subject_of_run
from fedsam.simulate.joint import run_together
from fedsam.simulate.resume import resumed
from fedsam.simulate.run import run

BYTES = ("model.safetensors", "model-trained.safetensors", "partition.npz")
SAME = {"clients": 6, "clients_per_round": 3, "alpha": 1.0, "model": "digits-cnn", "eval_every": 1}
SAME |= {"augment": "crop", "batch_size": 16, "algorithm": "fedasam", "swa": True, "swa_start": 1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return folders with the digits, upright and turned, and the scenes, by name and encoding."""
    out, made = tmp_path_factory.mktemp("packed"), {}
    for name in ("digits", "digit-scenes", "rotated-digits"):
        dataset = load(name, out)
        cut = {
            f"{part}_{what}": value[::4]
            for part in ("train", "test")
            for what in ("images", "labels", "classes", "domains")
            if (value := getattr(dataset, f"{part}_{what}")) is not None
        }
        small = Dataset(**{**vars(dataset), **cut})
        for encoding in ("raw", "png", "jpeg"):
            made[name, encoding] = packed_of(small, out / name / encoding, encoding)
    return made


def left(folder):
    """Return what a run leaves, but for the clock and for the name of the data set."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    told = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    return told, {name: (folder / name).read_bytes() for name in BYTES}


@pytest.fixture
def both(quick, folders):
    """Return a function that runs the same from memory, and packed, and returns what is left."""

    def go(name="digits", encoding="png", **given):
        folder = folders[name, encoding]
        from_memory = {"dataset": "stores:in_memory", "data_root": str(folder)}
        memory = quick(**SAME | given | {"engine": "local"} | from_memory)
        return left(memory.folder), left(quick(**SAME | given | {"dataset": str(folder)}).folder)

    return go


@pytest.mark.parametrize("encoding", ["raw", "png", "jpeg"])
@pytest.mark.parametrize("cohort", ["off", "vmap"])
def test_a_run_from_files_is_the_run_from_memory(both, encoding, cohort):
    memory, files = both(encoding=encoding, cohort=cohort, threads=2)
    assert memory == files
    assert memory[0][-1]["loss"] != memory[0][0]["loss"]


def test_masks_from_files_are_those_of_memory(both):
    given = {"algorithm": "fedavg", "model": "scenes-cnn", "augment": "crop+flip", "rounds": 2}
    memory, files = both("digit-scenes", "raw", **given)
    assert memory == files
    assert "miou" in memory[0][-1]


def test_a_domain_left_out_of_files_is_left_out_of_memory(both):
    given = {"partition": "domains", "leave_out": "75", "validation": 0.1}
    memory, files = both("rotated-digits", **given)
    assert memory == files


def test_groups_noise_batchnorm_and_plans_cut_short_are_those_of_memory(both):
    memory, files = both(
        model="resnet20",
        model_options={"norm": "batch"},
        rounds=2,
        local_steps=2,
        stragglers=0.5,
        client_noise=0.2,
        mixup=0.4,
        test_groups="classes",
        client_tests=True,
        update_bn=60,
    )
    assert memory == files


@pytest.mark.slow
@pytest.mark.xdist_group("clusters")
def test_rays_actors_read_the_same_files(both, shared_ray):
    pytest.importorskip("ray")
    memory, files = both(rounds=2, engine="ray", workers=2)
    assert memory == files


def test_flowers_clients_read_the_same_files(quick, folders, tmp_path):
    folder, out = folders["digits", "png"], tmp_path / "nodes"
    memory = quick(**SAME | {"rounds": 2, "dataset": "stores:in_memory", "data_root": str(folder)})
    given = SAME | {"rounds": 2, "dataset": str(folder), "out": str(out), "device": "cpu"}
    settings = {key.replace("_", "-"): value for key, value in given.items()}
    client_app.resident.cache_clear()
    grid = Deployment({70 + client: client for client in range(SAME["clients"])}, settings)
    run(from_run_config(settings), flower=grid)
    client_app.resident.cache_clear()
    assert left(memory.folder) == left(out)


@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_a_run_from_files_goes_on_where_it_was_stopped(quick, folders, tmp_path, encoding):
    given = SAME | {"dataset": str(folders["digits", encoding]), "checkpoint_every": 1}
    whole = quick(**given, rounds=4)
    stop, out = Stop(), tmp_path / "cut"

    def watch(line):
        stop.signal = 15 * (line["round"] == 2)

    with pytest.raises(Interrupted):
        run(quick_config(out, **given, rounds=4), watch, stop=stop)
    config, snapshot = resumed(out, {})
    assert snapshot.round == 2
    run(config, snapshot=snapshot)
    assert left(whole.folder) == left(out)


def test_the_next_cohort_is_read_while_this_one_trains(quick, folders, monkeypatch):
    begun, read, expect = [], RawStore.read, Ahead.expect

    def recorded(self, rows):
        if len(rows) and self.path.name == "train.images.npy":
            begun.append(threading.current_thread().name.partition("_")[0])
        return read(self, rows)

    def expected(self, pieces):
        expect(self, pieces)
        for reading in list(self._reading.values()):  # as if training took longer
            reading.result()

    monkeypatch.setattr(RawStore, "read", recorded)
    monkeypatch.setattr(Ahead, "expect", expected)
    given = SAME | {"rounds": 8, "threads": 1, "eval_every": 8}
    run = quick(**given, dataset=str(folders["digits", "raw"]))
    lines = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
    cohorts = [line["clients"] for line in lines if line["round"]]
    twice = [set(one) & set(other) for one, other in pairwise(cohorts[1:])]
    # of 8 cohorts the first is read when it is wanted, and a client of two running read once
    assert begun.count("fedsam") == len(cohorts[0]) == 3
    assert begun.count("fedsam-ahead") == 7 * 3 - sum(map(len, twice))


def large(root):
    """Return 4,200 images of 256 x 256 pixels, 826 MB, in a file that is one hole."""
    shape = (4200, 256, 256, 3)
    if not (root / "large.npy").exists():
        np.lib.format.open_memmap(root / "large.npy", "w+", np.uint8, shape)
    np.save(root / "test.npy", np.zeros((20, *shape[1:]), np.uint8))
    labels = torch.arange(4200) % 5
    stores = RawStore(root / "large.npy"), RawStore(root / "test.npy")
    half = (0.5,) * 3
    return Dataset("large", stores[0], labels, stores[1], labels[:20], 5, half, half)


def test_a_data_set_larger_than_the_memory_it_gets_is_trained(tmp_path, quick):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    most, over = resident(), threading.Event()

    def watch():
        nonlocal most
        while not over.wait(0.005):
            most = max(most, resident())

    before, watcher = most, threading.Thread(target=watch)
    watcher.start()
    try:
        quick(
            **{"dataset": "test_stored:large", "data_root": str(tmp_path), "partition": "iid"},
            **{"model": "mlp", "model_options": {"hidden": 1}, "batch_size": 10, "lr": 0.001},
            **{"clients": 40, "clients_per_round": 2, "rounds": 10, "eval_every": 10, "threads": 1},
        )
    finally:
        over.set()
        watcher.join()
    assert most - before < 300e6  # 413 MB are read in ten rounds


def test_several_runs_as_one_program_read_one_store(folders, tmp_path):
    def configs(out, **given):
        return [
            quick_config(tmp_path / out / str(seed), **SAME | given, seed=seed, cohort="vmap")
            for seed in (0, 1)
        ]

    folder = str(folders["digits", "png"])
    memory = configs("memory", dataset="stores:in_memory", data_root=folder)
    files = configs("files", dataset=folder)
    for one, other in zip(run_together(memory), run_together(files), strict=True):
        assert left(one.folder) == left(other.folder)


def test_measures_see_the_same_images(quick, folders):
    folder = str(folders["digits", "png"])
    given = SAME | {"rounds": 2, "swa": False, "algorithm": "fedavg"}
    memory, files = (
        subject_of_run(quick(**given, **data).folder)
        for data in ({"dataset": "stores:in_memory", "data_root": folder}, {"dataset": folder})
    )
    check_alike([("memory", memory), ("files", files)])
    for on in ("train", "test", "client:3"):
        one, other = (objective_on(subject, on, 100) for subject in (memory, files))
        for ours, theirs in zip(
            one.loss_and_gradient(memory.w), other.loss_and_gradient(files.w), strict=True
        ):
            assert torch.equal(ours, theirs)
    turned = replace(files, test=StoredImages(RawStore(Path(folder).parent / "raw" / TEST), *HALF))
    with pytest.raises(UsageError, match="other data than those of memory"):
        check_alike([("memory", memory), ("turned", turned)])


TEST = "test.images.npy"
HALF = (torch.zeros(89, dtype=torch.int64), (0.5,), (0.5,))
