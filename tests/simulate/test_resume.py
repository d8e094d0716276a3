"""A run that was cut short goes on as if nothing had happened, or is refused by name."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from conftest import quick_config

from fedsam.base.errors import StorageError, UsageError
from fedsam.base.system import Interrupted
from fedsam.config.schema import resolve
from fedsam.engines.threads import ThreadExecutor
from fedsam.runs import checkpoint, files
from fedsam.runs.seals import seal_of
from fedsam.simulate.__main__ import main
from fedsam.simulate.joint import run_together
from fedsam.simulate.resume import resumed
from fedsam.simulate.run import run
from fedsam.simulate.schedule import Due

FLOWER = "flwr.serverapp.strategy:"
AVERAGING = {"average": "wima", "average_options": {"window": 3}, "swa_start": 1}
NORMED = {"model": "resnet20", "model_options": {"norm": "batch"}, "local_steps": 1, "clients": 5}
RUNS = {
    "fedavg": {},
    "swa": {"swa": True, "swa_start": 2, "swa_cycle": 2},
    "wima": AVERAGING,
    "ema": {"average": "ema", "swa_start": 1},
    "scaffold": {"algorithm": "scaffold", "minimizer": "asam", "momentum": 0.5},
    "fedavgm": {"strategy": f"{FLOWER}FedAvgM", "strategy_options": {"server_momentum": 0.5}},
    "fedadam": {"strategy": f"{FLOWER}FedAdam"} | AVERAGING,
    "fedadagrad": {"strategy": f"{FLOWER}FedAdagrad"},
    "fedyogi": {"strategy": f"{FLOWER}FedYogi"},
    "qfedavg": {
        "strategy": f"{FLOWER}QFedAvg",
        "strategy_options": {"client_learning_rate": 0.1, "train_loss_key": "loss"},
    },
    "median": {"strategy": f"{FLOWER}FedMedian"},
    "patience": {"patience": 4, "lr": 1e-6, "eval_every": 1},
    "vmap": {"cohort": "vmap", "algorithm": "fedasam"},
    "ours-fedavgm": {"algorithm": "fedavgm"},
    "ours-fedadam": {"algorithm": "fedadam"},
    "fedacg": {"algorithm": "fedacg"},
    "fedexp": {"algorithm": "fedexp"},
    "fednova": {"algorithm": "fednova"},
    "adabest": {"algorithm": "adabest"},
    "fedgloss": {"algorithm": "fedgloss"},
    "fedlesam-d": {"algorithm": "fedlesam-d"},
    "fedsmoo": {"algorithm": "fedsmoo"},
    "lifelong": {"lifelong": 3, "lifelong_options": {"heads": "multi", "memory": 2}},
    "bn-local": {**NORMED, "bn": "local", "client": "scaffold", "update_bn": 50},
    "dropout": {"model": "tests.training.test_dry_pass:Dropout", "minimizer": "sam", "threads": 2},
    "bn-pooled": {**NORMED, "bn": "pooled", "average": "ema", "swa_start": 1, "update_bn": 50},
}


def metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without the clock's."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def models(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def stops_after(number: int):
    """Return a watcher that interrupts the run as Ctrl-C does, in mid-round."""

    def watch(line):
        if line["round"] == number:
            raise KeyboardInterrupt

    return watch


@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path, name):
    keys = RUNS[name] | {"rounds": 6}
    whole = run(quick_config(tmp_path / "whole", **keys)).folder
    cut = tmp_path / "cut"
    with pytest.raises(Interrupted) as stopped:
        run(quick_config(cut, **keys), stops_after(4))
    assert (stopped.value.folder, stopped.value.round) == (cut, 3)  # the fourth was not kept yet
    assert not json.loads((cut / "summary.json").read_text())["finished"]
    config, snapshot = resumed(cut, {})
    outcome = run(config, snapshot=snapshot)
    assert outcome.summary["finished"]
    assert models(cut) == models(whole)
    assert metrics(cut) == metrics(whole)
    unlike = {"seconds", "rounds_per_second", "seals", "seal"}
    theirs = json.loads((whole / "summary.json").read_text())
    assert {k for k, v in outcome.summary.items() if theirs[k] != v} <= unlike


def test_a_finished_run_goes_on_with_more_rounds(tmp_path):
    keys = {"algorithm": "scaffold", "swa": True, "swa_start": 3, "swa_cycle": 1}
    whole = run(quick_config(tmp_path / "whole", rounds=8, **keys)).folder
    part = run(quick_config(tmp_path / "part", rounds=4, **keys)).folder
    config, snapshot = resumed(part, {"rounds": 8})
    run(config, snapshot=snapshot)
    assert models(part) == models(whole)
    assert metrics(part) == metrics(whole)
    assert resolve({}, part / "config.yaml").rounds == 8


def test_averaging_that_has_not_begun_may_begin_at_another_round(tmp_path):
    keys = {"swa": True, "swa_start": 0.75, "swa_cycle": 1}
    whole = run(quick_config(tmp_path / "whole", rounds=8, **keys)).folder
    with pytest.raises(Interrupted):
        run(quick_config(tmp_path / "cut", rounds=4, **keys), stops_after(3))
    config, snapshot = resumed(tmp_path / "cut", {"rounds": 8})
    run(config, snapshot=snapshot)
    assert models(tmp_path / "cut") == models(whole)


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"lr_schedule": "cosine"}, "--lr-schedule cosine"),
        ({"algorithm": "late-phase"}, "--minimizer"),
        ({"loss": "pgd_at", "loss_options": {"start": 0.5}}, "--loss"),
        ({"lifelong": 2, "alpha": 0}, "--lifelong"),
    ],
)
def test_what_goes_by_all_the_rounds_goes_on_with_as_many(tmp_path, keys, what):
    folder = run(quick_config(tmp_path / "run", eval_every=4, **keys)).folder
    with pytest.raises(UsageError, match=f"--rounds 8: {what} of the run in .* goes by its 4; "):
        resumed(folder, {"rounds": 8})
    assert resumed(folder, {"threads": 1})[0].rounds == 4


def test_what_starts_at_a_round_goes_on_with_more_rounds(tmp_path):
    keys = {"loss": "pgd_at", "loss_options": {"start": 3, "steps": 1}}
    whole = run(quick_config(tmp_path / "whole", rounds=6, **keys)).folder
    part = run(quick_config(tmp_path / "part", rounds=4, **keys)).folder
    config, snapshot = resumed(part, {"rounds": 6})
    run(config, snapshot=snapshot)
    assert models(part) == models(whole)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": 0.2}, "--lr 0.2: the run in .* has 0.1; it can only go on with that"),
        ({"seed": 1}, "--seed 1: the run in"),
        ({"algorithm": "fedsam"}, "--algorithm fedsam: the run in"),
        ({"rounds": 3}, "--rounds 3: the run has done 4 already"),
        ({"rounds": 40}, "--swa-start 0.5: averaging began after round 2 of the run; give --swa-"),
        ({"rouns": 40}, "--rouns: no such key"),
    ],
)
def test_what_contradicts_the_checkpoint_is_refused_by_name(tmp_path, given, message):
    folder = run(quick_config(tmp_path / "run", swa=True, swa_start=0.5)).folder
    with pytest.raises(UsageError, match=message):
        resumed(folder, given)
    how = {"threads": 1, "quiet": True, "swa_start": 2, "rounds": 6}
    assert resumed(folder, how)[0].rounds == 6


def test_where_there_is_nothing_to_go_on_from_that_is_said(tmp_path, capsys):
    with pytest.raises(UsageError, match="there is no run"):
        resumed(tmp_path / "nowhere", {})
    none = run(quick_config(tmp_path / "none", checkpoint_every="0")).folder
    assert not (none / "checkpoints").exists()
    with pytest.raises(UsageError, match="it has no checkpoint to go on from; start it anew"):
        resumed(none, {})
    assert main(["--resume", str(none), "--out", "x"]) == 2
    assert "--resume: stands without --config, --out and --go-on" in capsys.readouterr().err
    assert main(["--go-on"]) == 2
    assert "--go-on: needs --out" in capsys.readouterr().err


def test_go_on_begins_anew_where_a_run_left_nothing_to_go_on_from(tmp_path, caplog):
    words = ["--rounds", "2", "--clients", "20", "--clients-per-round", "5", "--device", "cpu"]
    words += ["--alpha", "1", "--eval-every", "1", "--go-on", "--out"]
    empty, cut, whole = (tmp_path / name for name in ("empty", "cut", "whole"))
    assert main([*words, str(whole)]) == 0
    empty.mkdir()
    shutil.copytree(whole, cut)  # as a kill before the first checkpoint leaves it
    shutil.rmtree(cut / "checkpoints")
    (cut / "summary.json").unlink()
    for folder in (empty, cut):
        assert main([*words, str(folder)]) == 0
        assert models(folder) == models(whole)
        assert f"--go-on: {folder} has no checkpoint; the run begins anew" in caplog.text


@pytest.mark.parametrize("lost", ["checkpoints", "config.yaml"])
def test_go_on_removes_no_folder_that_holds_something(tmp_path, lost):
    """A finished run without a checkpoint, and a folder that is no run's."""
    folder = run(quick_config(tmp_path / "run", checkpoint_every="0", rounds=1)).folder
    (folder / lost).unlink(missing_ok=True)
    assert main(["--go-on", "--out", str(folder)]) == 2
    assert (folder / "model.safetensors").exists()


