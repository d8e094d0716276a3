"""Flower's own strategies in a run: what they must not touch, and what is refused by name."""

import json
import math
from signal import SIGINT
from threading import Timer

import numpy as np
import pytest
import torch
from conftest import quick_config
from flwr.serverapp.strategy import FedAvg
from safetensors.torch import load_file
from torch import nn

from fedsam.base.errors import UsageError
from fedsam.base.system import Interrupted, Stop
from fedsam.config.schema import resolve
from fedsam.server.adapter import MethodStrategy
from fedsam.simulate.build.strategy import new_strategy
from fedsam.simulate.run import run

FLOWER = "flwr.serverapp.strategy"
NORMED = {"model": "tests.training.test_dry_pass:OverPixels", "rounds": 6, "eval_every": 3}


class InTheMiddle(nn.Sequential):
    """BatchNorm before the last layer: Flower's arrays have it between parameters."""

    def __init__(self, shape, classes):
        norm = nn.BatchNorm1d(8)
        super().__init__(nn.Flatten(), nn.Linear(math.prod(shape), 8), norm, nn.Linear(8, classes))


class Telling(FedAvg):
    """FedAvg that tells its clients something of its own."""

    def configure_train(self, server_round, arrays, config, grid):
        config["temperature"] = 0.5
        return super().configure_train(server_round, arrays, config, grid)


def tensors_of(outcome):
    return load_file(outcome.folder / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("FedAvgM", {"server_momentum": 0.9, "server_learning_rate": 0.5}),
        ("FedAdam", {"eta": 0.5}),
        ("FedYogi", {"eta": 0.5}),
        ("FedAdagrad", {"eta": 0.5}),
        ("QFedAvg", {"client_learning_rate": 0.1, "q": 0.1}),
    ],
)
def test_a_servers_optimiser_leaves_batch_norm_the_clients_mean(quick, name, options):
    # one round from the same model: the clients' statistics do not depend on the strategy
    keys = NORMED | {"rounds": 1, "eval_every": 1}
    mean = tensors_of(quick(**keys))
    mine = tensors_of(quick(**keys, strategy=f"{FLOWER}:{name}", strategy_options=options))
    for tensor in ("bn.running_mean", "bn.running_var"):
        assert torch.allclose(mine[tensor], mean[tensor], rtol=1e-6)
    assert mine["bn.num_batches_tracked"] == mean["bn.num_batches_tracked"]
    assert not torch.allclose(mine["fc1.weight"], mean["fc1.weight"], rtol=1e-6)
    more = tensors_of(
        quick(**NORMED, strategy=f"{FLOWER}:{name}", strategy_options=options, lr=0.01)
    )
    assert (more["bn.running_var"] > 0).all()


def test_a_robust_strategy_chooses_the_statistics_as_well(quick, monkeypatch):
    from fedsam.simulate.build import strategy

    keys = NORMED | {"rounds": 1, "eval_every": 1, "strategy": f"{FLOWER}:FedMedian"}
    own = tensors_of(quick(**keys))
    monkeypatch.setattr(strategy, "OWN_STATISTICS", MethodStrategy)
    assert not torch.equal(tensors_of(quick(**keys))["bn.running_var"], own["bn.running_var"])


@pytest.mark.parametrize("average", ["swa", "ema", "wima"])
def test_an_average_of_one_model_of_theirs_is_that_model(quick, average):
    options = {"swa": {}, "ema": {"decay": 0.0}, "wima": {"window": 1}}[average]
    keys = {
        "model": f"{__name__}:InTheMiddle",
        "rounds": 3,
        "eval_every": 3,
        "average": average,
        "average_options": options,
        "swa_cycle": 1,
    }
    done = quick(**keys, swa_start=2, strategy=f"{FLOWER}:FedMedian")
    trained = load_file(done.folder / "model-trained.safetensors")
    for name, tensor in tensors_of(done).items():
        assert torch.allclose(tensor, trained[name]), name


@pytest.mark.parametrize(
    ("strategy", "options", "said"),
    [
        (f"{FLOWER}:FedProx", {"proximal_mu": 100.0}, "needs clients with a proximal term"),
        (f"{FLOWER}:FedXgbBagging", {}, "grow trees with XGBoost"),
        (f"{FLOWER}:FedXgbCyclic", {}, "grow trees with XGBoost"),
        ("flwr.server.strategy:FedAvg", {}, "is of Flower's former API"),
        ("flwr.server.strategy:FedProx", {"proximal_mu": 1.0}, "is of Flower's former API"),
        ("fedavg", {"min_available_nodes": 50}, "min_available_nodes 50: a strategy sees"),
        ("fedavg", {"min_train_nodes": 6}, "min_train_nodes 6: a strategy sees"),
        (f"{FLOWER}:FedAdam", {"min_available_nodes": 6}, "min_available_nodes 6: a strategy"),
    ],
)
def test_what_can_never_be_is_one_line(strategy, options, said):
    config = resolve({"clients_per_round": 5, "strategy": strategy, "strategy_options": options})
    with pytest.raises(UsageError, match="--strategy") as refused:
        new_strategy(config)
    assert said in str(refused.value)


def test_clipping_by_the_clients_is_refused_by_name():
    config = resolve({"strategy": f"{__name__}:clipped_by_clients", "clients_per_round": 5})
    with pytest.raises(UsageError, match="needs clients that clip their updates themselves"):
        new_strategy(config)


def clipped_by_clients():
    from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping

    return DifferentialPrivacyClientSideFixedClipping(FedAvg(), 1.0, 1.0, 5)


def test_what_clients_do_not_read_is_said_once(quick, caplog):
    quick(strategy=f"{__name__}:Telling")
    said = [r.getMessage() for r in caplog.records if "do not read" in r.getMessage()]
    assert said == ["the strategy sends temperature, which fedsam's clients do not read"]


class Waiting(FedAvg):
    """FedAvg that raises its minimum behind everybody's back."""

    def configure_train(self, server_round, arrays, config, grid):
        self.min_available_nodes = 50
        return super().configure_train(server_round, arrays, config, grid)


def test_a_wait_for_nodes_ends_when_the_run_is_stopped(tmp_path):
    stop = Stop()
    timer = Timer(1.0, setattr, (stop, "signal", SIGINT))
    timer.start()
    with pytest.raises(Interrupted):
        run(quick_config(tmp_path / "run", strategy=f"{__name__}:Waiting"), stop=stop)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["ended"] == "interrupted"


def test_a_loss_that_is_not_finite_is_warned_of(quick, caplog):
    quick(model=f"{__name__}:infinite", rounds=2, eval_every=2, lr=1e-9)
    said = [r.getMessage() for r in caplog.records]
    assert "round 0: the test loss is not finite" in said


class Infinite(torch.nn.Linear):
    """A model that is finite only while it trains."""

    def forward(self, x):
        y = super().forward(x.flatten(1))
        return y if self.training else y * np.inf


def infinite(shape, classes):
    return Infinite(shape[1] * shape[2], classes)
