"""Layers of a config: options merge key by key, and a preset holds beside its own values."""

import json
from types import MappingProxyType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsam.base.errors import UsageError
from fedsam.config.presets import CONFIGS, over
from fedsam.config.schema import (
    Config,
    dump,
    empty_run_config,
    from_run_config,
    keys,
    resolve,
)
from fedsam.config.text import parse
from fedsam.simulate.build.method import new_method
from fedsam.simulate.build.strategy import new_strategy
from fedsam.sweep.grid import Sweep, cells_of

PRESETS = sorted(path.stem for path in CONFIGS.glob("algorithms/*.yaml"))
DEFAULTS = MappingProxyType(Config().model_dump())


def options(key, value, **beside):
    return getattr(resolve({key: value, **beside}), key)


def test_an_option_beside_a_preset_keeps_its_others():
    kept = options("minimizer_options", "{slow: 0.8}", algorithm="lookbehind")
    assert kept == {"k": 2, "slow": 0.8, "ascent": "sam"}
    kept = options("minimizer_options", "{then: asam}", algorithm="late-phase")
    assert kept == {"first": "sgd", "then": "asam", "start": 0.875}
    kept = options("strategy_options", {"rho": 0.5}, algorithm="fedgloss", dataset="cifar100")
    assert kept == {"rho": 0.5, "rho_0": 0.001, "warmup": 15000}


def test_an_option_beside_a_file_keeps_its_others(tmp_path):
    (tmp_path / "base.yaml").write_text("model: cnn\nmodel_options: {norm: batch, outputs: 5}\n")
    (tmp_path / "mine.yaml").write_text("base: base.yaml\nmodel_options: {norm: group}\n")
    config = resolve({"model_options": "{outputs: 7}"}, tmp_path / "mine.yaml")
    assert config.model_options == {"norm": "group", "outputs": 7}
    other = resolve({"model": "mlp", "model_options": "{hidden: 9}"}, tmp_path / "mine.yaml")
    assert other.model_options == {"hidden": 9}


def test_another_plug_in_drops_the_options_of_the_one_it_replaces():
    config = resolve({"algorithm": "lookbehind", "minimizer": "sam"})
    assert (config.minimizer, config.minimizer_options, config.rho) == ("sam", {}, 0.05)
    assert type(new_method(config).minimizer).__name__ == "SAM"
    config = resolve({"algorithm": "fedexp", "average": "ema", "average_options": {"decay": 0.5}})
    assert config.average_options == {"decay": 0.5}
    new_strategy(config)
    assert resolve({"algorithm": "m-sam", "minimizer": "m-sam"}).minimizer_options == {"m": 16}


def test_swa_is_the_average_of_this_name_in_every_layer(tmp_path):
    def average(given, text=""):
        (tmp_path / "mine.yaml").write_text(text)
        config = resolve(given, tmp_path / "mine.yaml")
        return config.averaging, config.average_options

    assert average({"algorithm": "fedexp"}) == ("wima", {"window": 2})
    assert average({"algorithm": "fedexp", "swa": True}) == ("swa", {})
    assert average({"average": "ema"}, "swa: true\naverage_options: {phase: end}") == ("ema", {})
    assert average({"average": "none"}, "swa: true") == ("none", {})
    official = {"phase": "official"}
    assert average({"swa": True}, "average: swa\naverage_options: {phase: official}") == (
        "swa",
        official,
    )


def test_of_a_central_preset_over_a_file_the_files_partition_goes_with_its_options(tmp_path):
    (tmp_path / "mine.yaml").write_text("partition: shards\npartition_options: {shards: 3}\n")
    config = resolve({"algorithm": "central"}, tmp_path / "mine.yaml")
    assert (config.partition, config.partition_options) == ("iid", {})


def test_a_sweep_merges_options_key_by_key(tmp_path):
    sweep = Sweep.model_validate({
        "set": {"algorithm": "late-phase", "minimizer_options": {"first": "asam"}},
        "grid": {"minimizer_options.start": [0.5], "rho": [0.1, 0.2]},
        "when": [
            {"if": {"rho": 0.1}, "set": {"minimizer_options": {"then": "gsam"}}},
        ],
    })  # fmt: skip
    first, second = cells_of(sweep, tmp_path, {})
    assert first.config.minimizer_options == {"first": "asam", "then": "gsam", "start": 0.5}
    assert second.config.minimizer_options == {"first": "asam", "then": "sam", "start": 0.5}


def test_options_in_a_sweep_without_their_plug_in_are_for_any(tmp_path):
    sweep = Sweep.model_validate(
        {"set": {"minimizer_options": {"k": 2}}, "grid": {"minimizer": ["looksam", "lookbehind"]}}
    )
    assert [c.config.minimizer_options for c in cells_of(sweep, tmp_path, {})] == [{"k": 2}] * 2


