"""Processes: the bytes of threads, whatever becomes of a worker; and the rule that chooses them."""

import logging
import os
import signal
import threading
import time
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import quick_config
from fedsam.clients.corrections.fedavg import FedAvg
from hypothesis import given
from hypothesis import strategies as st
from record import PRESETS

from fedsam.base.errors import TrainingError, UsageError
from fedsam.base.system import Interrupted, Stop
from fedsam.config.schema import resolve
from fedsam.engines import processes
from fedsam.engines.local import LocalGrid
from fedsam.engines.processes import ProcessExecutor, SharedRows, TimedExecutor, deal, unforkable
from fedsam.engines.threads import ThreadExecutor, computing
from fedsam.server.rounds import play
from fedsam.server.side_vectors import SideVectors
from fedsam.simulate.build.strategy import new_strategy
from fedsam.simulate.build.trainer import new_trainer
from fedsam.simulate.joint import run_together
from fedsam.simulate.resume import resumed
from fedsam.simulate.run import new_local_executor, run, sampling
from fedsam.training.client import ClientJob, Failed, Result

HERE = os.getpid()
SMALL = {"clients": 20, "clients_per_round": 5, "alpha": 1.0, "lr": 0.05, "batch_size": 48}
CENTRAL = {"lr": 0.05, "batch_size": 512}
FURTHER = {
    "statistics that stay": {
        "model": "resnet20",
        "model_options": {"norm": "batch"},
        "bn": "local",
        "update_bn": 100,
        "clients_per_round": 3,
        "local_steps": 1,
    },
    "lifelong": {"lifelong": 3, "lifelong_options": {"heads": "multi", "memory": 2}},
    "stragglers": {"stragglers": 0.8, "dropout_rate": 0.5, "partition": "quantity"},
    "bf16": {"precision": "bf16", "momentum": 0.9, "client": "scaffold"},
    "a model that draws": {"model": "test_processes:Drops"},
    "nothing to train": {"local_epochs": 0, "client": "scaffold"},
}


class Drops(torch.nn.Sequential):
    """Draws numbers of its own in each pass."""

    def __init__(self) -> None:
        layers = (torch.nn.Flatten(), torch.nn.Dropout(0.3), torch.nn.Linear(64, 10))
        super().__init__(*layers)


@contextmanager
def training(trainer, *, workers=0, clients=5, stop=None):
    """Who trains in it: so many workers, or one thread."""
    with computing(trainer), ExitStack() as leaving:
        executor = (
            ProcessExecutor(trainer, workers, clients, stop)
            if workers
            else ThreadExecutor(trainer, 1, stop)
        )
        leaving.callback(executor.close)
        yield executor


def made(**given):
    return new_trainer(resolve(SMALL | {"device": "cpu"} | given))


def jobs_of(trainer, initial, clients=(3, 1, 7, 4, 9), round=1):
    sent = {name: torch.zeros(trainer.layout.trainable) for name in trainer.method.exchanged}
    return [ClientJob(k, initial.state, round, 0.05, None, sent) for k in clients]


def correcting(trainer, correction):
    return replace(trainer, method=replace(trainer.method, correction=correction))


