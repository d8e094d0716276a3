"""Several runs in one program end where each of them would have ended alone."""

import json

import pytest
import torch
from safetensors.torch import load_file

from fedsam.base.errors import TrainingError, UsageError
from fedsam.engines.batched import BatchedPrograms
from fedsam.models.digits_cnn import DigitsCNN
from fedsam.simulate.joint import run_together
from fedsam.simulate.run import run
from tests.conftest import quick_config

RUNS = [
    {"seed": 1},
    {"seed": 2, "alpha": 0.1, "rho": 0.5, "rounds": 3},
    {"rho": 0.01, "lr": 0.05, "momentum": 0.5, "clients_per_round": 3, "strategy_options": "{}"},
    {"swa": True, "swa_start": 2, "weight_decay": 0.0, "partition": "quantity"},
    {"strategy": "flwr.serverapp.strategy:FedAdam", "target_accuracy": 0.01},  # stops at once
]


class DoubleCNN(DigitsCNN):
    """In float64, in which rounding is nothing beside a difference."""

    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.double()


AXES = {
    "model": "tests.simulate.test_joint:DoubleCNN",
    "algorithm": "fedasam",
    "batch_size": 16,
    "local_epochs": 2,
}


def configs_in(folder, **more):
    return [quick_config(folder / str(n), **AXES, **given, **more) for n, given in enumerate(RUNS)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return [run(config) for config in configs_in(tmp_path_factory.mktemp("alone"), cohort="off")]


@pytest.mark.slow
@pytest.mark.xdist_group("joint")  # which are alone but once
@pytest.mark.parametrize("cohort", ["off", "slots", "vmap"])
def test_each_run_is_what_it_is_alone(tmp_path, alone, cohort):
    together = run_together(configs_in(tmp_path / "together", cohort=cohort))
    for mine, theirs in zip(together, alone, strict=True):
        first, second = (load_file(o.folder / "model.safetensors") for o in (mine, theirs))
        for name, tensor in first.items():
            if cohort == "off":
                assert torch.equal(tensor, second[name])
            torch.testing.assert_close(tensor, second[name], rtol=1e-5, atol=1e-9)
        lines = [
            [json.loads(line) for line in (o.folder / "metrics.jsonl").read_text().splitlines()]
            for o in (mine, theirs)
        ]
        assert [line.get("clients") for line in lines[0]] == [
            line.get("clients") for line in lines[1]
        ]
        assert mine.summary["ended"] == theirs.summary["ended"]


def test_one_run_that_fails_does_not_stop_the_others(tmp_path):
    good, bad = quick_config(tmp_path / "good"), quick_config(tmp_path / "bad", lr=1e30)
    with pytest.raises(TrainingError, match="no client returned a usable update"):
        run_together([bad, good])
    assert json.loads((tmp_path / "good" / "summary.json").read_text())["rounds"] == 4
    assert (tmp_path / "bad" / "summary.json").exists()


def test_an_error_of_the_program_ends_all_runs(tmp_path, monkeypatch):
    """Nobody waits for ever for a round that is not coming."""

    def broken(programs, groups):
        raise ZeroDivisionError

    monkeypatch.setattr(BatchedPrograms, "train", broken)
    configs = [quick_config(tmp_path / str(n)) for n in range(3)]
    with pytest.raises(ZeroDivisionError):
        run_together(configs)
    endings = [json.loads((tmp_path / str(n) / "summary.json").read_text()) for n in range(3)]
    assert {summary["ended"] for summary in endings} == {"stopped with the runs beside it"}


@pytest.mark.parametrize(("key", "other"), [("batch_size", 16), ("minimizer", "sam")])
def test_runs_that_do_not_go_together_are_refused(tmp_path, key, other):
    configs = [quick_config(tmp_path / "a"), quick_config(tmp_path / "b", **{key: other})]
    with pytest.raises(UsageError, match=f"--{key.replace('_', '-')} {other}: run 1 differs"):
        run_together(configs)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cohort", ["slots", "off"])
def test_methods_that_differ_in_more_than_numbers_need_no_batching(tmp_path, cohort):
    configs = [
        quick_config(
            tmp_path / str(k),
            algorithm="lookbehind",
            minimizer_options={"k": k, "slow": 0.5},
            cohort=cohort,
        )
        for k in (2, 3)
    ]
    if cohort == "off":
        assert len(run_together(configs)) == 2
        return
    with pytest.raises(UsageError, match=r"in one program: Lookbehind has k \[2, 3\]; only real"):
        run_together(configs)
    assert not list(tmp_path.iterdir())


def test_ray_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--engine: runs in one program need the local engine"):
        run_together([quick_config(tmp_path / "a", engine="ray")])
