"""The config: one source of defaults, one line for every mistake."""

import tomllib

import pytest
import torch
import yaml
from conftest import ROOT

from fedsam.base.errors import UsageError
from fedsam.config.presets import CONFIGS
from fedsam.config.schema import Config, dump, empty_run_config, from_run_config, resolve

SHIPPED = sorted(p for p in CONFIGS.rglob("*.yaml") if p.parent.name != "sweeps")
PRESETS = sorted(p.stem for p in CONFIGS.glob("algorithms/*.yaml"))


def test_few_clients_are_all_in_a_round_unless_it_is_said_otherwise():
    assert resolve({"clients": "5"}).clients_per_round == 5
    assert resolve({"clients": 50}).clients_per_round == 10
    assert resolve({"clients": 5, "clients_per_round": 2}).clients_per_round == 2
    assert resolve({}).clients_per_round == 10
    with pytest.raises(UsageError, match="--clients-per-round 10: at most --clients 5"):
        resolve({"clients": 5, "clients_per_round": 10})


def test_configs_are_shipped():
    assert {"fedavg", "fedsam", "fedasam", "lookbehind", "fedprox"} <= {p.stem for p in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_yaml_makes_a_config(path):
    config = resolve({}, path)
    values = yaml.safe_load(path.read_text())
    for key, value in values.items():
        if key != "base":
            assert getattr(config, key) == value


def test_flags_stand_over_file_over_preset_over_defaults(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("algorithm: fedasam\nrho: 0.3\nlr: 0.5\n")
    config = resolve({"lr": 0.25}, file)
    assert (config.lr, config.rho, config.eta, config.minimizer) == (0.25, 0.3, 0.2, "asam")


def test_a_file_builds_on_another(tmp_path):
    (tmp_path / "base.yaml").write_text("lr: 0.5\nrounds: 7\n")
    (tmp_path / "mine.yaml").write_text("base: base.yaml\nrounds: 8\n")
    config = resolve({}, tmp_path / "mine.yaml")
    assert (config.lr, config.rounds) == (0.5, 8)


def test_a_saved_config_repeats_the_run(tmp_path):
    given = {"algorithm": "lookbehind", "swa": True, "alpha": 0.3, "minimizer_options": "{k: 3}"}
    config = resolve(given)
    (tmp_path / "config.yaml").write_text(dump(config))
    assert resolve({}, tmp_path / "config.yaml") == config


def test_published_settings_of_the_paper():
    config = resolve({"algorithm": "fedasam"}, "paper/cifar10")
    assert (config.rounds, config.clients_per_round, config.batch_size) == (10_000, 5, 64)
    assert (config.lr, config.weight_decay, config.rho, config.eta) == (0.01, 4e-4, 0.7, 0.2)
    assert config.averages_from == 7500
    assert resolve({}, "paper/cifar100").rounds == 20_000


def test_flower_run_config_holds_every_key_and_gives_none():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert pyproject["tool"]["flwr"]["app"]["config"] == empty_run_config()
    assert from_run_config(empty_run_config()) == Config()


WRONG = [
    ({"alpha": -1}, "--alpha -1", "greater than or equal to 0"),
    ({"alpha": "high"}, "--alpha high", "valid number"),
    ({"alpha": float("nan")}, "--alpha nan", "finite"),
    ({"rho": -0.1}, "--rho -0.1", "greater than or equal to 0"),
    ({"lr": 0}, "--lr 0", "greater than 0"),
    ({"momentum": 1}, "--momentum 1", "less than 1"),
    ({"rounds": 0}, "--rounds 0", "greater than or equal to 1"),
    ({"rounds": 1.5}, "--rounds 1.5", "integer"),
    ({"clients": 5, "clients_per_round": 10}, "--clients-per-round 10", "--clients 5"),
    ({"swa": True, "swa_start": 1000}, "--swa-start 1000", "--rounds 1000"),
    ({"trace": True, "rounds": 2}, "--trace", "shows rounds 3 to 5"),
    ({"swa": True, "average": "ema"}, "--swa", "ema"),
    ({"precision": "fp16"}, "--precision fp16", "'fp32', 'tf32' or 'bf16'"),
    ({"engine": "spark"}, "--engine spark", "'local' or 'ray'"),
    ({"augment": "rotate"}, "--augment rotate", "crop, flip"),
    ({"algorithm": "fedsamm"}, "--algorithm", "did you mean 'fedsam'?"),
    ({"alhpa": 1}, "--alhpa", "did you mean 'alpha'?"),
    ({"minimizer_options": "[1"}, "--minimizer-options [1", "mapping"),
    ({"minimizer_options": "k"}, "--minimizer-options k", "must be a mapping in YAML or JSON"),
    ({"model_options": "hidden=3"}, "--model-options hidden=3", "such as '{k: 2}'"),
    (
        {"dataset_options": "{side:64}"},
        "--dataset-options {side:64}",
        "a space must follow the colon in side:64",
    ),
    ({"partition_options": "{alpha: .nan}"}, "--partition-options", "alpha must be a finite"),
    ({"partition_options": "{sizes: [1, .inf]}"}, "--partition-options", "sizes must be a finite"),
    ({"partition_options": "{seed: null}"}, "--partition-options", "seed must be a number, a text"),
    ({"partition_options": "{a: [[1]]}"}, "--partition-options {a: [[1]]}", "a must be a number"),
    ({"target_accuracy": 70}, "--target-accuracy 70", "less than or equal to 1"),
]


@pytest.mark.parametrize(
    ("algorithm", "rho", "rho_cifar100"),
    [("fedsam", 0.1, 0.05), ("fedasam", 0.7, 0.5), ("fedgloss", 0.15, 0.2), ("mofedsam", 0.1, 0.1)],
)
def test_presets_hold_what_was_published_for_each_data_set(algorithm, rho, rho_cifar100):
    given = {"algorithm": algorithm}
    assert resolve(given | {"dataset": "cifar10"}).rho == rho
    assert resolve(given | {"dataset": "cifar100"}).rho == rho_cifar100
    assert resolve(given | {"dataset": "cifar100", "rho": 0.3}).rho == 0.3


AUTHORS_CLIP = {
    *("fedacg", "fedcm", "feddyn", "fedexp", "fedgamma", "fedlesam", "fedlesam-d", "fedlesam-s"),
    *("fedmoswa", "fedsmoo", "fedspeed", "fedswa", "mofedsam", "scaffold"),
}


def test_the_presets_whose_authors_clip_have_their_10_and_no_other_clips():
    lengths = {name: resolve({"algorithm": name}).clip_gradient for name in PRESETS}
    assert {name for name, length in lengths.items() if length} == AUTHORS_CLIP
    assert {lengths[name] for name in AUTHORS_CLIP} == {10.0}


@pytest.mark.parametrize(
    ("algorithm", "published"),
    [
        ("central-asam", {"eta": 0.0}),
        (
            "fedacg",
            {"client_options": {"mu": 0.002}, "strategy_options": {"server_momentum": 0.85}},
        ),
        ("fedexp", {"strategy_options": {"epsilon": 0.01}}),
        ("fedgloss", {"minimizer_options": {"rho_0": 0.001, "warmup": 2000}}),
        ("fedlesam", {"rho": 0.1}),
        ("fedlesam-d", {"rho": 0.1, "client_options": {"alpha": 0.1}}),
        ("fedlesam-s", {"rho": 0.1, "client_options": {"strength": 0.1}}),
        ("fedmoswa", {"client_options": {"rho_end": 0.1, "gamma": 0.2}}),
        ("fedmoswa", {"strategy_options": {"server_learning_rate": 1.5, "server_momentum": 0.0}}),
        ("fedswa", {"client_options": {"rho_end": 0.1}}),
        ("fedswa", {"strategy_options": {"server_learning_rate": 1.5, "server_momentum": 0.0}}),
        ("friendly-sam", {"minimizer_options": {"sigma": 1.0, "lam": 0.6}}),
        ("gsam", {"minimizer_options": {"alpha": 0.4}}),
    ],
)
def test_presets_hold_what_the_audit_of_the_released_code_says(algorithm, published):
    config = resolve({"algorithm": algorithm}).model_dump()
    assert {key: config[key] for key in published} == published


def test_fedgloss_warms_up_both_radii_for_as_long_on_each_data_set():
    for dataset, rounds in (("cifar10", 2000), ("cifar100", 15000)):
        config = resolve({"algorithm": "fedgloss", "dataset": dataset})
        assert config.minimizer_options["warmup"] == rounds
        assert config.strategy_options["warmup"] == rounds


@pytest.mark.parametrize(("given", "names", "says"), WRONG, ids=lambda v: str(v)[:30])
def test_a_mistake_is_one_line_that_names_the_flag(given, names, says):
    with pytest.raises(UsageError) as caught:
        resolve(given)
    line = str(caught.value)
    assert line.startswith(names)
    assert says in line
    assert "\n" not in line


FILES = {
    "no mapping": ("- 1\n- 2\n", "must be a mapping"),
    "no YAML": ("a: [1\n", "cannot be read as YAML"),
    "no text": (b"\xff\xfe\x00\x81", "cannot be read as YAML"),
    "unknown key": ("alhpa: 1\n", "did you mean 'alpha'?"),
    "missing base": ("base: nowhere.yaml\n", "nowhere.yaml"),
    "built on itself": ("base: mine.yaml\n", "builds on itself"),
    "python objects": ("alpha: !!python/object/apply:os.getcwd []\n", "cannot be read as YAML"),
}


@pytest.mark.parametrize("content", FILES, ids=str)
def test_a_wrong_file_is_one_line(tmp_path, content):
    text, says = FILES[content]
    file = tmp_path / "mine.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError) as caught:
        resolve({}, file)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_the_nearest_shipped_one():
    with pytest.raises(UsageError, match="did you mean 'paper/cifar10'"):
        resolve({}, "paper/cifar-10")


def test_an_empty_file_is_the_defaults(tmp_path):
    (tmp_path / "mine.yaml").write_text("")
    assert resolve({}, tmp_path / "mine.yaml") == Config()


def test_evaluation_every_so_often_and_each_of_the_last_100_rounds_of_a_long_run():
    long = resolve({"rounds": 1000, "eval_every": 100})
    assert [r for r in range(1, 1001) if long.evaluates(r)] == [
        *range(100, 901, 100),
        *range(901, 1001),
    ]
    short = resolve({"rounds": 25, "eval_every": 10})
    assert [r for r in range(1, 26) if short.evaluates(r)] == [10, 20, 25]


def test_swa_start_is_a_fraction_or_a_round():
    assert resolve({"rounds": 200, "swa": True}).averages_from == 150
    assert resolve({"rounds": 200, "swa": True, "swa_start": 120}).averages_from == 120
    assert resolve({"rounds": 200, "swa": True, "swa_start": 0}).averages_from == 0


def test_the_cosine_schedule_is_pytorchs():
    config = resolve({"lr": 0.3, "lr_schedule": "cosine", "rounds": 7})
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=7)
    for round in range(1, 8):
        assert config.rate(round) == pytest.approx(optimiser.param_groups[0]["lr"], rel=1e-12)
        optimiser.step()
        schedule.step()
    assert resolve({"lr": 0.3}).rate(500) == 0.3


def test_central_stands_over_a_files_population_and_under_flags(tmp_path):
    def who(config):
        return config.clients, config.clients_per_round, config.partition

    central = resolve({"algorithm": "central-asam"}, "paper/cifar10")
    assert who(central) == (1, 1, "iid")
    assert (central.lr, central.minimizer, central.rho) == (0.01, "asam", 0.5)
    more = resolve({"algorithm": "central", "clients": 4, "clients_per_round": 2}, "paper/cifar10")
    assert who(more) == (4, 2, "iid")
    (tmp_path / "saved.yaml").write_text(dump(more))
    assert resolve({}, tmp_path / "saved.yaml") == more
    assert who(resolve({"algorithm": "fedasam"}, "paper/cifar10")) == (100, 5, "dirichlet")
