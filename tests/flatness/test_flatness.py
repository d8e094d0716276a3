"""The command: real runs, real files, what it writes, what it refuses; models kept along a run."""

import json
import math
import os
import shutil
import subprocess
import sys
from statistics import stdev

import pytest
import torch
from conftest import quick_config
from safetensors.torch import load_file

from fedsam.base.errors import UsageError
from fedsam.base.system import Interrupted
from fedsam.data.partition import Partition
from fedsam.flatness.__main__ import main, with_errors
from fedsam.flatness.measures.cohort_spread import cohort_of_run
from fedsam.flatness.registry import (
    MEASURES,
    mean_of_clients,
    options_of,
    ratios_of_means,
    take,
    unknown_of_clients,
    warnings_of_clients,
)
from fedsam.flatness.subject import subject_of_run
from fedsam.runs.files import models_by_round, models_of
from fedsam.simulate.resume import resumed
from fedsam.simulate.run import run

SMALL = ["--images", "64"]
ALONE = os.environ | {"OMP_NUM_THREADS": "1"}  # threads that wait for each other take long in CI


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run with an average and models kept along it."""
    folder = tmp_path_factory.mktemp("flat") / "run"
    keys = {"rounds": 6, "swa": True, "swa_start": 3, "swa_cycle": 1, "save_every": 2}
    return run(quick_config(folder, **keys)).folder


@pytest.fixture
def finished(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def results(folder):
    return json.loads((folder / "flatness.json").read_text())


def stops_after(number):
    def watch(line):
        if line["round"] == number:
            raise KeyboardInterrupt

    return watch


def test_models_along_a_run_are_those_that_were_evaluated(trained, tmp_path):
    assert models_by_round(trained) == {n: f"models/00000{n}" for n in (2, 4, 6)}
    files = {name: (trained / f"{name}.safetensors").read_bytes() for name in models_of(trained)}
    assert files["models/000006"] == files["model"]  # the average
    short = run(quick_config(tmp_path / "short", rounds=2)).folder
    first, second = (
        load_file(p)
        for p in (short / "model.safetensors", trained / "models" / "000002.safetensors")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)  # before it, the model
    assert not (short / "models").exists()


def test_an_interrupted_run_keeps_the_same_models_after_going_on(trained, tmp_path):
    cut = tmp_path / "cut"
    keys = {"rounds": 6, "swa": True, "swa_start": 3, "swa_cycle": 1, "save_every": 2}
    with pytest.raises(Interrupted):
        run(quick_config(cut, **keys), stops_after(5))
    assert main([str(cut), *SMALL, "--measure", "slope"]) == 0  # unfinished: measured as well
    config, snapshot = resumed(cut, {})
    run(config, snapshot=snapshot)
    names = models_of(trained)
    assert models_of(cut) == names
    for name in names:
        ours, theirs = (f / f"{name}.safetensors" for f in (cut, trained))
        assert ours.read_bytes() == theirs.read_bytes()


def test_the_command_as_a_user_runs_it(finished):
    before = {name: (finished / f"{name}.safetensors").read_bytes() for name in models_of(finished)}
    words = [str(finished), "--measure", "slope", "--measure", "hessian", "--measure", "density"]
    call = [sys.executable, "-m", "fedsam.flatness", *words, *SMALL, "--steps", "8"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=120, env=ALONE)
    assert done.returncode == 0, done.stderr
    for word in ("model: hessian", "lambda_1/lambda_5", "flatness.json, flatness-hessian.png"):
        assert word in done.stdout
    found = results(finished)["model"]
    assert set(found) == {"slope", "hessian", "density"}
    for ending in ("png", "pdf"):
        assert (finished / f"flatness-hessian.{ending}").stat().st_size > 3000
        assert (finished / f"flatness-density.{ending}").stat().st_size > 3000
    after = {name: (finished / f"{name}.safetensors").read_bytes() for name in models_of(finished)}
    assert after == before
    top = found["hessian"]["scalars"]["lambda_1"]
    again = take(subject_of_run(finished), "hessian", {"images": 64})["scalars"]["lambda_1"]
    assert again == pytest.approx(top, rel=1e-5)  # other numbers of threads round otherwise


def test_what_was_measured_before_is_kept(finished):
    assert main([str(finished), *SMALL, "--measure", "slope", "--measure", "trace"]) == 0
    first = results(finished)
    more = ["--model", "model-trained", "--measure", "slope", "--on", "test", "--images", "0"]
    assert main([str(finished), *more]) == 0
    assert main([str(finished), "--measure", "trace", "--probes", "3", *SMALL]) == 0
    now = results(finished)
    assert now["model"]["slope"] == first["model"]["slope"]
    assert now["model"]["trace"]["settings"]["probes"] == 3
    summary = json.loads((finished / "summary.json").read_text())
    on_test = now["model-trained"]["slope@test"]["scalars"]["accuracy"]
    assert on_test != summary["last_accuracy"]  # that is the average's
    assert main([str(finished), "--measure", "slope", "--on", "test", "--images", "0"]) == 0
    of_average = results(finished)["model"]["slope@test"]["scalars"]["accuracy"]
    assert of_average == pytest.approx(summary["last_accuracy"])


def test_along_a_run_scalars_are_drawn_over_rounds(finished):
    assert main([str(finished), "--along", "--measure", "sharpness", *SMALL]) == 0
    assert sorted(results(finished)) == ["models/000002", "models/000004", "models/000006"]
    assert (finished / "flatness-along-sharpness.png").stat().st_size > 3000


def test_the_mean_over_clients_is_the_mean_of_each(finished):
    subject = subject_of_run(finished)
    found = take(subject, "slope", {"on": "clients", "images": 0})
    each = [take(subject, "slope", {"on": f"client:{k}", "images": 0}) for k in range(20)]
    expected = sum(one["scalars"]["loss"] for one in each) / 20
    assert found["scalars"]["loss"] == pytest.approx(expected)
    assert len(found["clients"]) == 20
    assert len(take(subject, "slope", {"on": "clients:3"})["clients"]) == 3


def test_beside_a_mean_of_ratios_stands_the_ratio_of_means():
    scalars = {"a": 6.0, "b": 2.0, "a/b": 26.5, "c": math.nan}
    assert ratios_of_means(scalars) == {"a/b of means": 3.0}
    each = [{"a/b": 1.0}, {"a/b": math.nan}, {"a/b": 4.0}]
    assert mean_of_clients(each) == {"a/b": 2.5}
    assert unknown_of_clients(each) == ["a/b is known of 2 of 3 clients"]
    results = {3: {"warnings": []}, 5: {"warnings": ["late", "x"]}, 7: {"warnings": ["early"]}}
    said = "a warning of 2 of 3 clients; of client 5: late"
    assert warnings_of_clients(results) == [said]
    assert warnings_of_clients({3: {}}) == []


def test_a_sample_of_the_clients_has_its_error(finished):
    subject = subject_of_run(finished)
    some = take(subject, "slope", {"on": "clients:5", "images": 0})
    values = [one["loss"] for one in some["clients"].values()]
    expected = stdev(values) / math.sqrt(5) * math.sqrt(1 - 5 / 20)
    assert some["errors"]["clients"]["loss"] == pytest.approx(expected)
    every = take(subject, "slope", {"on": "clients", "images": 0})
    assert every["errors"]["clients"]["loss"] == 0


def test_errors_stand_beside_their_numbers():
    result = {
        "scalars": {"a": 9.25123, "b": math.nan, "c": 0.5},
        "errors": {"images": {"a": 1.234, "c": 0.0}, "residual": {"a": 0.0001, "b": None}},
    }
    assert with_errors(result, "a") == "9.2512 ± 1.2 (images) ± 0.0001 (residual)"
    assert with_errors(result, "b") == "none"
    assert with_errors(result, "c") == "0.5"


def test_a_plane_of_three_models_of_two_runs_and_the_lines_between_them(finished, tmp_path):
    other = run(quick_config(tmp_path / "other", rounds=2, algorithm="fedasam")).folder
    small = ["--images", "32", "--points", "3", "--model", "model"]
    both = [str(finished), str(other)]
    assert main([*both, *small, "--measure", "connectivity"]) == 0
    (pair,) = results(finished)["between"]["connectivity"]["pairs"]
    assert pair["models"] == ["fedavg + swa", "fedasam"]
    assert not (other / "flatness.json").exists()
    trained = shutil.copytree(finished, tmp_path / "third")
    assert main([*both, str(trained), *small, "--measure", "plane"]) == 2  # two are the same
    (trained / "model-trained.safetensors").replace(trained / "model.safetensors")
    assert main([*both, str(trained), *small, "--measure", "plane"]) == 0
    third = str(finished / "model-trained.safetensors")
    assert main([*both, third, "--images", "16", "--points", "3", "--measure", "connectivity"]) == 0
    pairs = [pair["models"] for pair in results(finished)["between"]["connectivity"]["pairs"]]
    assert pairs[1] == ["fedavg + swa", "fedavg"]
    names = [model["name"] for model in results(finished)["between"]["plane"]["models"]]
    assert names == ["fedavg + swa (run)", "fedasam", "fedavg + swa (third)", "mean"]
    assert (finished / "flatness-between-plane.png").stat().st_size > 3000


def test_the_clients_of_the_next_round_are_those_that_a_longer_run_trains(trained, tmp_path):
    """Their average is that run's next model, to rounding."""
    assert main([str(trained), "--measure", "cohort", "--images", "16", "--points", "3"]) == 0
    assert results(trained)["model"]["cohort"]["scalars"]["update_norm"] > 0
    folder = run(quick_config(tmp_path / "long", rounds=3, save_every=1)).folder
    cohort = cohort_of_run(folder, "models/000002")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert cohort.clients == lines[3]["clients"]
    expected = subject_of_run(folder, "models/000003").state
    torch.testing.assert_close(cohort.average, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in MEASURES if name != "corruptions"])
