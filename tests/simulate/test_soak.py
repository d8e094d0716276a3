"""Long runs: memory and open files stay flat, and ten thousand clients keep what they have."""

import os
import time
from pathlib import Path

import pytest
import torch
from conftest import quick_config

from fedsam.data.datasets import Dataset
from fedsam.runs import files
from fedsam.simulate.resume import resumed
from fedsam.simulate.run import run

pytestmark = [pytest.mark.slow, pytest.mark.long]


def resident() -> float:
    """Memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def test_two_thousand_rounds_leave_memory_and_open_files_flat(tmp_path, capsys):
    seen = {}

    def watch(line):
        if line["round"] % 100 == 0:
            seen[line["round"]] = resident(), len(os.listdir("/proc/self/fd"))

    config = quick_config(
        tmp_path / "run",
        rounds=2000,
        algorithm="scaffold",
        average="wima",
        average_options={"window": 10},
        swa_start=1,
        checkpoint_every="50",
        eval_every=50,
    )
    run(config, watch)
    memory, files = zip(*seen.values(), strict=True)
    with capsys.disabled():
        print(f"\nMB after 300, 1000, 2000 rounds: {seen[300][0]:.0f} {seen[1000][0]:.0f}", end="")
        print(f" {seen[2000][0]:.0f}; open files: {files[3]} to {files[-1]}")
    assert files[-1] == files[3]
    assert max(memory[3:]) < 1.03 * memory[3]


def crowd() -> Dataset:
    """Random images of 4 x 4 pixels, two for each of ten thousand clients."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20_100, 1, 4, 4), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 4, (20_100,), generator=generator)
    pair = images[:20_000], labels[:20_000], images[20_000:], labels[20_000:]
    return Dataset("crowd", *pair, 4, (0.5,), (0.3,))


def test_ten_thousand_clients_with_state_are_kept_and_go_on(tmp_path, capsys):
    keys = {
        "dataset": "tests.simulate.test_soak:crowd",
        "model": "mlp",
        "model_options": {"hidden": 8},
        "algorithm": "scaffold",
        "clients": 10_000,
        "clients_per_round": 2_000,
        "partition": "iid",
        "checkpoint_every": "10",
    }
    whole = run(quick_config(tmp_path / "whole", rounds=16, **keys)).folder
    part = run(quick_config(tmp_path / "part", rounds=10, **keys)).folder
    begin = time.perf_counter()
    config, snapshot = resumed(part, {"rounds": 16})
    seconds = time.perf_counter() - begin
    size = max(path.stat().st_size for path in (part / "checkpoints").iterdir()) / 1e6
    kept = len(snapshot.tree["clients"])
    with capsys.disabled():
        print(f"\n{kept} clients with state, {size:.1f} MB, read in {seconds:.2f} s")
    assert kept > 8_500
    run(config, snapshot=snapshot)
    name = "model.safetensors"
    assert (part / name).read_bytes() == (whole / name).read_bytes()
    assert files.checkpoints(part)[-1] == "round-00000016"
