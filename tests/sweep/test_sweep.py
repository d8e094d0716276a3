"""Sweeps: which cells a file means, and what happens when they run, fail, and are started again."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from fedsam.base.errors import UsageError
from fedsam.config.presets import CONFIGS
from fedsam.report import __main__ as report
from fedsam.runs.run import load
from fedsam.sweep import live
from fedsam.sweep.__main__ import failures_of, main
from fedsam.sweep.grid import Sweep, cells_of, read
from fedsam.sweep.live import LiveTable, Pace, last_line
from fedsam.sweep.queue import jobs_of, run_here

SMALL = {"rounds": 2, "clients": 20, "clients_per_round": 5, "device": "cpu", "eval_every": 1}


def write(path, **keys):
    path.write_text(yaml.safe_dump(keys, sort_keys=False))
    return str(path)


def finished(folder):
    """The cells that went to their end, and when."""
    found = folder.glob("*/summary.json")
    ends = {path: json.loads(path.read_text())["finished"] for path in found}
    return {path.parent.name: path.stat().st_mtime_ns for path, end in ends.items() if end}


@pytest.fixture
def reports(monkeypatch):
    """Note what is asked for instead of drawing a report, which takes five CPU seconds."""
    asked = []
    monkeypatch.setattr(report, "write", lambda *arguments: asked.append(arguments))
    return asked


def test_cells_are_the_product_and_later_keys_stand_before_earlier_ones(tmp_path):
    sweep = Sweep.model_validate(
        {
            "config": "paper/cifar10",
            "set": {"rounds": 50, "rho": 0.3},
            "grid": {"alpha": [0, 1], "algorithm": ["fedsam", "fedasam"]},
            "when": [
                {"if": {"alpha": 0}, "set": {"rho": 0.4}},
                {"if": {"alpha": 0, "algorithm": "fedasam"}, "set": {"rho": 0.5, "lr": 0.2}},
            ],
        }
    )
    cells = {cell.name: cell.config for cell in cells_of(sweep, tmp_path, {"rounds": 7})}
    found = {name: (c.rho, c.lr, c.rounds, c.dataset) for name, c in cells.items()}
    assert found == {
        "alpha=0,algorithm=fedsam": (0.4, 0.01, 7, "cifar10"),
        "alpha=0,algorithm=fedasam": (0.5, 0.2, 7, "cifar10"),
        "alpha=1,algorithm=fedsam": (0.3, 0.01, 7, "cifar10"),
        "alpha=1,algorithm=fedasam": (0.3, 0.01, 7, "cifar10"),
    }


@pytest.mark.parametrize(
    ("name", "radii"),
    [
        (
            "paper-cifar10",
            {
                ("fedsam", 0.0): 0.1,
                ("fedsam", 0.05): 0.1,
                ("fedsam", 100.0): 0.02,
                ("fedasam", 0.0): 0.7,
                ("fedasam", 0.05): 0.7,
                ("fedasam", 100.0): 0.05,
            },
        ),
        (
            "paper-cifar100",
            {
                ("fedsam", 0.0): 0.02,
                ("fedsam", 0.5): 0.05,
                ("fedsam", 1000.0): 0.05,
                ("fedasam", 0.0): 0.5,
                ("fedasam", 0.5): 0.5,
                ("fedasam", 1000.0): 0.5,
            },
        ),
    ],
)
def test_the_papers_tables_have_the_papers_settings(tmp_path, name, radii):
    configs = [cell.config for cell in cells_of(read(name), tmp_path, {})]
    assert len(configs) == 6 * 3 * 3 * 3
    assert len({(c.algorithm, c.swa) for c in configs}) == 6
    for c in configs:
        if c.algorithm != "fedavg":
            assert c.rho == radii[c.algorithm, c.alpha]
        if c.algorithm == "fedasam":
            assert c.eta == 0.2
    assert {c.rounds for c in configs} == {10_000 if name == "paper-cifar10" else 20_000}


def test_a_dot_reaches_into_a_mapping(tmp_path):
    sweep = Sweep.model_validate(
        {
            "set": {"minimizer": "late", "minimizer_options": {"then": "asam", "start": 1}},
            "grid": {"minimizer_options.start": [0.5, 1.0]},
            "when": [{"if": {"minimizer_options.start": 1.0}, "set": {"loss_options.a": 2}}],
        }
    )
    first, second = cells_of(sweep, tmp_path, {})
    assert first.name == "minimizer_options.start=0.5"
    assert first.config.minimizer_options == {"then": "asam", "start": 0.5}
    assert second.config.minimizer_options == {"then": "asam", "start": 1.0}
    assert second.config.loss_options == {"a": 2}
    assert sweep.set["minimizer_options"]["start"] == 1
    with pytest.raises(UsageError, match="--minimizer-options: entries of it are keys of the grid"):
        cells_of(sweep, tmp_path, {"minimizer_options": {"start": 0.1}})
    with pytest.raises(UsageError, match=r"rho.x: rho is no mapping"):
        cells_of(Sweep.model_validate({"set": {"rho": 0.1}, "grid": {"rho.x": [1]}}), tmp_path, {})
    assert len(jobs_of([first, second], 2)) == 2  # a program has one switch


def test_the_comparison_has_every_federated_preset_thrice_with_one_budget(tmp_path):
    cells = [cell.config for cell in cells_of(read("comparison"), tmp_path, {})]
    presets = sorted(path.stem for path in CONFIGS.glob("algorithms/*.yaml"))
    wanted = [(seed, p) for seed in range(3) for p in presets if "central" not in p]
    assert sorted((c.seed, c.algorithm) for c in cells) == wanted
    seeds = [c.seed for c in cells]
    assert seeds == sorted(seeds)  # a seed of every method before the next of any
    budget = {(c.alpha, c.rounds, c.clients_per_round, c.local_steps, c.batch_size) for c in cells}
    assert budget == {(0, 150, 10, 4, 16)}


def test_coldenhoffs_experiments_have_their_settings(tmp_path):
    def cells(name):
        return [cell.config for cell in cells_of(read(f"coldenhoff-{name}"), tmp_path, {})]

    common = {"cifar10", "resnet18", 1, "iid", 0.01, 5e-4, "none"}
    every = [c for name in ("generalisation", "batch-size", "unnormalised") for c in cells(name)]
    for c in every:
        found = {c.dataset, c.model, c.clients, c.partition, c.lr, c.weight_decay, c.augment}
        assert found == common
        assert c.model_options["outputs"] == 1000
        assert c.rho == {"asam": 0.5}.get(c.minimizer, 0.05)
    assert {
        (c.rounds, c.momentum, c.batch_size, c.normalize, c.seed) for c in cells("generalisation")
    } == {(100, 0, 128, "half", seed) for seed in (20, 30, 40)}
    assert {c.batch_size for c in cells("batch-size")} == {16, 64, 128}
    for c in cells("unnormalised"):
        assert (c.rounds, c.momentum, c.lr_schedule) == (200, 0.9, "cosine")
        assert c.model_options["norm"] == "none"
        if c.minimizer == "asam":
            assert (c.eta, c.minimizer_options) == (0, {"all_parameters": True})
    assert {(c.normalize, c.minimizer) for c in cells("unnormalised")} == {
        (n, m) for n in ("none", "half") for m in ("sgd", "sam", "asam")
    }


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("sweeps/*.yaml")), ids=lambda p: p.stem)
def test_shipped_sweeps_are_right(tmp_path, path):
    assert cells_of(read(path.stem), tmp_path, {"rounds": 20})


@pytest.mark.slow
def test_a_sweep_runs_reports_and_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    file, out = write(tmp_path / "s.yaml", set=SMALL, grid={"alpha": [0.5, 1]}), tmp_path / "out"
    assert main([file, "--out", str(out), "--parallel", "2"]) == 0
    first = finished(out)
    assert len(first) == 2
    assert "alpha 0.5" in (out / "report" / "table.md").read_text()
    with (out / "report" / "runs.csv").open() as lines:
        assert len(list(csv.DictReader(lines))) == 2

    monkeypatch.setattr(report, "write", lambda *arguments: None)
    gone = "alpha=0.5"
    (out / gone / "summary.json").unlink()  # as a kill leaves it
    capsys.readouterr()
    assert main([file, "--out", str(out)]) == 0
    assert "2 cells, 1 done before" in capsys.readouterr().out
    again = finished(out)
    assert {name for name in again if again[name] != first[name]} == {gone}

    assert main([file, "--out", str(out), "--lr", "0.2"]) == 2
    assert "was run with lr 0.1, not 0.2; give another --out" in capsys.readouterr().err
    assert main([file, "--out", str(out), "--threads", "1"]) == 0  # how, not what


def test_jobs_are_cells_that_can_share_a_program(tmp_path):
    sweep = Sweep.model_validate(
        {
            "set": {"algorithm": "lookbehind"},
            "grid": {
                "batch_size": [8, 16],
                "minimizer_options": [{"k": 2}, {"k": 3}],
                "seed": [0, 1, 2],
            },
            "when": [{"if": {"seed": 2}, "set": {"rho": 0.3}}],
        }
    )
    cells = cells_of(sweep, tmp_path, {})
    jobs = jobs_of(cells, 8)
    assert [len(job) for job in jobs] == [3, 3, 3, 3]
    for job in jobs:
        assert len({(c.config.batch_size, c.config.minimizer_options["k"]) for c in job}) == 1
    assert [len(job) for job in jobs_of(cells, 2)] == [2, 1] * 4
    assert [len(job) for job in jobs_of(cells, 1)] == [1] * 12
    assert sorted(cell.name for job in jobs for cell in job) == sorted(cell.name for cell in cells)


def bytes_of(out):
    return {path.parent.name: path.read_bytes() for path in out.glob("*/model.safetensors")}


@pytest.mark.slow
@pytest.mark.xdist_group("clusters")
@pytest.mark.usefixtures("shared_ray", "reports")
def test_alone_in_one_program_and_as_ray_tasks_cells_end_in_the_same_bytes(tmp_path):
    """Alone in this process; of "one", the third cell is alone in a process of its own."""
    keys = {"set": SMALL, "grid": {"alpha": [0.5, 1, 2]}}
    file = write(tmp_path / "s.yaml", **keys, when=[{"if": {"alpha": 2}, "set": {"seed": 1}}])
    for name, words in {"one": ["--together", "2"], "ray": ["--ray"]}.items():
        assert main([file, "--out", str(tmp_path / name), *words]) == 0
        assert len(finished(tmp_path / name)) == 3
        assert not list((tmp_path / name).glob("*.yaml"))
    for cell in cells_of(read(file), tmp_path / "alone", {}):
        assert run_here([cell]) == {}
    assert bytes_of(tmp_path / "alone") == bytes_of(tmp_path / "one") == bytes_of(tmp_path / "ray")


@pytest.mark.slow
def test_in_one_program_a_cell_that_fails_leaves_the_others_alone(tmp_path, capsys, reports):
    keys = {"set": SMALL, "grid": {"seed": [0, 1, 2]}}
    file = write(tmp_path / "s.yaml", **keys, when=[{"if": {"seed": 1}, "set": {"lr": 1e30}}])
    out = tmp_path / "out"
    assert main([file, "--out", str(out), "--together", "3"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("failed:") == 1
    assert "failed: seed=1: round 1: no client returned a usable update" in said
    assert set(finished(out)) == {"seed=0", "seed=2"}
    assert reports == [([out / f"seed={seed}" for seed in (0, 1, 2)], out / "report", None)]


def test_a_job_whose_process_died_or_whose_result_is_elsewhere_is_reported(tmp_path):
    cells = cells_of(Sweep(grid={"seed": [0]}), tmp_path, {})
    died, elsewhere = Future(), Future()
    died.set_exception(RuntimeError("first\nthe worker died"))
    elsewhere.set_result({})
    assert failures_of(cells, died) == {"seed=0": "the worker died"}
    assert "all nodes must share --out's file system" in failures_of(cells, elsewhere)["seed=0"]


def test_the_board_counts_and_reads_only_whole_lines(tmp_path, capsys):
    cells = cells_of(Sweep(set={"rounds": 100}, grid={"seed": [0, 1, 2, 3]}), tmp_path, {})
    for seed, text in enumerate(['{"round": 7, "accuracy": 0.5}\n{"rou', '{"round": 3}\n', ""]):
        cells[seed].folder.mkdir()
        (cells[seed].folder / "metrics.jsonl").write_text(text)
    assert [last_line(cell) for cell in cells] == [
        {"round": 7, "accuracy": 0.5},
        {"round": 3},
        None,
        None,
    ]
    with LiveTable(cells) as board:
        board.look([cells[:1], cells[1:3]])
        whole = board.bar.tasks[0]
        assert (whole.completed, whole.total) == (10, 400)
        assert whole.description == "0 done, 0 failed, 3 running, 1 waiting"
        assert [task.fields["shown"] for task in board.bar.tasks[1:]] == [
            "accuracy 50.00%",
            "",
            "loads",
        ]
        board.end([cells[0]], {"seed=0": "no disk"})
        board.end([cells[3]], {})
        board.look([cells[1:3]])
        assert whole.completed == 203
        assert whole.description == "1 done, 1 failed, 2 running, 0 waiting"
    said = capsys.readouterr()
    assert said.err == "failed: seed=0: no disk\n"
    assert said.out == "done: seed=3  (2 to go)\n"


@pytest.mark.slow
def test_a_sweep_that_is_terminated_leaves_no_process(tmp_path):
    file = write(tmp_path / "s.yaml", set=SMALL | {"rounds": 100_000}, grid={"seed": [0, 1]})
    out = tmp_path / "out"
    call = [sys.executable, "-m", "fedsam.sweep", file, "--out", str(out), "--parallel", "2"]
    process = subprocess.Popen(call, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while len(list(out.glob("*/metrics.jsonl"))) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    children = [(cell / ".lock").read_text().split()[0] for cell in out.glob("seed=*/")]
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "the same command goes on" in said
    assert not [child for child in children if Path(f"/proc/{child}").exists()]


@pytest.mark.slow
def test_a_failed_cell_is_reported_and_does_not_stop_the_rest(tmp_path, capsys, reports):
    keys = {"set": SMALL, "grid": {"seed": [1, 0]}}
    file = write(tmp_path / "s.yaml", **keys, when=[{"if": {"seed": 1}, "set": {"lr": 1e30}}])
    out = tmp_path / "out"
    assert main([file, "--out", str(out)]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "failed: seed=1: round 1: no client returned a usable update" in said
    assert "training stopped" in (out / "seed=1.log").read_text()
    assert set(finished(out)) == {"seed=0"}
    assert main([file, "--out", str(out)]) == 1  # it fails again: it was not taken for done
    assert "failed: seed=1" in capsys.readouterr().err
    assert f"({out / 'seed=1.log'})" in said
    assert reports == [([out / "seed=1", out / "seed=0"], out / "report", None)] * 2


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on(tmp_path, reports):
    file = write(tmp_path / "s.yaml", set=SMALL | {"rounds": 30}, grid={"seed": [0, 1]})
    out = tmp_path / "out"
    call = [sys.executable, "-m", "fedsam.sweep", file, "--out", str(out)]
    process = subprocess.Popen(call, stderr=subprocess.PIPE, text=True, start_new_session=True)
    end = time.monotonic() + 60
    while not finished(out) and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in said
    before = finished(out)
    assert len(before) == 1
    assert main([file, "--out", str(out)]) == 0
    after = finished(out)
    assert len(after) == 2
    assert all(after[name] == before[name] for name in before)
    assert reports == [([out / "seed=0", out / "seed=1"], out / "report", None)]


def names_of(cells):
    return [cell.name for cell in cells]


def test_flags_list_values_and_replace_axes(tmp_path):
    flags = {"alpha": "0,0.50", "algorithm": "fedavg,fedasam", "seed": "1..2", "rounds": "20"}
    cells = cells_of(Sweep(), tmp_path, flags | {"swa_start": 0.5, "augment": "scale(0.5,2)+flip"})
    assert names_of(cells) == [
        f"alpha={a},algorithm={m},seed={s}"
        for a in ("0", "0.5")
        for m in ("fedavg", "fedasam")
        for s in (1, 2)
    ]
    assert {(c.config.rounds, c.config.augment) for c in cells} == {(20, "scale(0.5,2)+flip")}
    assert cells[-1].config.alpha == 0.5
    file = Sweep(grid={"seed": [0, 1], "alpha": [0.5, 1]})
    fewer = names_of(cells_of(file, tmp_path, {"seed": "4"}))
    assert fewer == ["seed=4,alpha=0.5", "seed=4,alpha=1"]
    assert names_of(cells_of(file, tmp_path, {"seed": "1..3", "alpha": "1"})) == [
        f"seed={seed},alpha=1" for seed in (1, 2, 3)
    ]


def test_a_dry_run_lists_cells_and_a_time_and_writes_nothing(tmp_path, capfd):
    words = ["--seed", "0..1", "--alpha", "0.5", "--clients", "20", "--clients-per-round", "5"]
    out = tmp_path / "out"
    assert main([*words, "--rounds", "20", "--device", "cpu", "--out", str(out), "--dry-run"]) == 0
    said = capfd.readouterr()
    lines = said.out.splitlines()
    assert lines[:2] == ["to run  seed=0", "to run  seed=1"]
    last = r"2 cells, 2 to run: about \d:\d\d:\d\d, 1 at a time, by 1 trials of 3 rounds"
    assert re.fullmatch(last, lines[2])
    assert said.err == ""
    assert not out.exists()


@pytest.mark.slow
def test_more_rounds_go_on_and_runs_of_no_cell_are_left_out(tmp_path, capsys, reports):
    out = tmp_path / "out"
    words = ["--clients", "20", "--clients-per-round", "5", "--device", "cpu", "--out", str(out)]
    assert main(["--seed", "0..1", "--rounds", "2", *words]) == 0
    assert main(["--seed", "1..2", "--rounds", "4", *words]) == 0
    said = capsys.readouterr().out
    assert "2 cells, 0 done before" in said
    assert re.search(r"1 runs in .*out are no cells of this grid: left out", said)
    lengths = {f.parent.name: f.read_bytes().count(b"\n") for f in out.glob("*/metrics.jsonl")}
    assert lengths == {"seed=0": 3, "seed=1": 5, "seed=2": 5}
    assert reports[-1] == ([out / "seed=1", out / "seed=2"], out / "report", None)
    alone = cells_of(
        Sweep(),
        tmp_path / "alone",
        {"seed": "1,2", "rounds": "4", "clients": "20"}
        | {"clients_per_round": "5", "device": "cpu"},
    )
    assert run_here(alone[:1]) == {}
    one, other = (folder / "seed=1" / "model.safetensors" for folder in (out, tmp_path / "alone"))
    assert one.read_bytes() == other.read_bytes()
    assert main(["--seed", "1..2", "--rounds", "3", *words]) == 2
    assert "was run with rounds 4, not 3; give another --out" in capsys.readouterr().err


def test_the_time_left_is_by_what_cells_took(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])
    pace = Pace()
    assert pace.left(100, 1) == ""
    pace.begin("a", 0)
    pace.begin("b", 40)
    clock[0] = 10.0
    assert pace.left(100, 2) == ""
    pace.reached("a", 5)
    pace.reached("b", 45)
    assert pace.left(90, 2) == "about 0:01:30 left"  # 2 s a round, two at a time
    pace.end("a", 15)
    assert pace.left(80, 1) == "about 0:01:20 left"  # 20 s for 20 rounds


@pytest.mark.parametrize(
    ("keys", "arguments", "message"),
    [
        ({"grid": {"alpa": [1]}}, [], "--alpa: no such key (did you mean 'alpha'?)"),
        ({"grid": {"alpha": [-1]}}, [], "--alpha"),
        ({"grid": {"alpha": 1}}, [], "grid.alpha: Input should be a valid list"),
        ({"set": {"rounds": 3}}, [], "no grid: name a sweep, or give a flag values"),
        ({"grid": {"seed": [0]}, "gird": 1}, [], "gird: Extra inputs are not permitted"),
        (
            {"grid": {"minimizer_options.start": [0.5]}},
            ["--minimizer-options", "{start: 0.2}"],
            "--minimizer-options: entries of it are keys of the grid",
        ),
        ({"grid": {"seed": [0]}}, ["--seed", "3..1"], "--seed 3..1: must be FIRST..LAST"),
        ({"grid": {"seed": [0]}}, ["--alpha", "0,x"], "--alpha x: input should be a valid number"),
        ({"grid": {"seed": [0]}}, ["--parallel", "0"], "--parallel 0: must be at least 1"),
        ({"grid": {"seed": [0]}}, ["--target", "40"], "--target 40: must lie in [0, 1]"),
        ({"grid": {"seed": [0]}}, ["--together", "0"], "--together 0: must be at least 1"),
        ({"grid": {"seed": [0]}}, ["--ray", "--engine", "ray"], "cells are Ray tasks themselves"),
        ({"grid": {"seed": [0]}}, ["--config", "digits"], "--config: no such flag"),
        (
            {"grid": {"seed": [0]}},
            ["--rouns", "1"],
            "(did you mean '--rounds'?)",
        ),
        ({"grid": {"seed": [0]}}, ["--paralel", "1"], "(did you mean '--parallel'?)"),
        (
            {"grid": {"seed": [0]}, "when": [{"if": {"seed": 1}, "set": {"rho": 0.1}}]},
            [],
            "when.0: no cell of the grid has {'seed': 1}",
        ),
    ],
)
def test_mistakes_are_one_line_and_start_nothing(tmp_path, capsys, keys, arguments, message):
    file = write(tmp_path / "s.yaml", **keys)
    assert main([file, "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_unknown_sweep_is_told_the_nearest(tmp_path):
    with pytest.raises(UsageError, match="did you mean 'heterogeneity'"):
        read("heterogenity")


@pytest.mark.slow
def test_a_slurm_array_is_a_grid_a_run_a_task(tmp_path):
    script = ROOT / "docs" / "deploy" / "slurm-array.sh"
    flags = ["--rounds", "2", "--clients", "20", "--clients-per-round", "5", "--quiet"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for task in (5, 5):  # requeued, it is left alone
        call = ["bash", str(script), str(tmp_path / "out"), *flags]
        task_env = os.environ | {"PATH": path, "SLURM_ARRAY_TASK_ID": str(task)}
        subprocess.run(call, check=True, env=task_env, cwd=ROOT)
    (folder,) = (tmp_path / "out").iterdir()
    assert folder.name == "alpha=0.05,seed=2"
    assert load(folder).config.seed == 2
    without = subprocess.run(
        ["bash", str(script), "out"], capture_output=True, text=True, env={"PATH": path}
    )
    assert without.returncode != 0
    assert "run this by sbatch" in without.stderr
