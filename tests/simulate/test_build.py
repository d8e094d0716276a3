"""What a strategy is made of: the run's values, the user's options, and nobody's defaults."""

import pytest
from conftest import quick_config
from fedsam.strategies.fednova import FedNova
from flwr.serverapp.strategy import FedAdam, FedAvg

from fedsam.base.errors import UsageError
from fedsam.base.strategy import ServerMethod
from fedsam.server.adapter import MethodStrategy
from fedsam.simulate.build.strategy import new_strategy

HERE = "test_build"


class HandsOn(FedAvg):
    """A user's strategy that hands keywords on to Flower's."""

    def __init__(self, mine=3, **flower):
        super().__init__(**flower)
        self.mine = mine


class TakesNothing(FedAvg):
    """A user's strategy that says itself whom it samples."""

    def __init__(self):
        super().__init__(fraction_evaluate=0.0, min_train_nodes=5, min_available_nodes=5)


class WithoutUpdate(ServerMethod):
    """A formula that is none."""


class Duck:
    """Has the method, but not the contract."""

    def update(self, w, W, n, state, round):
        return w, state


def made(tmp_path, **keys):
    strategy = new_strategy(quick_config(tmp_path / "unused", **keys))
    return getattr(strategy, "strategy", strategy)  # Flower's are shown the parameters alone


def sampling(strategy):
    names = "fraction_train", "fraction_evaluate", "min_train_nodes", "min_available_nodes"
    return [getattr(strategy, name) for name in names]


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("fedadam", MethodStrategy),
        ("flwr.serverapp.strategy:FedAdam", FedAdam),
        (f"{HERE}:HandsOn", HandsOn),
    ],
)
def test_a_strategy_trains_every_client_that_it_is_shown(tmp_path, name, cls):
    strategy = made(tmp_path, strategy=name)
    assert type(strategy).__name__ == cls.__name__
    assert sampling(strategy) == [1.0, 0.0, 5, 5]


def test_the_users_options_stand_before_the_runs(tmp_path):
    flower = {"strategy": "flwr.serverapp.strategy:FedAdam"}
    options = {"fraction_evaluate": 0.5, "beta_1": 0.3}
    strategy = made(tmp_path, **flower, strategy_options=options)
    assert sampling(strategy) == [1.0, 0.5, 5, 5]
    assert (strategy.beta_1, strategy.beta_2) == (0.3, 0.99)


def test_options_of_ours_go_to_the_formula_and_flowers_to_its_adapter(tmp_path):
    options = {"momentum": 0.5, "weighted_by_key": "steps"}
    strategy = made(tmp_path, strategy="fednova", strategy_options=options)
    assert (strategy.weighted_by_key, strategy.method.momentum) == ("steps", 0.5)


def test_fednova_gets_the_clients_momentum_and_feddyn_the_population(tmp_path):
    strategy = made(tmp_path, strategy="fednova", momentum=0.9)
    assert isinstance(strategy.method, FedNova)
    assert strategy.method.momentum == 0.9
    assert made(tmp_path, strategy="feddyn").method.clients == 20


def test_a_users_subclass_of_flowers_that_takes_nothing_runs(quick):
    assert quick(strategy=f"{HERE}:TakesNothing", rounds=2).summary["rounds"] == 2


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("builtins:dict", "--strategy builtins:dict: builtins is Python's own"),
        (f"{HERE}:Duck", f"--strategy {HERE}:Duck: must derive from fedsam.base.str"),
        ("builtins:repr", "--strategy"),
        (f"{HERE}:WithoutUpdate", "--strategy: WithoutUpdate: .*update"),
    ],
)
def test_a_wrong_class_is_refused_in_one_line(tmp_path, name, says):
    with pytest.raises(UsageError, match=f"^{says}") as error:
        made(tmp_path, strategy=name)
    assert "\n" not in str(error.value)
