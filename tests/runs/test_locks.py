"""One writer a folder: the second is refused in one line, and removes nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import quick_config

from fedsam.base.errors import StorageError, UsageError
from fedsam.runs import lock as locks
from fedsam.runs.lock import Lock
from fedsam.simulate.__main__ import main
from fedsam.simulate.resume import resumed, went_on
from fedsam.simulate.run import run
from fedsam.sweep.__main__ import main as sweep

HOLDER = """
import sys, pathlib
from fedsam.runs.lock import Lock
with Lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder():
    """Return a function that lets another process hold a folder's lock."""
    started = []

    def hold(folder):
        call = [sys.executable, "-c", HOLDER, str(folder)]
        process = subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def test_the_second_is_told_who_holds_it_until_that_is_killed(tmp_path, holder):
    process = holder(tmp_path)
    with pytest.raises(UsageError, match=f"{tmp_path}: process {process.pid} on .* writes there"):
        Lock(tmp_path)
    process.send_signal(signal.SIGKILL)
    with Lock(tmp_path, patience=10):
        pass


def test_in_one_process_it_holds_too_and_other_folders_are_free(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    refused = pytest.raises(UsageError, match=f"process {os.getpid()} on")
    with Lock(tmp_path / "a"), Lock(tmp_path / "b"), refused:
        Lock(tmp_path / "a")
    Lock(tmp_path / "a").close()


def test_a_folder_that_was_replaced_is_written_into_no_more(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with Lock(folder) as lock:
        lock.check()
        folder.rename(tmp_path / "moved")
        with pytest.raises(StorageError, match="was moved or removed"):
            lock.check()
        folder.mkdir()
        with Lock(folder), pytest.raises(StorageError):  # another run's
            lock.check()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(locks, "fcntl", None)
    with Lock(tmp_path):
        pass
    assert f"{tmp_path}: no locks here: let no other process write there" in caplog.text


def test_resume_and_go_on_are_refused_while_another_writes(tmp_path, holder, capsys):
    folder = run(quick_config(tmp_path / "run")).folder
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    before = {path: path.read_bytes() for path in paths}
    config, snapshot = resumed(folder, {"rounds": 6})
    holder(folder)
    with pytest.raises(UsageError, match="writes there; wait until it ends"):
        run(config, snapshot=snapshot)
    assert main(["--resume", str(folder), "--rounds", "6"]) == 2
    said = capsys.readouterr().err
    assert (said.count("\n"), "writes there" in said) == (1, True)
    assert {path: path.read_bytes() for path in before} == before


def test_go_on_removes_no_folder_in_which_another_begins(tmp_path, holder):
    """Right after mkdir, or with a config and no checkpoint yet."""
    whole = run(quick_config(tmp_path / "whole")).folder
    for name in ("empty", "begun"):
        folder = tmp_path / name
        folder.mkdir()
        if name == "begun":
            shutil.copy(whole / "config.yaml", folder)
        process = holder(folder)
        with pytest.raises(UsageError, match="writes there"):
            went_on(quick_config(folder))
        assert folder.exists()
        process.kill()
        process.wait()
        assert went_on(quick_config(folder)) == (quick_config(folder), None)
        assert not folder.exists()


def test_one_that_was_read_before_another_went_on_is_refused(tmp_path):
    folder = run(quick_config(tmp_path / "run")).folder
    config, snapshot = resumed(folder, {"rounds": 6})
    run(*resumed(folder, {"rounds": 5})[:1], snapshot=snapshot)
    with pytest.raises(UsageError, match="another process went on with it just now; try again"):
        run(config, snapshot=snapshot)


def test_two_runs_in_threads_of_one_process_have_a_folder_each(tmp_path):
    configs = [quick_config(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(run, configs))
    assert all(outcome.summary["finished"] for outcome in outcomes)


SWEEP = """
set: {clients: 20, clients_per_round: 5, local_steps: 20, rounds: 40, checkpoint_every: 10}
grid: {seed: [0]}
"""


@pytest.mark.slow
def test_a_killed_sweeps_cell_ends_with_it_and_a_second_sweep_is_refused(tmp_path, capsys):
    (tmp_path / "s.yaml").write_text(SWEEP)
    words = [str(tmp_path / "s.yaml"), "--out", str(tmp_path / "s"), "--device", "cpu"]
    call = [sys.executable, "-m", "fedsam.sweep", *words, "--threads", "1"]
    process = subprocess.Popen(call, stdout=subprocess.DEVNULL)
    cell, end = tmp_path / "s" / "seed=0", time.monotonic() + 120
    lines = cell / "metrics.jsonl"
    while not lines.exists() or not lines.read_bytes().count(b"\n") > 1:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    assert sweep(words) == 2
    said = capsys.readouterr().err
    assert (said.count("\n"), "/s: process" in said) == (1, True)
    process.kill()
    process.wait()
    with Lock(cell, patience=60):
        summary = json.loads((cell / "summary.json").read_text())
    assert (summary["finished"], summary["ended"]) == (False, "interrupted")
    assert sweep(words) == 0
    rounds = [json.loads(line)["round"] for line in lines.read_text().splitlines()]
    assert rounds == list(range(41))
