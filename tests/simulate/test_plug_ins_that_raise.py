"""A plug-in that raises: its own traceback is shown, and the run is kept or was never there."""

import json

import pytest
from conftest import quick_config
from fedsam.clients.minimizers.sgd import SGD
from flwr.serverapp.strategy import FedAvg

from fedsam.base.errors import TrainingError
from fedsam.runs.folder import RunDir
from fedsam.simulate.resume import resumed
from fedsam.simulate.run import RunLoop, run
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


class Mistaken(SGD):
    """A minimizer with a mistake in it; ``after`` rounds go well."""

    after = 0

    def step(self, w, grad, descend, local):
        if local.round > self.after:
            return descend(w, nothing_of_this_name(w)), {}  # noqa: F821
        return super().step(w, grad, descend, local)


class MistakenLater(Mistaken):
    """The same, after a round."""

    after = 1


def test_a_mistake_in_a_clients_code_ends_the_run_with_its_own_traceback(tmp_path, caplog):
    with pytest.raises(NameError, match="nothing_of_this_name") as raised:
        run(quick_config(tmp_path / "run", minimizer=f"{HERE}:Mistaken"))
    assert raised.traceback[-1].name == "step"
    assert "failed" not in caplog.text  # nor was it tried thrice
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["finished"], summary["rounds"]) == (False, 0)
    assert summary["ended"].startswith("NameError: name 'nothing_of_this_name'")


def test_once_a_client_has_trained_a_mistake_costs_clients(tmp_path, caplog):
    with pytest.raises(TrainingError, match="no client returned a usable update, in 3 attempts"):
        run(quick_config(tmp_path / "run", minimizer=f"{HERE}:MistakenLater"))
    assert caplog.text.count("failed: NameError: name 'nothing_of_this_name'") == 15
    keys = {"minimizer": f"{HERE}:MistakenLater", "debug": True, "threads": 2}
    with pytest.raises(NameError, match="nothing_of_this_name"):
        run(quick_config(tmp_path / "debug", **keys))


def test_one_client_of_many_that_raises_lets_others_try(tmp_path, caplog):
    keys = {"minimizer": f"{HERE}:Mistaken", "clients_per_round": 1}
    with pytest.raises(TrainingError, match="no client returned a usable update, in 3 attempts"):
        run(quick_config(tmp_path / "one", **keys))
    assert caplog.text.count("failed: NameError") == 3
    with pytest.raises(NameError, match="nothing_of_this_name"):
        run(quick_config(tmp_path / "central", algorithm="central", minimizer=keys["minimizer"]))


MINE = """
from fedsam.training.method import Minimizer

class Mistaken(Minimizer):
    def step(self, w, grad, descend, local):
        return descend(w, nothing_of_this_name(w)), {}
"""


def test_a_mistake_on_ray_is_one_line_at_once(tmp_path, shared_ray, monkeypatch):
    (tmp_path / "mistaken.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    keys = {"minimizer": "mistaken:Mistaken", "engine": "ray", "ray_address": shared_ray}
    config = quick_config(tmp_path / "run", **keys)
    with pytest.raises(TrainingError, match=r"a client failed: NameError: name 'nothing_of_this"):
        run(config)


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
    monkeypatch.setattr(Metrics, "after", 3)  # the pass beforehand, rounds 0 and 2
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


class Exiting(Raising):
    """One that ends Python in its third round."""

    def aggregate_train(self, server_round, replies):
        if server_round == 3 and self.broken:
            raise SystemExit(0)
        return super().aggregate_train(min(server_round, 2), replies)


class Tracking:
    """A tracker that fails where it is told to."""

    at = ""

    def start(self, config, folder, lines):
        self.fail("start")

    def log(self, line):
        if line["round"] == 3:
            self.fail("log")

    def finish(self, summary, error):
        self.fail("finish")

    def fail(self, place):
        if Tracking.at == place:
            raise ZeroDivisionError(f"in {place}")


def test_one_that_ends_python_leaves_what_can_be_gone_on_with(tmp_path, monkeypatch):
    keys = {"strategy": f"{HERE}:Exiting", "rounds": 5}
    with pytest.raises(RuntimeError, match="a plug-in asked Python to exit") as raised:
        run(quick_config(tmp_path / "cut", **keys))
    assert isinstance(raised.value.__cause__, SystemExit)
    assert not json.loads((tmp_path / "cut" / "summary.json").read_text())["finished"]
    assert resumed(tmp_path / "cut", {})[1].round == 2


def test_a_tracker_that_raises_at_a_line_costs_that_round(tmp_path, monkeypatch):
    monkeypatch.setattr(Tracking, "at", "log")
    keys = {"track": f"{HERE}:Tracking"}
    with pytest.raises(ZeroDivisionError, match="in log"):
        run(quick_config(tmp_path / "cut", **keys))
    summary = json.loads((tmp_path / "cut" / "summary.json").read_text())
    assert (summary["finished"], summary["ended"]) == (False, "ZeroDivisionError: in log")
    monkeypatch.setattr(Tracking, "at", "")
    config, snapshot = resumed(tmp_path / "cut", {})
    assert snapshot.round == 2
    assert model_of(run(config, snapshot=snapshot)) == model_of(
        run(quick_config(tmp_path / "whole"))
    )


def test_a_tracker_that_raises_at_the_end_leaves_a_finished_run(tmp_path, monkeypatch):
    monkeypatch.setattr(Tracking, "at", "finish")
    with pytest.raises(ZeroDivisionError, match="in finish"):
        run(quick_config(tmp_path / "run", track=f"{HERE}:Tracking"))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["finished"]


def test_a_tracker_that_cannot_start_again_leaves_the_checkpoint(tmp_path, monkeypatch):
    keys = {"track": f"{HERE}:Tracking"}
    run(quick_config(tmp_path / "run", **keys))
    config, snapshot = resumed(tmp_path / "run", {"rounds": 5})
    monkeypatch.setattr(Tracking, "at", "start")
    with pytest.raises(ZeroDivisionError, match="in start"):
        run(config, snapshot=snapshot)
    monkeypatch.setattr(Tracking, "at", "")
    assert run(config, snapshot=resumed(tmp_path / "run", {})[1]).summary["rounds"] == 5


def test_what_fails_while_a_run_is_kept_does_not_hide_why_it_ended(tmp_path, monkeypatch, caplog):
    """The strategy raises; then so does the model that would be evaluated."""

    def evaluated(self):
        if self.done == 2:
            raise KeyError("the average, too")
        return self.arrays

    monkeypatch.setattr(RunLoop, "_evaluated", evaluated)
    keys = {"strategy": f"{HERE}:Raising", "rounds": 5, "eval_every": 5}
    with pytest.raises(ZeroDivisionError, match="a mistake of mine"):
        run(quick_config(tmp_path / "cut", **keys))
    assert "the trained model stands for the one evaluated: 'the average, too'" in caplog.text
    assert (tmp_path / "cut" / "summary.json").exists()

    def save(self, snapshot):
        if snapshot.round:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunDir, "save", save)
    with pytest.raises(ZeroDivisionError, match="a mistake of mine"):
        run(quick_config(tmp_path / "full", **keys))
    assert "full: could not be kept whole: " in caplog.text
    assert "No space left on device" in caplog.text