def test_a_checkpoint_of_another_version_is_refused_in_one_line(tmp_path, capsys):
    folder = run(quick_config(tmp_path / "run")).folder
    snapshot = checkpoint.load(folder)
    del snapshot.tree["format"]  # as before there were formats
    checkpoint.save(folder, snapshot)
    assert main(["--resume", str(folder)]) == 2
    said = capsys.readouterr().err
    assert f"--resume {folder}: another version of fedsam wrote its checkpoint" in said
    assert said.count("\n") == 1


def test_other_data_or_lost_metrics_are_noticed(tmp_path):
    folder = run(quick_config(tmp_path / "run")).folder
    config, snapshot = resumed(folder, {"rounds": 6})
    file = folder / "partition.npz"
    whole = file.read_bytes()
    with np.load(file) as archive:
        arrays = dict(archive)
    np.savez_compressed(file, **arrays | {"indices": arrays["indices"][::-1]})
    checkpoint.accept(folder, "partition.npz", seal_of(file.read_bytes()))
    with pytest.raises(UsageError, match="the data are split in another way than there"):
        run(config, snapshot=resumed(folder, {"rounds": 6})[1])
    file.write_bytes(whole)
    os.truncate(folder / "metrics.jsonl", 10)
    with pytest.raises(UsageError, match=r"metrics\.jsonl: is shorter than it was"):
        run(config, snapshot=snapshot)


