"""The Ray engine: real actors, the same bytes, also when one is killed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import command, quick_config

from fedsam.engines.crew import Crew
from fedsam.errors import UsageError
from fedsam.experiment import new_actors, new_trainer
from fedsam.trainer import Job

pytestmark = pytest.mark.slow
pytest.importorskip("ray", reason="ray is not installed: pip install 'fedsam[ray]'")

QUICK = {"rounds": 4, "algorithm": "fedasam", "partition": "quantity", "batch_size": 8}


def model(outcome):
    return (outcome.folder / "model.safetensors").read_bytes()


def metrics(outcome):
    lines = (outcome.folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_actors_gives_the_bytes_of_the_local_engine(quick, workers):
    local, on_ray = quick(**QUICK), quick(**QUICK, engine="ray", workers=workers)
    assert model(on_ray) == model(local)
    assert metrics(on_ray) == metrics(local)


def actors() -> list[int]:
    """Return the process ids of this process's Ray actors, not of others' on this machine."""
    parents, found = {}, []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            pid, stat = int(entry.name), (entry / "stat").read_text()
            if b"ray::Worker" in (entry / "cmdline").read_bytes():
                found.append(pid)
        except OSError:
            continue
        parents[pid] = int(stat.rpartition(")")[2].split()[1])

    def ours(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and ours(parents[pid]))

    return [pid for pid in found if ours(pid)]


def test_a_killed_actor_changes_no_byte(quick, caplog):
    options = QUICK | {"rounds": 30, "local_steps": 20}
    local = quick(**options)
    killed: list[int] = []

    def kill_twice():
        for _ in range(2):
            end = time.monotonic() + 60
            while time.monotonic() < end:
                alive = [pid for pid in actors() if pid not in killed]
                if len(alive) == 2:
                    time.sleep(0.3)
                    os.kill(alive[0], signal.SIGKILL)
                    killed.append(alive[0])
                    break
                time.sleep(0.05)

    killer = threading.Thread(target=kill_twice)
    killer.start()
    on_ray = quick(**options, engine="ray", workers=2)
    killer.join()
    assert killed
    assert "a Ray actor died" in caplog.text
    assert model(on_ray) == model(local)


def test_a_minimiser_of_ones_own_works_in_actors(tmp_path):
    (tmp_path / "mine.py").write_text(
        "class Half:\n"
        "    def step(self, w, grad, descend, local):\n"
        "        return descend(w, 0.5 * grad(w))\n"
    )
    words = ["--rounds", "2", "--minimizer", "mine:Half", "--out"]
    for engine in ("local", "ray"):
        done = command(*words, engine, "--engine", engine, "--workers", "1", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    models = [(tmp_path / e / "model.safetensors").read_bytes() for e in ("local", "ray")]
    assert models[0] == models[1]


def test_what_ray_has_not_is_refused_in_one_line(quick):
    with pytest.raises(UsageError, match="--workers 2: Ray has 0 GPUs, 1 are needed"):
        quick(engine="ray", workers=2, gpus_per_worker=0.5)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "auto", "nowhere", "127.0.0.1:x"])
def test_a_cluster_that_is_not_there_is_named_at_once(quick, address, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UsageError, match=f"--ray-address {address}: no Ray cluster there"):
        quick(engine="ray", ray_address=address)


def test_a_cluster_that_runs_already_is_used(tmp_path, quick):
    ray = Path(sys.executable).with_name("ray")
    home = ["--temp-dir", f"/tmp/fedsam-ray-{os.getpid()}"]
    start = [str(ray), "start", "--disable-usage-stats"]
    quiet = {"check": True, "capture_output": True, "timeout": 120}
    try:
        subprocess.run(
            [*start, "--head", "--port", "26379", "--num-cpus", "1",
             "--include-dashboard", "false", *home],
            **quiet,
        )  # fmt: skip
        subprocess.run([*start, "--address", "127.0.0.1:26379", "--num-cpus", "1"], **quiet)
        time.sleep(2)
        on_ray = quick(**QUICK, engine="ray", workers=2, ray_address="127.0.0.1:26379")
        assert model(on_ray) == model(quick(**QUICK))
    finally:
        subprocess.run([str(ray), "stop", "--force"], capture_output=True, check=False, timeout=60)


def test_two_states_in_one_cohort_are_kept_apart(tmp_path):
    config = quick_config(tmp_path / "none", engine="ray", workers=1)
    trainer, initial = new_trainer(config)
    states = initial.state, initial.state + 0.01
    jobs = [Job(client, states[client % 2], 1, 0.1) for client in (0, 1, 3, 2, 4)]
    crew, actors = Crew(trainer, 1), new_actors(config, trainer)
    try:
        for mine, theirs in zip(actors.train(jobs), crew.train(jobs), strict=True):
            assert torch.equal(mine.state, theirs.state)
            assert mine[1:] == theirs[1:]
    finally:
        actors.close()
        crew.close()
