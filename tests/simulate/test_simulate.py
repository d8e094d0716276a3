"""The command, as a process where that matters: what it prints, what it leaves, how it says no."""

import json
import re

import numpy as np
import pytest
import torch
import yaml
from conftest import command
from safetensors import safe_open

from fedsam.cli import COMMON
from fedsam.config.schema import Config, resolve
from fedsam.data.partition import heterogeneity
from fedsam.simulate.__main__ import main

QUICK = ["--rounds", "6", "--clients", "20", "--clients-per-round", "5", "--eval-every", "2"]


def test_a_run_leaves_every_file_and_says_where(tmp_path):
    out = tmp_path / "[red]" / ("longer than a terminal is wide " * 3).strip()
    done = command(*QUICK, "--alpha", "0.5", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert str(out) in done.stdout
    assert "fedavg" in done.stdout
    names = {path.name for path in out.iterdir()}
    assert names == {
        ".lock",
        "config.yaml",
        "curves.png",
        "metrics.jsonl",
        "model.safetensors",
        "partition.npz",
        "checkpoints",
        "partition.png",
        "summary.json",
    }
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2, 3, 4, 5, 6]
    assert [line["round"] for line in lines if "accuracy" in line] == [0, 2, 4, 6]
    assert all(len(line["clients"]) == 5 and line["seconds"] > 0 for line in lines[1:])
    assert all(line["train_loss"] > 0 for line in lines[1:])
    summary = json.loads((out / "summary.json").read_text())
    accuracies = [line["accuracy"] for line in lines if "accuracy" in line and line["round"]]
    assert summary["final_accuracy"] == pytest.approx(np.mean(accuracies), abs=1e-12)
    assert summary["rounds"] == 6
    assert summary["parameters"] == 18_510
    assert set(summary["versions"]) >= {"python", "torch", "flwr", "fedsam", "numpy"}
    with safe_open(out / "model.safetensors", "pt") as model:
        assert set(model.keys()) == {
            f"{layer}.{kind}"
            for layer in ("conv1", "conv2", "fc1", "fc2")
            for kind in ("weight", "bias")
        }
        assert model.get_slice("conv1.weight").get_shape() == [16, 1, 3, 3]
    with np.load(out / "partition.npz", allow_pickle=False) as partition:
        assert sorted(partition["indices"]) == list(range(len(partition["indices"])))
        assert partition["counts"].sum() == len(partition["indices"])
        assert partition["counts"].sum(1).tolist() == np.diff(partition["offsets"]).tolist()
        assert summary["split"] == heterogeneity(torch.from_numpy(partition["counts"]))
    for picture in ("curves.png", "partition.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


def test_a_saved_config_repeats_the_run_to_the_byte(tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    words = [
        "--algorithm",
        "fedasam",
        "--rho",
        "0.3",
        "--swa",
        "--swa-start",
        "2",
        "--swa-cycle",
        "2",
    ]
    assert main([*QUICK, *words, "--out", str(first)]) == 0
    assert main(["--config", str(first / "config.yaml"), "--out", str(again)]) == 0
    for name in ("model.safetensors", "model-trained.safetensors", "config.yaml"):
        assert (first / name).read_bytes() == (again / name).read_bytes()


def said_by(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main([*words])
    assert ended.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_explains_what_is_usual_and_names_the_rest(capsys):
    flat = said_by(capsys, "--help")
    for name in Config.model_fields:
        assert re.search(rf"--{name.replace('_', '-')}[ ,]", flat)
    assert flat.count("(default: ") == len(COMMON)
    assert flat.endswith("--help-all explains these, too.")


def test_help_all_shows_every_flag_with_default_and_meaning(capsys):
    flat = said_by(capsys, "--help-all")
    for name, field in Config.model_fields.items():
        assert f"--{name.replace('_', '-')}" in flat
        assert field.description
    assert flat.count("(default: ") == len(Config.model_fields)


def test_print_config_prints_what_a_run_would_hold(capsys, tmp_path):
    words = ["--algorithm=fedasam", "--rho=0.7", "--swa", "--rounds=12"]
    assert main([*words, "--print-config"]) == 0
    said = capsys.readouterr().out
    (tmp_path / "all.yaml").write_text(said)
    assert resolve({}, tmp_path / "all.yaml") == resolve(
        {"algorithm": "fedasam", "rho": 0.7, "swa": True, "rounds": 12}
    )
    assert list(yaml.safe_load(said)) == list(Config.model_fields)
    assert main(["--config=digits", "--config=paper/cifar10", "--print-config"]) == 0
    assert [page["dataset"] for page in yaml.safe_load_all(capsys.readouterr().out)] == [
        "digits",
        "cifar10",
    ]


WRONG = {
    "--alhpa 1": r"--alhpa: no such flag \(did you mean '--alpha'\?\)",
    "--alpha": r"--alpha: expected one argument",
    "--alpha -1": r"--alpha -1: .*greater than or equal to 0",
    "--clients-per-round 101": r"--clients-per-round 101: at most --clients 100",
    "--clients 2000 --clients-per-round 5": r"--clients 2000: .*1442 training images",
    "--swa --swa-start 1500": r"--swa-start 1500",
    "--rho -1 --algorithm fedsam": r"--rho -1",
    "--dataset digit": r"--dataset: no 'digit' \(did you mean 'digits'\?\)",
    "--model cnnn": r"--model: no 'cnnn' \(did you mean 'cnn'\?\)",
    "--model cnn": r"--model: CNN: the cnn needs images of 16 x 16 pixels or more",
    '--client fedprox --client-options {"mu":"x"}': r"--client-options: FedProx: ",
    '--partition csv --partition-options {"path":"nowhere.csv"}': r"nowhere.csv: cannot be read",
    "--partition csv": r"--partition-options: csv needs path",
    '--average ema --average-options {"decay":2}': r"--average-options: EMA: decay: must lie",
    "--task nowhere": r"--task: no 'nowhere'",
    "--dataset nowhere:make": r"--dataset nowhere:make: there is no module",
    "--swa --average ema": r"--swa is --average swa",
    "--minimizer sma": r"--minimizer: no 'sma' \(did you mean 'sam'\?\)",
    "--client fedprx": r"--client: no 'fedprx' \(did you mean 'fedprox'\?\)",
    "--strategy fedavgg": r"--strategy: no 'fedavgg' \(did you mean 'fedavg'\?\)",
    "--average swaa": r"--average: no 'swaa' \(did you mean 'swa'\?\)",
    "--partition dirichlt": r"--partition: no 'dirichlt' \(did you mean 'dirichlet'\?\)",
    "--algorithm fedsamm": r"--algorithm: no 'fedsamm' \(did you mean 'fedsam'\?\)",
    "--minimizer nowhere:SAM": r"--minimizer nowhere:SAM: there is no module 'nowhere'",
    "--minimizer torch:SAM": r"--minimizer torch:SAM: torch has no 'SAM'",
    "--minimizer math:SAM": r"--minimizer math:SAM: math is Python's own, or a program; must deri",
    "--minimizer lookbehind --minimizer-options {kk:1}": r"--minimizer-options",
    '--client fedprox --client-options {"mu":-1}': r"--client-options: FedProx: mu: must be at ",
    "--device cuda:99": r"--device cuda:99",
    "--device tpu": r"--device tpu: must be auto, cpu, cuda or cuda:N",
    "--config nowhere.yaml": r"--config nowhere.yaml: no such file",
    "--cutout 9": r"--cutout 9: the images' side is 8 pixels",
    "--alpha 0 --clients 5 --clients-per-round 2": r"--clients",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_mistake_ends_in_one_line_and_exit_code_2(tmp_path, monkeypatch, capfd, words):
    monkeypatch.chdir(tmp_path)
    code = main([*words.split(), "--out", "run"])
    out, err = capfd.readouterr()
    assert code == 2
    assert re.fullmatch(r"((run|clients|model|data) +[^\n]+\n)*", out)  # what it is about to do
    assert re.fullmatch(r"fedsam: error: [^\n]+\n", err), err
    assert re.search(WRONG[words], err), err
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_is_the_exit_code_of_the_process(tmp_path):
    done = command("--algorithm", "fedsamm", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"fedsam: error: [^\n]+\n", done.stderr)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_touched(tmp_path, capfd):
    (tmp_path / "note").write_text("mine")
    assert main([*QUICK, "--out", str(tmp_path)]) == 2
    assert "exists already" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


def test_missing_data_says_what_to_put_where(tmp_path, capfd):
    words = ["--dataset", "cifar10", "--data-root", str(tmp_path), "--out", str(tmp_path / "run")]
    assert main(words) == 2
    said = capfd.readouterr().err
    assert re.fullmatch(r"fedsam: error: [^\n]*--data-root[^\n]*\n", said), said
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_exits_1_and_keeps_the_last_good_model(tmp_path, capfd):
    out = tmp_path / "run"
    assert main([*QUICK, "--rounds", "50", "--lr", "1e30", "--out", str(out)]) == 1
    said = capfd.readouterr().err
    assert "left out: its update is not finite" in " ".join(said.split())
    assert "training stopped: round" in said
    with safe_open(out / "model.safetensors", "np") as model:
        assert all(np.isfinite(model.get_tensor(name)).all() for name in model.keys())  # noqa: SIM118
    ended = json.loads((out / "summary.json").read_text())["ended"]
    assert "no client returned a usable update, in 3 attempts" in ended
    assert "smaller --lr or --rho may help" in ended


def test_config_yaml_holds_every_key(quick):
    text = (quick().folder / "config.yaml").read_text()
    assert set(yaml.safe_load(text)) == set(Config.model_fields)