def same(one, other):
    """Whether two results are the same bytes."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or (one != one and other != other)


def played(given, workers):
    """Return what three rounds of a run come to: models, what clients keep, what is sent beside."""
    config = resolve({"device": "cpu", "rounds": 3} | given)
    trainer, arrays = new_trainer(config)
    side_vectors = SideVectors(trainer.method, trainer.layout, config.clients)
    models, metrics = [], []
    with (
        closing(ThreadExecutor(trainer, 1)) as threads,
        training(trainer, workers=workers) as executor,
    ):
        grid = LocalGrid(threads, executor)
        for turn in play(
            new_strategy(config),
            grid,
            arrays,
            rounds=range(1, 4),
            sample=sampling(config, trainer),
            seed=config.seed,
            lr=config.rate,
            node_of=range(config.clients),
            side_vectors=side_vectors,
            asked=trainer.asked,
        ):
            models.append(turn.arrays.state)
            metrics.append(sorted(turn.metrics.items()))
        return models, metrics, grid.memories, dict(side_vectors.vectors)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_ends_in_the_bytes_of_threads(preset):
    given = {"algorithm": preset} | (CENTRAL if preset.startswith("central") else SMALL)
    assert same(played(given, 2), played(given, 0))


@pytest.mark.parametrize("name", FURTHER)
def test_further_settings_end_in_the_bytes_of_threads(name):
    given = SMALL | FURTHER[name]
    ours = played(given, 2)
    assert same(ours, played(given, 0))
    assert bool(ours[2]) == ("client" in given or "bn" in given)


def test_a_whole_run_leaves_the_bytes_of_threads_also_from_another_thread(quick):
    def model(**given):
        return (quick(**given).folder / "model.safetensors").read_bytes()

    torch.set_num_threads(2)  # the parent has a pool of OpenMP's, which no fork has
    torch.nn.functional.conv2d(torch.rand(64, 8, 32, 32), torch.rand(8, 8, 3, 3))
    torch.rand(512, 512) @ torch.rand(512, 512)
    torch.set_num_threads(1)
    in_threads, in_another = model(threads=2, processes=0), []
    other = threading.Thread(target=lambda: in_another.append(model(processes=3)))
    other.start()
    other.join()
    assert model(processes=2, threads=2, eval_every=1) == in_threads
    assert in_another == [in_threads]


def test_more_clients_than_before_are_trained_too():
    trainer, initial = made(algorithm="scaffold")
    few, many = jobs_of(trainer, initial, (3,)), jobs_of(trainer, initial, range(9))
    with training(trainer) as threads, training(trainer, workers=2, clients=1) as executor:
        assert executor.train([]) == []
        assert same(executor.train(few), threads.train(few))
        assert same(executor.train(many), threads.train(many))


def test_what_is_returned_does_not_change_later():
    trainer, initial = made(algorithm="scaffold")
    with training(trainer, workers=2) as executor:
        first = executor.train(jobs_of(trainer, initial))
        copies = [(r.state.clone(), r.memory["c_i"].clone()) for r in first]
        executor.train(jobs_of(trainer, initial, (0, 2, 5, 6, 8), round=2))
        assert same([(r.state, r.memory["c_i"]) for r in first], copies)


class Kills(FedAvg):
    """Ends the process that corrects, so many times."""

    def __init__(self, folder: Path, times: int) -> None:
        self.folder, self.times = folder, times

    def correct(self, w, g, local):
        if os.getpid() != HERE and (dead := len(list(self.folder.iterdir()))) < self.times:
            (self.folder / str(dead)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return g


def test_clients_of_a_worker_that_is_killed_are_trained_again(tmp_path, caplog):
    trainer, initial = made()
    jobs = jobs_of(trainer, initial)
    with training(trainer) as threads:
        expected = threads.train(jobs)
    with training(correcting(trainer, Kills(tmp_path, 1)), workers=2) as executor:
        before = {worker.pid for worker in executor.workers}
        with caplog.at_level(logging.WARNING, "fedsam"):
            assert same(executor.train(jobs), expected)
        assert len(before - {worker.pid for worker in executor.workers}) == 1
        (record,) = caplog.records
        assert record.getMessage().startswith("a worker process died (by SIGKILL); its clients")
        os.kill(executor.workers[0].pid, signal.SIGKILL)  # while it has nothing to do
        assert same(executor.train(jobs), expected)


def test_workers_that_die_one_after_another_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "DEATHS", 2)
    trainer, initial = made()
    with (
        training(correcting(trainer, Kills(tmp_path, 99)), workers=2) as executor,
        pytest.raises(TrainingError, match=r"3 worker processes died .* the last by SIGKILL"),
    ):
        executor.train(jobs_of(trainer, initial))


class OddError(Exception):
    """Cannot be made anew from its arguments."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")


class Raises(FedAvg):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def correct(self, w, g, local):
        raise self.error


def test_an_error_of_a_client_costs_the_client_and_says_where():
    trainer, initial = made()
    with (
        training(correcting(trainer, Raises(KeyError("mine")))) as threads,
        training(correcting(trainer, Raises(KeyError("mine"))), workers=2) as executor,
    ):
        done, expected = (e.train(jobs_of(trainer, initial)) for e in (executor, threads))
    assert [type(one) for one in done] == [Failed] * 5
    assert [one.reason for one in done] == [one.reason for one in expected]
    assert type(done[0].error) is KeyError
    assert "raise self.error" in done[0].error.__notes__[0]


def test_an_error_that_cannot_travel_is_told_of():
    trainer, initial = made()
    with training(correcting(trainer, Raises(OddError(1, 2))), workers=1) as executor:
        (failed,) = executor.train(jobs_of(trainer, initial, (1,)))
    assert failed.reason.startswith("OddError: 1 and 2 (test_processes.py:")
    assert str(failed.error) == "a client failed: OddError: 1 and 2"


