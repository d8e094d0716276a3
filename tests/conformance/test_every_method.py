"""Every method that lies in the folders, and some with each other: found by listing, not a list."""

import inspect

import pytest
import torch
from conftest import combined, quick_config
from safetensors.torch import load_file

from fedsam.base.strategy import Average, ServerMethod
from fedsam.config.plugins import find, names
from fedsam.simulate.run import run

MINIMIZERS = names("fedsam.clients.minimizers")
CLIENTS = names("fedsam.clients.corrections")
STRATEGIES = names("fedsam.strategies")
AVERAGES = names("fedsam.strategies.averages")
PLAIN = ("sgd", "fedavg", "fedavg")
SOME = combined(MINIMIZERS, CLIENTS, STRATEGIES, plain=PLAIN, more=25)
FEWER_PASSES = {"lookbehind": {"k": 2}, "multistep_sam": {"k": 2}, "m_sam": {"m": 32}}
FILES = [
    (key, package, name)
    for key, package in [
        ("minimizer", "fedsam.clients.minimizers"),
        ("client", "fedsam.clients.corrections"),
        ("loss", "fedsam.clients.losses"),
        ("strategy", "fedsam.strategies"),
        ("average", "fedsam.strategies.averages"),
        ("model", "fedsam.models"),
        ("task", "fedsam.tasks"),
    ]
    for name in names(package)
]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The model that every run starts from."""
    folder = tmp_path_factory.mktemp("start") / "run"
    return model(run(quick_config(folder, rounds=1, local_epochs=0)))


def model(outcome):
    return load_file(outcome.folder / "model.safetensors")


def test_the_folders_hold_what_the_main_job_needs():
    assert {"sgd", "sam", "asam", "lookbehind"} <= set(MINIMIZERS)
    assert {"fedavg", "fedprox"} <= set(CLIENTS)
    assert {"swa", "ema", "wima"} <= set(AVERAGES)


@pytest.mark.parametrize(("minimizer", "client", "strategy"), SOME)
def test_all_axes_combine_and_repeat_to_the_byte(quick, start, minimizer, client, strategy):
    axes = {"minimizer": minimizer, "client": client, "strategy": strategy}
    first, again = (quick(rounds=2, clients_per_round=3, threads=n, **axes) for n in (1, 2))
    name = "model.safetensors"
    assert (first.folder / name).read_bytes() == (again.folder / name).read_bytes()
    for key, tensor in model(first).items():
        assert tensor.dtype == start[key].dtype
        assert not torch.equal(tensor, start[key])


@pytest.mark.parametrize("minimizer", MINIMIZERS)
def test_a_minimiser_learns_the_digits(quick, minimizer):
    options = FEWER_PASSES.get(minimizer, {})
    outcome = quick(
        minimizer=minimizer,
        minimizer_options=options,
        rounds=20,
        lr=0.2,
        clients=10,
        alpha=100,
        local_epochs=2,
    )
    assert outcome.summary["last_accuracy"] > 0.8


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_server_method_extends_its_contract_and_no_other_method(name):
    assert find("strategy", name, "fedsam.strategies", ServerMethod).__bases__ == (ServerMethod,)


@pytest.mark.parametrize("name", AVERAGES)
def test_a_rule_of_averaging_extends_its_contract_and_no_other_rule(name):
    assert find("average", name, "fedsam.strategies.averages", Average).__bases__ == (Average,)


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_average_goes_around_every_strategy(quick, strategy, average):
    outcome = quick(strategy=strategy, average=average, rounds=4, swa_start=1, swa_cycle=1)
    trained = load_file(outcome.folder / "model-trained.safetensors")
    assert any(not torch.equal(model(outcome)[name], trained[name]) for name in trained)


@pytest.mark.parametrize(("key", "package", "name"), FILES, ids=lambda v: v)
def test_a_file_holds_one_method_with_formula_and_documentation(key, package, name):
    cls = find(key, name, package, object)
    module = inspect.getmodule(cls)
    assert module.__name__ == f"{package}.{name}"
    assert module.__doc__
    assert cls.__doc__
    own = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and value.__module__ == module.__name__
        and not value.__name__.startswith("_")  # a network's pieces
    ]
    assert own == [cls]
    if "__init__" in vars(cls):
        for parameter in inspect.signature(cls).parameters:
            assert f"{parameter} : " in cls.__doc__, f"{name}: {parameter} is not documented"