def test_a_run_that_had_an_option_less_than_its_preset_has_it_less_when_read_again(tmp_path):
    before = Config(algorithm="lookbehind", minimizer="lookbehind", minimizer_options={"slow": 0.8})
    (tmp_path / "config.yaml").write_text(dump(before))
    assert resolve({}, tmp_path / "config.yaml") == before
    assert resolve(before.model_dump()) == before
    again = resolve({"minimizer_options": "{k: 3}"}, tmp_path / "config.yaml")
    assert again.minimizer_options == {"slow": 0.8, "k": 3}


OPTIONS = st.dictionaries(
    st.sampled_from(["k", "mu", "start", "eta"]),
    st.integers(-9, 9) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    max_size=3,
)
PLUGS = {
    "algorithm": st.sampled_from(PRESETS),
    "minimizer": st.sampled_from(["sgd", "sam", "late", "lookbehind"]),
    "client": st.sampled_from(["fedavg", "feddyn"]),
    "strategy": st.sampled_from(["fedavg", "feddyn", "fedgloss"]),
    "average": st.sampled_from(["none", "ema", "swa", "wima"]),
    "model": st.sampled_from(["auto", "mlp"]),
    "dataset": st.sampled_from(["digits", "cifar10", "cifar100"]),
    "partition": st.sampled_from(["iid", "shards"]),
    "rho": st.floats(0, 1),
    "swa": st.just(True),
    **{f"{key}_options": OPTIONS for key in ("minimizer", "client", "strategy", "average")},
}
GIVEN = st.fixed_dictionaries({}, optional=PLUGS).filter(
    lambda given: "swa" not in given or given.get("average", "swa") in ("none", "swa")
)


@settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=60)
@given(GIVEN, GIVEN)
def test_a_dumped_config_is_the_same_config(tmp_path_factory, upper, lower):
    config = resolve(over(lower, upper))
    file = tmp_path_factory.mktemp("dump") / "config.yaml"
    file.write_text(dump(config))
    assert resolve({}, file) == config
    assert resolve(config.model_dump()) == config
    assert resolve(config.model_dump(), file) == config


def run_config(given):
    """Return Flower's run config of what was given, as flwr fuses it."""
    texts = {
        key.replace("_", "-"): json.dumps(value) if isinstance(value, dict) else value
        for key, value in given.items()
    }
    return empty_run_config() | texts


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_beside_one_of_its_own_values_is_the_same(name):
    plain = resolve({"algorithm": name})
    of_preset = parse((CONFIGS / "algorithms" / f"{name}.yaml").read_text())
    for key in set(of_preset) - {"base"}:
        value = getattr(plain, key)
        assert resolve({"algorithm": name, key: value}) == plain, key
        assert from_run_config(run_config({"algorithm": name, key: value})) == plain, key
        for inner in value if isinstance(value, dict) else ():
            one = {"algorithm": name, key: {inner: value[inner]}}
            assert resolve(one) == plain
            assert from_run_config(run_config(one)) == plain


def outcome(make, given):
    try:
        return make(given)
    except UsageError as error:
        return str(error)


@pytest.mark.parametrize("name", PRESETS)
def test_flower_trains_with_a_key_that_is_given_at_its_default(name):
    for key, default in DEFAULTS.items():
        if default == "" or key == "algorithm":  # an empty text is not given, to Flower
            continue
        if key in keys("engine") or key == "data_root":  # refused: tests/engines/test_flower.py
            continue
        given = {"algorithm": name, key: default}
        by_flags = outcome(resolve, given)
        assert outcome(from_run_config, run_config(given)) == by_flags, key
        if isinstance(by_flags, Config) and not isinstance(default, dict):
            assert getattr(by_flags, key) == default, key


def test_flower_trains_with_the_rho_that_is_asked_for():
    config = from_run_config(empty_run_config() | {"algorithm": "fedasam", "rho": 0.05})
    assert (config.minimizer, config.rho) == ("asam", 0.05)
    config = from_run_config(
        empty_run_config() | {"algorithm": "fedasam", "client-options": '{"mu": 0.5}'}
    )
    assert (config.rho, config.client_options) == (0.7, {"mu": 0.5})


def test_what_is_done_with_a_key_stands_beside_it():
    assert keys("column") == ("dataset", "alpha", "clients_per_round", "leave_out")
    assert keys("who") == ("clients", "clients_per_round", "partition")
    assert set(keys("free")) == {"rounds", "swa_start", "target_accuracy", "patience", "weights"}
    assert keys("noted") == ("weights_sha256",)
    assert {"out", "device", "engine"} < set(keys("how"))
    assert {"model", "batch_size", "precision"} < set(keys("shared"))
    assert not set(keys("how")) & set(keys("free"))