def test_every_measure_keeps_the_contract(trained, name):
    subject = subject_of_run(trained)
    before = subject.state.clone()
    few = {"images": 16, "batch": 8, "steps": 4, "probes": 2, "eigenvalues": 2}
    few |= {"points": 3, "directions": 2, "draws": 2}
    first, second = take(subject, name, few), take(subject, name, few)
    assert first == second == json.loads(json.dumps(first))
    assert all(isinstance(value, int | float) for value in first["scalars"].values())
    for by_scalar in first.get("errors", {}).values():
        assert set(by_scalar) <= set(first["scalars"])
        assert all(error >= 0 for error in by_scalar.values())
    if "images" in options_of(name):  # 16 of many: all that is of the images has their error
        of_images = first["errors"]["images"]
        assert len(of_images) >= len(first["scalars"]) / 2
        assert any(error > 0 for error in of_images.values())
    if "images" in options_of(name):
        assert first["settings"]["images"] in (16, {"train": 16, "test": 16})
    assert torch.equal(subject.state, before)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--measure", "plane"], "a plane goes through 3 models, got 1"),
        (["--measure", "corruptions"], "corruptions: the published parameters are for 32 x 32"),
        (["--measure", "hesian"], "no 'hesian' (did you mean 'hessian'?)"),
        (["--imagse", "3"], "--imagse: no such flag (did you mean '--images'?)"),
        (["--measure", "slope", "--rho", "1"], "--rho: belongs to sharpness"),
        (["--model", "modle"], "no model 'modle' (did you mean 'model'?)"),
        (["--along", "--model", "model"], "--along: stands without --model"),
        (["--on", "client:20"], "the run has clients 0 to 19"),
        (["--on", "clients:21"], "the run has 20 clients"),
        (["--device", "abacus"], "--device abacus"),
    ],
)
def test_what_is_wrong_is_named(trained, capsys, words, said):
    assert main([str(trained), *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_damaged_and_missing_files_are_named(finished, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    cases = {
        "no run with a model": tmp_path / "empty",
        "no model's file (.safetensors) in a run's folder": finished / "metrics.jsonl",
        "flatness.json: damaged": finished,
    }
    (finished / "flatness.json").write_text("{")
    for said, folder in cases.items():
        assert main([str(folder), "--measure", "slope"]) == 2
        assert said in capsys.readouterr().err
    (finished / "flatness.json").unlink()
    for path in finished.glob("models/*"):
        path.unlink()
    assert main([str(finished), "--along"]) == 2
    assert "--save-every" in capsys.readouterr().err
    (finished / "model.safetensors").write_bytes(b"no")
    assert main([str(finished)]) == 2
    assert "model.safetensors: cannot be read" in capsys.readouterr().err


def test_a_run_is_measured_on_its_own_split_however_it_was_made(quick):
    first = quick(rounds=1).folder
    second = quick(rounds=1, seed=9, partition=first).folder
    splits = [Partition.load(folder / "partition.npz") for folder in (first, second)]
    assert splits[0].same_as(splits[1])
    (first / "partition.npz").unlink()  # what the split came from
    assert subject_of_run(second).partition.same_as(splits[1])
    with pytest.raises(UsageError, match=r"partition.npz: neither a run's partition.npz nor JSON"):
        subject_of_run(first)
