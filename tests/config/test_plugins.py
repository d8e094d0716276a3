"""What a class is constructed with: the user's options, facts, and what it asks of the run."""

import sys

import pytest
import torch

from fedsam.base.errors import UsageError
from fedsam.base.strategy import ServerMethod
from fedsam.config.plugins import build, find, imported
from fedsam.config.schema import resolve
from fedsam.simulate.build.data import load_dataset
from fedsam.simulate.build.method import new_method
from fedsam.simulate.build.model import new_model
from fedsam.simulate.build.strategy import new_strategy

MINE = """
from flwr.serverapp.strategy import FedAvg
from torch import nn
from fedsam.base import strategy as base
from fedsam.training.method import Correction, Minimizer

class Server(FedAvg):
    def __init__(self, momentum=0.9, **flower):
        super().__init__(**flower)
        self.momentum = momentum

class Client(Correction):
    def __init__(self, rho=3.0, rounds=7):
        self.rho, self.rounds = rho, rounds

    def correct(self, w, g, local):
        return g

class Descent(Minimizer):
    def __init__(self, eta, rho=3.0):
        self.eta, self.rho = eta, rho

    def step(self, w, grad, descend, local):
        return descend(w, grad(w)), {}

class Average(base.Average):
    def __init__(self, start, lr=5.0, cycle=3):
        self.start, self.lr, self.cycle = start, lr, cycle

    def rate(self, round, lr):
        return lr

    def collects(self, round):
        return round > self.start

    def average(self, average, n, w):
        return w

class Model(nn.Linear):
    def __init__(self, num_classes=1000, rho=2.0):
        super().__init__(64, num_classes)
        self.rho = rho

def rows(root=3):
    from fedsam.data.sources.embedded import digits
    assert root == 3, "a default of the user's function"
    return digits(None)
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine_plugins.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("mine_plugins", None)


@pytest.mark.usefixtures("mine")
def test_a_users_default_is_not_overwritten_by_the_runs_value():
    config = resolve({
        "strategy": "mine_plugins:Server", "client": "mine_plugins:Client",
        "minimizer": "mine_plugins:Descent", "momentum": 0.25, "rho": 0.5, "eta": 0.125,
    })  # fmt: skip
    assert new_strategy(config).strategy.momentum == 0.9
    method = new_method(config)
    assert (method.correction.rho, method.correction.rounds) == (3.0, 7)
    assert (method.minimizer.eta, method.minimizer.rho) == (0.125, 3.0)


@pytest.mark.usefixtures("mine")
def test_an_option_of_the_user_wins():
    config = resolve({"client": "mine_plugins:Client", "client_options": {"rho": 4.0}, "rho": 0.5})
    assert new_method(config).correction.rho == 4.0


@pytest.mark.usefixtures("mine")
def test_a_users_average_keeps_its_rate_and_cycle():
    config = resolve({"average": "mine_plugins:Average", "rounds": 8, "swa_lr": 0.5})
    rule = new_strategy(config).rule
    assert (rule.start, rule.lr, rule.cycle) == (6, 5.0, 3)


def test_ours_name_what_they_want_of_the_run():
    config = resolve({"swa": True, "swa_lr": 0.5, "swa_cycle": 4, "rounds": 8})
    rule = new_strategy(config).rule
    assert (rule.start, rule.lr, rule.cycle) == (6, 0.5, 4)
    nova = find("strategy", "fednova", "fedsam.strategies", ServerMethod)
    assert build("strategy", nova, {}, momentum=0.5).momentum == 0.5


@pytest.mark.usefixtures("mine")
def test_facts_of_the_data_stand_over_a_models_default():
    config = resolve({"model": "mine_plugins:Model", "rho": 0.5})
    model = new_model(config, load_dataset(config))
    assert (model.weight.shape, model.rho) == (torch.Size([10, 64]), 2.0)


@pytest.mark.usefixtures("mine")
def test_a_users_data_set_keeps_its_default():
    assert load_dataset(resolve({"dataset": "mine_plugins:rows"})).classes == 10


class Wanting:
    needs = ("rho",)

    def __init__(self, rho=3.0, eta=2.0, size=1):
        self.rho, self.eta, self.size = rho, eta, size


class Inheriting(Wanting):
    def __init__(self, extra, **rest):
        super().__init__(**rest)
        self.extra = extra


class Base:
    def __init__(self, rho, size=1):
        self.rho, self.size = rho, size


class Handing(Base):
    def __init__(self, **rest):
        super().__init__(**rest)


def test_a_class_names_what_it_needs_and_a_parent_is_handed_it():
    made = build("x", Inheriting, {"extra": 1}, rho=0.5, eta=0.25)
    assert (made.rho, made.eta, made.size) == (0.5, 2.0, 1)
    made = build("x", Handing, {}, {"size": 9}, rho=0.5)
    assert (made.rho, made.size) == (0.5, 9)
    assert build("x", Wanting, {"rho": 1.0}, {"rho": 2.0}, rho=0.5).rho == 1.0
    assert build("x", Wanting, {}, {"size": 2, "eta": 1.5}, rho=0.5).eta == 1.5


def test_what_a_run_does_not_have_is_said_in_one_line():
    class Odd:
        needs = ("mu",)

        def __init__(self, mu=1.0):
            self.mu = mu

    with pytest.raises(UsageError, match=r"--x-options: Odd needs mu: of a run it gets eta, rho"):
        build("x", Odd, {}, rho=0.5, eta=0.25)
    assert build("x", Odd, {"mu": 2.0}, rho=0.5).mu == 2.0


def test_a_module_that_imports_what_is_not_there_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "of_mine.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError) as refused:
        imported("model", "of_mine:Net", torch.nn.Module)
    said = "--model of_mine:Net: of_mine imports 'no_such_package', which is not installed"
    assert str(refused.value) == said


@pytest.mark.parametrize("name", ["EMNIST", "KMNIST", "ImageFolder"])
def test_a_class_of_torchvision_is_no_data_set(name):
    config = resolve({"dataset": f"torchvision.datasets:{name}"})
    with pytest.raises(UsageError, match="is a class; must be a function that returns a"):
        load_dataset(config)