@pytest.mark.parametrize(
    "error", [UsageError("--rho: mine"), TrainingError("full"), SystemExit(3)], ids=repr
)
def test_what_ends_a_run_is_raised_here(error):
    trainer, initial = made()
    with (
        training(correcting(trainer, Raises(error)), workers=2) as executor,
        pytest.raises(type(error), match=str(error)),
    ):
        executor.train(jobs_of(trainer, initial))


class Sleeps(FedAvg):
    def correct(self, w, g, local):
        time.sleep(60)
        return g


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "Z"
    except OSError:
        return True


def all_end(pids, seconds=10.0):
    end = time.monotonic() + seconds
    while not all(map(ended, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return all(map(ended, pids))


def test_a_stop_in_mid_round_is_heard_and_nobody_stays():
    trainer, initial = made()
    stop = Stop()
    trainer = correcting(trainer, Sleeps())
    timer = threading.Timer(0.2, lambda: setattr(stop, "signal", signal.SIGTERM))
    with training(trainer, workers=2, stop=stop) as executor:
        pids = [worker.pid for worker in executor.workers]
        timer.start()
        with pytest.raises(Interrupted) as raised:
            executor.train(jobs_of(trainer, initial))
        for number in (signal.SIGINT, signal.SIGTERM):  # to a whole group: the parent's affair
            os.kill(pids[0], number)
        assert not any(map(ended, pids))
    assert raised.value.signal == signal.SIGTERM
    assert all_end(pids)


@pytest.mark.parametrize("busy", [True, False])
def test_no_worker_outlives_a_parent_that_is_killed(tmp_path, busy):
    trainer, initial = made()
    trainer = correcting(trainer, Sleeps())
    said = tmp_path / "pids"
    parent = os.fork()
    if parent == 0:
        try:
            with training(trainer, workers=2) as executor:
                (tmp_path / "part").write_text(" ".join(str(w.pid) for w in executor.workers))
                (tmp_path / "part").rename(said)
                executor.train(jobs_of(trainer, initial) if busy else [])
                time.sleep(60)
        finally:
            os._exit(1)
    while not said.exists():
        time.sleep(0.01)
    pids = [int(word) for word in said.read_text().split()]
    time.sleep(0.2)
    assert len(pids) == 2
    assert not any(map(ended, pids))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert all_end(pids)


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(quick, tmp_path):
    given = {"algorithm": "scaffold", "rounds": 5, "eval_every": 5}
    whole = quick(**given, threads=1, processes=0).folder
    stop, out = Stop(), tmp_path / "stopped"

    def watch(line):
        if line["round"] == 2:
            stop.signal = signal.SIGINT

    with pytest.raises(Interrupted):
        run(quick_config(out, **given, processes=2), watch, stop=stop)
    config, snapshot = resumed(out, {"processes": 3})
    assert snapshot.round == 2
    run(config, snapshot=snapshot)
    for file in ("model.safetensors", "partition.npz"):
        assert (out / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"engine": "ray"}, "--processes 2: goes without --engine ray"),
        ({"cohort": "slots"}, "--processes 2: goes without --cohort slots"),
        ({"debug": True}, "--processes 2: goes without --debug"),
    ],
)
def test_what_processes_do_not_go_with(more, said):
    with pytest.raises(UsageError, match=said):
        resolve({"processes": 2} | more)
    assert resolve({"processes": 0} | more).processes == 0


def test_where_no_process_can_be_forked_is_one_line(quick, tmp_path, monkeypatch):
    trainer, _ = made()
    assert unforkable(trainer) == ""
    config = quick_config(tmp_path / "one", processes=2)
    with pytest.raises(UsageError, match="--processes 2: runs in one program train in threads"):
        run_together([config, quick_config(tmp_path / "two", seed=1, processes=2)])
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(UsageError, match=r"--processes 2: PyTorch sees a GPU .*; give --proc"):
        run(config)
    assert not (tmp_path / "one").exists()
    monkeypatch.setattr(processes.sys, "platform", "darwin")
    assert unforkable(trainer) == "only Linux forks a process safely"
    with computing(trainer), closing(ThreadExecutor(trainer, 2)) as threads:
        assert new_local_executor(quick_config(tmp_path), threads, Stop()) is threads


