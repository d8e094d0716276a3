"""A plug-in that raises: its own traceback is shown, and the run is kept or was never there."""

import json

import pytest
from conftest import quick_config
from flwr.serverapp.strategy import FedAvg

from fedsam.simulate.resume import resumed
from fedsam.simulate.run import run
from fedsam.tasks.classification import Classification

HERE = "test_plug_ins_that_raise"


class Raising(FedAvg):
    """FedAvg that fails in its third round."""

    broken = True

    def aggregate_train(self, server_round, replies):
        if server_round == 3 and self.broken:
            raise ZeroDivisionError("a mistake of mine")
        return super().aggregate_train(server_round, replies)


class Metrics(Classification):
    """A task whose metrics fail from an evaluation on."""

    after = 0

    def metrics(self, total):
        if Metrics.after == 0:
            raise KeyError("no such metric")
        Metrics.after -= 1
        return super().metrics(total)


def model_of(outcome):
    return (outcome.folder / "model.safetensors").read_bytes()


@pytest.fixture(autouse=True)
def again(monkeypatch):
    monkeypatch.setattr(Metrics, "after", 0)
    monkeypatch.setattr(Raising, "broken", True)


def test_a_strategy_that_raises_leaves_what_can_be_gone_on_with(tmp_path, monkeypatch):
    keys = {"strategy": f"{HERE}:Raising", "rounds": 5}
    with pytest.raises(ZeroDivisionError, match="a mistake of mine"):
        run(quick_config(tmp_path / "cut", **keys))
    summary = json.loads((tmp_path / "cut" / "summary.json").read_text())
    assert (summary["ended"], summary["finished"], summary["rounds"]) == (
        "ZeroDivisionError: a mistake of mine",
        False,
        2,
    )
    monkeypatch.setattr(Raising, "broken", False)
    config, snapshot = resumed(tmp_path / "cut", {})
    assert snapshot.round == 2
    gone_on = run(config, snapshot=snapshot)
    assert model_of(gone_on) == model_of(run(quick_config(tmp_path / "whole", **keys)))


def test_an_evaluation_that_raises_does_so_too(tmp_path, monkeypatch):
    monkeypatch.setattr(Metrics, "after", 2)  # rounds 0 and 2
    with pytest.raises(KeyError, match="no such metric"):
        run(quick_config(tmp_path / "cut", task=f"{HERE}:Metrics"))
    _, snapshot = resumed(tmp_path / "cut", {})
    assert snapshot.round == 3


def test_one_that_raises_before_round_0_is_written_leaves_no_folder(tmp_path, monkeypatch):
    config = quick_config(tmp_path / "run", task=f"{HERE}:Metrics")
    with pytest.raises(KeyError, match="no such metric"):
        run(config)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(Metrics, "after", 9)
    assert run(config).summary["finished"]
