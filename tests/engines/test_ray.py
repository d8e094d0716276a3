"""The Ray engine: the same bytes, also on a cluster, and when an actor or a node is killed."""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import command, free_port, quick_config

from fedsam.base.errors import TrainingError, UsageError
from fedsam.engines.threads import ThreadExecutor
from fedsam.simulate.__main__ import main
from fedsam.simulate.build.executors import new_ray_executor
from fedsam.simulate.build.trainer import new_trainer
from fedsam.simulate.run import run
from fedsam.training.client import ClientJob

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("clusters")]
ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'fedsam[ray]'")

QUICK = {"rounds": 4, "algorithm": "fedasam", "partition": "quantity", "batch_size": 8}
LONGER = QUICK | {"rounds": 16, "local_steps": 20}


def model(outcome):
    return (outcome.folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run(quick_config(tmp_path_factory.mktemp("undisturbed") / "run", **LONGER))


def family(pid: int) -> list[int]:
    """Return the ids of a process and of all that descend from it."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            stat = (entry / "stat").read_text()
        except OSError:
            continue
        parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:  # grows on the way
        found += [child for child, parent in parents.items() if parent == one]
    return found


def actors(pid: int) -> list[int]:
    """Return the ids of our Ray actors that descend from a process."""
    found = []
    for one in family(pid):
        try:
            if b"ray::ClientActor" in Path(f"/proc/{one}/cmdline").read_bytes():
                found.append(one)
        except OSError:
            continue
    return found


def kill(*pids: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


@pytest.mark.usefixtures("shared_ray")
def test_an_actor_killed_in_mid_call_changes_no_byte(undisturbed, tmp_path, caplog, monkeypatch):
    from fedsam.engines import ray as engine

    monkeypatch.setattr(engine, "CALL", math.inf)
    hand_out = engine.RayExecutor._hand_out
    killed: list[int] = []

    def handed_out(self, actor, numbers, jobs, states):
        hand_out(self, actor, numbers, jobs, states)
        if jobs[0].round in (4, 8) and len(killed) < jobs[0].round / 4 and len(numbers) > 1:
            pid = ray._private.state.actors(actor._actor_id.hex())["Pid"]
            time.sleep(0.02)  # it is at its first client
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    monkeypatch.setattr(engine.RayExecutor, "_hand_out", handed_out)
    on_ray = run(quick_config(tmp_path / "ray", **LONGER, engine="ray", workers=2))
    assert len(killed) == 2
    assert caplog.text.count("a Ray actor died; clients ") == 2
    assert model(on_ray) == model(undisturbed)


@pytest.mark.usefixtures("shared_ray")
def test_an_actor_that_dies_before_its_first_client_is_replaced_and_said_so(tmp_path, caplog):
    from fedsam.engines.ray import RayExecutor

    config, begun = quick_config(tmp_path), tmp_path / "begun"
    trainer, initial = new_trainer(config)

    def make():
        if not begun.exists():
            begun.touch()
            time.sleep(600)
        return new_trainer(config)[0]

    executor = RayExecutor(trainer, make, 1)
    try:
        while not begun.exists():
            time.sleep(0.02)
        kill(*actors(os.getpid()))
        (done,) = executor.train([ClientJob(0, initial.state, 1, 0.1)])
    finally:
        executor.close()
    assert done.steps == trainer.steps(0)
    assert "a Ray actor died; it had no client yet; 0 of 1 actors are left" in caplog.text


HANGS = """
import time
from pathlib import Path

from fedsam.training.method import Minimizer

class Hangs(Minimizer):
    def step(self, w, grad, descend, local):
        try:
            Path("flag").touch(exist_ok=False)
        except FileExistsError:
            return descend(w, grad(w)), {}
        time.sleep(600)
"""


@pytest.mark.usefixtures("shared_ray")
def test_a_client_that_never_answers_is_left_out(tmp_path, quick, caplog, monkeypatch):
    (tmp_path / "own_hangs.py").write_text(HANGS)
    monkeypatch.chdir(tmp_path)
    begin = time.monotonic()
    actors = {"engine": "ray", "workers": 2, "client_timeout": 5}
    done = quick(**actors, rounds=3, minimizer="own_hangs:Hangs")
    assert time.monotonic() - begin < 300  # nobody waited for the client's 600 s
    assert "failed: no answer within 5 s" in caplog.text
    lines = [json.loads(line) for line in (done.folder / "metrics.jsonl").open()]
    assert [len(line.get("left_out", [])) for line in lines] == [0, 1, 0, 0]


def test_the_local_engine_cannot_stop_a_client(quick):
    with pytest.raises(UsageError, match="--client-timeout: a thread of the local engine cannot"):
        quick(client_timeout=5)


def test_a_minimiser_of_ones_own_works_in_actors(tmp_path, monkeypatch, shared_ray):
    """It lies in the folder that the command is called in."""
    (tmp_path / "own_half.py").write_text(
        "from fedsam.training.method import Minimizer\n"
        "class Half(Minimizer):\n"
        "    def step(self, w, grad, descend, local):\n"
        "        return descend(w, 0.5 * grad(w)), {}\n"
    )
    words = ["--rounds", "2", "--minimizer", "own_half:Half", "--out"]
    actors = ["--engine", "ray", "--workers", "1", "--ray-address", shared_ray]
    done = command(*words, "ray", *actors, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    assert main([*words, "local"]) == 0
    models = [(tmp_path / e / "model.safetensors").read_bytes() for e in ("local", "ray")]
    assert models[0] == models[1]


@pytest.mark.usefixtures("shared_ray")
def test_what_ray_has_not_is_refused_in_one_line(quick):
    with pytest.raises(UsageError, match="--workers 2: Ray has 0 GPUs, 1 are needed"):
        quick(engine="ray", workers=2, gpus_per_worker=0.5)


@pytest.mark.usefixtures("shared_ray")
def test_why_an_actor_cannot_start_is_said_in_one_line(tmp_path):
    from fedsam.engines.ray import RayExecutor

    def make():
        raise UsageError("no data here")

    trainer, initial = new_trainer(quick_config(tmp_path))
    actors = RayExecutor(trainer, make, 1)
    try:
        with pytest.raises(TrainingError, match=r"^a Ray actor cannot start: .*no data here$"):
            actors.train([ClientJob(0, initial.state, 1, 0.1)])
    finally:
        actors.close()


@pytest.fixture
def cluster():
    """Return a function that starts a cluster here, of nodes with so many cores; end it after."""
    nodes: list[subprocess.Popen] = []
    environment = os.environ | {"RAY_health_check_period_ms": "500"}  # 3000: deaths are seen late

    def start_node(home: Path, *arguments: str) -> None:
        log = home / f"node-{len(nodes)}.log"
        call = [Path(sys.executable).with_name("ray"), "start", "--block", "--disable-usage-stats"]
        with log.open("w") as out:
            words = [*call, *arguments]
            nodes.append(subprocess.Popen(words, stdout=out, stderr=out, env=environment))
        end = time.monotonic() + 60
        while "Ray runtime started" not in log.read_text():
            assert nodes[-1].poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)

    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as name:

        def start(*cores: int) -> tuple[str, list[subprocess.Popen]]:
            home, port = Path(name), free_port()
            head = ["--head", "--port", str(port), "--temp-dir", name]
            head += ["--include-dashboard", "false"]
            for count in cores:
                words = ["--address", f"127.0.0.1:{port}"] if nodes else head
                start_node(home, *words, "--num-cpus", str(count))
            time.sleep(1)  # until the head knows what the last node has
            return f"127.0.0.1:{port}", nodes

        yield start
        for node in nodes:
            kill(*family(node.pid))
            node.wait(timeout=30)


def lose_a_node(local: Path, address: str, node: subprocess.Popen, workers: int, out: Path):
    """Repeat a run on a cluster, and kill a node after three rounds, all its processes at once.

    The run is a process of its own: Ray ends a driver whose own node is gone.

    Returns
    -------
    tuple
        The run as it ended, and how many actors the node held.
    """
    held = []

    def kill_in_mid_run():
        end = time.monotonic() + 90
        log = out / "metrics.jsonl"
        while not log.exists() or log.read_text().count("\n") < 4:
            if time.monotonic() > end:
                return
            time.sleep(0.02)
        held.extend(actors(node.pid))
        kill(*family(node.pid))

    killer = threading.Thread(target=kill_in_mid_run)
    killer.start()
    words = ["--config", local / "config.yaml", "--engine", "ray", "--workers", workers]
    done = command(*map(str, [*words, "--ray-address", address, "--out", out]))
    killer.join()
    return done, len(held)


def test_a_killed_node_changes_no_byte(tmp_path, undisturbed, cluster):
    address, nodes = cluster(1, 1)
    done, held = lose_a_node(undisturbed.folder, address, nodes[1], 2, tmp_path / "ray")
    assert held == 1
    assert done.returncode == 0, done.stderr
    assert "a Ray actor died" in done.stderr
    assert "1 of 2 actors" in " ".join(done.stderr.split())
    assert (tmp_path / "ray" / "model.safetensors").read_bytes() == model(undisturbed)


def test_a_run_without_a_place_for_an_actor_stops(tmp_path, undisturbed, cluster):
    address, nodes = cluster(0, 1)
    done, held = lose_a_node(undisturbed.folder, address, nodes[1], 1, tmp_path / "ray")
    assert held == 1
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last == "fedsam: training stopped: no Ray actor can be placed: no node has 1 CPU"
    assert (tmp_path / "ray" / "model.safetensors").exists()


def test_two_states_in_one_cohort_are_kept_apart(tmp_path, shared_ray):
    config = quick_config(tmp_path / "none", engine="ray", workers=1)
    trainer, initial = new_trainer(config)
    states = initial.state, initial.state + 0.01
    jobs = [ClientJob(client, states[client % 2], 1, 0.1) for client in (0, 1, 3, 2, 4)]
    threads = ThreadExecutor(trainer, 1)
    executor = new_ray_executor(config, trainer)
    try:
        for mine, theirs in zip(executor.train(jobs), threads.train(jobs), strict=True):
            assert torch.equal(mine.state, theirs.state)
            assert mine[1:] == theirs[1:]
    finally:
        executor.close()
        threads.close()
    assert ray.is_initialized()  # it was there before, as a script of one's own has one
    assert ray.get_runtime_context().gcs_address == shared_ray  # and is left alone