@pytest.mark.parametrize(
    ("more", "timed"),
    [
        ({}, True),
        ({"minimizer": "asam", "model": "torchvision.models:resnet18"}, True),
        ({"processes": 0}, False),
        ({"threads": 1}, False),
        ({"clients_per_round": 1}, False),
        ({"debug": True}, False),
        ({"profile": True}, False),
        ({"trace": True, "rounds": 9}, False),
        ({"client": "mine:Mine"}, False),
        ({"minimizer": "late", "minimizer_options": {"late": "mine:Mine"}}, False),
    ],
)
def test_whose_rounds_are_timed(more, timed, tmp_path):
    trainer, _ = made()
    config = quick_config(tmp_path, **{"threads": 2} | more)
    many = 1 if config.debug else config.threads
    with computing(trainer), closing(ThreadExecutor(trainer, many)) as threads:
        chosen = new_local_executor(config, threads, Stop())
        assert isinstance(chosen, TimedExecutor) == timed
        assert timed or chosen is threads


class Clients:
    """Stand for an executor: each client takes ten steps."""

    def __init__(self, clock=None, seconds=()):
        self.clock, self.seconds, self.calls, self.workers = clock, list(seconds), 0, [1, 2]

    def train(self, jobs):
        self.calls += 1
        if self.seconds:
            self.clock[0] += self.seconds.pop(0)
        return [Result(None, 1, 10, 0.0, {}, {}) for _ in jobs]


@pytest.mark.parametrize(
    ("step", "rounds", "forks"),
    [(0.0099, 1000, True), (0.0101, 1000, False), (0.0099, 25, True), (0.0099, 24, False)],
)
def test_small_steps_and_rounds_that_are_left_choose_processes(step, rounds, forks, caplog):
    clock, forked = [0.0], Clients()
    # the first round is warm-up: whatever it takes is not counted
    threads = Clients(clock, [9.0, *(step * 20 * factor for factor in (0.5, 1.5, 1.0))])
    executor = TimedExecutor(threads, lambda: forked, rounds, lambda: clock[0])
    jobs = [ClientJob(k, None, 0, 0.1) for k in range(2)]
    with caplog.at_level(logging.INFO, "fedsam"):
        for round in range(1, 7):
            executor.train([job._replace(round=round) for job in jobs])
    assert (threads.calls, forked.calls) == ((4, 2) if forks else (6, 0))
    said = ["engine    2 processes from round 5 on, as a step takes 9.9 ms"]
    assert [record.getMessage() for record in caplog.records] == (said if forks else [])


def test_a_run_of_small_steps_goes_over_to_processes(quick, monkeypatch, caplog):
    given = {"rounds": 7, "threads": 2, "algorithm": "fedasam"}
    expected = quick(**given, processes=0).folder / "model.safetensors"
    for name, value in (("SMALL", 1e9), ("WORTH", 0.0)):
        monkeypatch.setattr(processes, name, value)
    with caplog.at_level(logging.INFO, "fedsam"):
        model = quick(**given).folder / "model.safetensors"
    assert "engine    2 processes from round 5 on" in caplog.text
    assert model.read_bytes() == expected.read_bytes()


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 6))
def test_jobs_are_dealt_out_once_and_evenly(steps, workers):
    shares = deal(steps, workers)
    assert sorted(n for share in shares for n in share) == list(range(len(steps)))
    loads = [sum(max(1, steps[n]) for n in share) for share in shares]
    assert max(loads) - min(loads) <= max([1, *steps])
    for share in shares:
        assert [steps[n] for n in share] == sorted((steps[n] for n in share), reverse=True)


@given(
    st.lists(st.integers(0, 70), min_size=1, max_size=4), st.sampled_from(["float32", "float64"])
)
def test_rows_hold_what_is_written_each_vector_as_aligned_as_a_tensor(lengths, dtype):
    dtype = getattr(torch, dtype)
    rows = SharedRows(3, dict(zip("abcd", lengths, strict=False)), dtype)
    vectors = {name: torch.rand(n, dtype=dtype) for name, n in zip("abcd", lengths, strict=False)}
    odd = {"elsewhere": torch.rand(2), "whole": torch.tensor(3)}
    written = [rows.write(row, {k: v + row for k, v in vectors.items()} | odd) for row in range(3)]
    for row in range(3):
        read = rows.read(row, written[row])
        assert same(read, {k: v + row for k, v in vectors.items()} | odd)
        for name in vectors:
            assert written[row][name] is None
            assert read[name].data_ptr() % processes.ALIGNED == 0