def test_the_last_two_are_kept_and_a_damaged_one_is_passed_over(tmp_path, caplog):
    folder = run(quick_config(tmp_path / "run", rounds=5, checkpoint_every="1")).folder
    assert files.checkpoints(folder) == ["round-00000004", "round-00000005"]
    assert len(list((folder / "checkpoints").iterdir())) == 4  # nothing half written
    whole = models(folder)
    newest = folder / "checkpoints" / "round-00000005.safetensors"
    good = newest.read_bytes()
    for place in (5, len(good) // 2, len(good) - 1):  # a flipped bit in header, middle, end
        newest.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        caplog.clear()
        assert checkpoint.load(folder).round == 4
        assert (
            "checkpoint round-00000005 is damaged (its tensors have another checksum)"
            in caplog.text
        )
    newest.write_bytes(good[:-7])  # cut short
    config, snapshot = resumed(folder, {})
    assert snapshot.round == 4
    run(config, snapshot=snapshot)
    assert models(folder) == whole
    notes = folder / "checkpoints" / "round-00000005.json"
    text = notes.read_text()
    for wrong in (text.replace('"round": 5', '"round": 6'), text[:-3], "", "[]", "{}"):
        notes.write_text(wrong)
        assert checkpoint.load(folder).round == 4
    (folder / "checkpoints" / "round-00000004.safetensors").unlink()
    with pytest.raises(UsageError, match="no checkpoint to go on from"):
        resumed(folder, {})


def test_due_counts_rounds_or_seconds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    assert [Due("3").now(r) for r in range(1, 8)] == [False, False, True, False, False, True, False]
    assert not any(Due("0").now(r) for r in range(1, 8))
    due = Due("60s")
    found = []
    for now[0] in (10.0, 59.0, 61.0, 62.0, 120.0, 122.0):
        found.append(due.now(1))
    assert found == [False, False, True, False, False, True]


def test_several_runs_in_one_program_go_on_too(tmp_path):
    def configs(name):
        return [quick_config(tmp_path / name / str(seed), seed=seed, rounds=5) for seed in (0, 1)]

    whole = [outcome.folder for outcome in run_together(configs("whole"))]

    def watch(number, line):
        if (number, line["round"]) == (1, 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_together(configs("cut"), watch)
    begins = [resumed(tmp_path / "cut" / str(seed), {}) for seed in (0, 1)]
    run_together([config for config, _ in begins], snapshots=[s for _, s in begins])
    for seed, folder in enumerate(whole):
        assert models(folder) == models(tmp_path / "cut" / str(seed))
        assert metrics(folder) == metrics(tmp_path / "cut" / str(seed))


# real processes

WORDS = ["--clients", "20", "--clients-per-round", "5", "--alpha", "1", "--eval-every", "5"]
WORDS += ["--algorithm", "scaffold", "--minimizer", "asam", "--swa", "--swa-start", "30"]
WORDS += ["--swa-cycle", "5", "--device", "cpu", "--quiet"]


def call(*words):
    """Call the command in this process."""
    return main([*map(str, words)])


def begin(*words):
    """Call the command in a process of its own."""
    words = [sys.executable, "-m", "fedsam.simulate", *map(str, words)]
    return subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_for_lines(folder, number, process):
    file, end = folder / "metrics.jsonl", time.monotonic() + 120
    while not file.exists() or file.read_bytes().count(b"\n") < number:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def never_interrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert call(*WORDS, "--rounds", 60, "--out", folder) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_in_good_order_and_names_the_way_on(
    tmp_path, never_interrupted, number, code
):
    folder = tmp_path / "run"
    process = begin(*WORDS, "--rounds", 60, "--out", folder)
    wait_for_lines(folder, 20, process)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert "stopping after the clients at hand; again: now" in said
    assert json.loads((folder / "summary.json").read_text())["ended"] == "interrupted"
    command = said.strip().splitlines()[-1].partition("go on with: python -m fedsam.simulate ")[2]
    assert command == f"--resume {folder}"
    assert call(*command.split(), "--threads", 1) == 0
    assert models(folder) == models(never_interrupted)
    assert metrics(folder) == metrics(never_interrupted)


SIGNALLED = "stopping after the clients at hand; again: now"
LIFELONG = ("--lifelong", "2", "--lifelong-options", "{heads: multi}")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("more", [(), LIFELONG], ids=["plain", "lifelong"])
def test_a_signal_during_the_first_evaluation_ends_it_in_good_order(
    tmp_path, monkeypatch, capfd, number, code, more
):
    words = ["--rounds", "2", "--clients", "20", "--clients-per-round", "5", "--device", "cpu"]
    words += [*more, "--alpha", "1", "--eval-every", "1"]
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    evaluate = ThreadExecutor.evaluate_by_group

    def interrupted(self, *images):
        os.kill(os.getpid(), number)
        return evaluate(self, *images)

    cut = tmp_path / "cut"
    with monkeypatch.context() as patched:
        patched.setattr(ThreadExecutor, "evaluate_by_group", interrupted)
        capfd.readouterr()
        assert main([*words, "--out", str(cut)]) == code
    said = (
        f"fedsam: interrupted after round 0; go on with: python -m fedsam.simulate --resume {cut}"
    )
    assert capfd.readouterr().err.splitlines()[-2:] == [SIGNALLED, said]
    assert metrics(cut) == []
    assert json.loads((cut / "summary.json").read_text())["finished"] is False
    assert main(["--resume", str(cut)]) == 0
    assert models(cut) == models(tmp_path / "whole")
    assert metrics(cut) == metrics(tmp_path / "whole")


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(tmp_path):
    folder = tmp_path / "run"
    process = begin(*WORDS, "--rounds", 60, "--local-epochs", 3000, "--out", folder)
    wait_for_lines(folder, 1, process)
    time.sleep(1)  # clients that train for minutes
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == -signal.SIGINT
    process.communicate()


def kill_and_go_on(folder, words, kills, generator, signals=(signal.SIGKILL,)):
    """Begin a run, kill it so many times at moments that are drawn, and let it end."""
    done = 0
    command = [*words, "--out", folder]
    while done < kills:
        process = begin(*command)
        delay = generator.uniform(0, 1.5)
        if files.checkpoints(folder):  # after it has taken up its work again: it gets somewhere
            before = (folder / "metrics.jsonl").stat().st_mtime_ns
            end = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < end:
                if (folder / "metrics.jsonl").stat().st_mtime_ns != before:
                    break
                time.sleep(0.005)
            delay = generator.uniform(0, 0.3)
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.send_signal(generator.choice(signals))
            done += 1
        process.communicate()
        ended = process.returncode == 0
        if ended:
            break
        begun = bool(files.checkpoints(folder))
        if not begun and folder.exists():  # killed before its first checkpoint: there is none
            subprocess.run(["rm", "-r", folder], check=True)
        command = ["--resume", folder] if begun else [*words, "--out", folder]
    if not ended:
        process = begin(*command)
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    return done


@pytest.mark.slow
@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.long)])
def test_killed_at_any_moment_it_ends_in_the_same_bytes(tmp_path, kills):
    rounds = 25 * kills + 40
    words = [*WORDS, "--rounds", rounds, "--checkpoint-every", "1"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert call(*words, "--out", whole) == 0
    done = kill_and_go_on(cut, words, kills, np.random.default_rng(kills))
    assert done == kills
    assert models(cut) == models(whole)
    assert metrics(cut) == metrics(whole)


@pytest.mark.slow
@pytest.mark.xdist_group("clusters")
@pytest.mark.usefixtures("shared_ray")
def test_killed_on_ray_it_goes_on_locally_and_the_other_way_round(tmp_path, never_interrupted):
    folder = tmp_path / "run"
    ray = ["--engine", "ray", "--workers", "2"]
    words = [*WORDS, "--rounds", 60, "--checkpoint-every", 3, "--out", folder]
    for command, lines in ((words + ray, 20), (["--resume", folder, "--engine", "local"], 40)):
        process = begin(*command)
        wait_for_lines(folder, lines, process)
        process.kill()
        process.communicate()
    assert call("--resume", folder, *ray) == 0
    assert models(folder) == models(never_interrupted)
    assert metrics(folder) == metrics(never_interrupted)


@contextmanager
def no_file_longer_than():
    """Yield a function that sets the length from which on writing fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        yield lambda length: resource.setrlimit(resource.RLIMIT_FSIZE, (length, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize(("every", "kept"), [("1", 2), ("2", 2)], ids=["checkpoint", "metrics"])
def test_a_full_disk_is_one_line_and_what_was_kept_is_whole(tmp_path, every, kept):
    keys = {"rounds": 6, "eval_every": 1, "checkpoint_every": every}
    whole = run(quick_config(tmp_path / "whole", **keys)).folder
    cut = tmp_path / "cut"
    with no_file_longer_than() as limit:

        def fill_up(line):
            if line["round"] == 3:
                limit((cut / "metrics.jsonl").stat().st_size + 5)

        with pytest.raises(StorageError, match="; the checkpoints written before are whole"):
            run(quick_config(cut, **keys), fill_up)
    assert files.checkpoints(cut)[-1] == f"round-{kept:08d}"
    assert not list(cut.rglob("*.part"))
    assert main(["--resume", str(cut), "--quiet"]) == 0
    assert models(cut) == models(whole)
    assert metrics(cut) == metrics(whole)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system, which only root may")
def test_a_really_full_disk(tmp_path, never_interrupted):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=7m", "tmpfs", disk], check=True)
    try:
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(2_000_000))
        folder = disk / "run"
        process = begin(*WORDS, "--rounds", 60, "--checkpoint-every", 2, "--out", folder)
        _, said = process.communicate(timeout=120)
        assert process.returncode == 1
        last = said.strip().splitlines()[-1]
        assert last.startswith(f"fedsam: training stopped: {folder}: No space left on device")
        assert files.checkpoints(folder)
        ballast.unlink()
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        assert call("--resume", folder) == 0
        assert models(folder) == models(never_interrupted)
        assert metrics(folder) == metrics(never_interrupted)
    finally:
        subprocess.run(["umount", disk], check=True)
