"""Bad input: any config runs its first round or is refused in one line that names the key."""

import json
import string

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsam.base.errors import UsageError
from fedsam.config.schema import Config
from fedsam.data.partitions.csv import csv
from fedsam.simulate.__main__ import main

TRIALS = 60  # in CI; with -m long a thousand
SMALL = ["--clients=8", "--clients-per-round=3", "--rounds=1", "--device=cpu", "--quiet"]
WORDS = st.sampled_from(
    ["", "x", "nan", "inf", "-1", "0", "1e309", "None", "[]", "{a: 1}", "a: b: c"]
)
NUMBERS = st.integers(-3, 70) | st.floats(allow_nan=True, allow_infinity=True)
TEXTS = WORDS | st.text(string.printable, max_size=12)
NAMES = {
    "dataset": ["digits", "cifar10", "nowhere:x", "os:getcwd"],
    "model": ["auto", "mlp", "cnn", "digits-cnn", "torch.nn:Linear", "resnet"],
    "task": ["classification", "segmentation", "json:dumps"],
    "partition": ["dirichlet", "iid", "shards", "quantity", "dirichlet-per-class", "csv", "os:x"],
    "algorithm": ["fedavg", "fedasam", "scaffold", "feddyn", "lookbehind", "fedsamm"],
    "minimizer": ["sgd", "sam", "asam", "late", "gsam", "looksam", "m_sam", "adam", "json:loads"],
    "client": ["fedavg", "fedprox", "scaffold", "fedcm", "nobody", "builtins:print"],
    "strategy": ["fedavg", "fedadam", "flwr.serverapp.strategy:Krum", "nothing", "builtins:dict"],
    "average": ["none", "swa", "ema", "wima", "median"],
    "augment": ["auto", "none", "crop", "flip", "crop+flip", "rotate"],
    "precision": ["fp32", "bf16", "tf32", "fp16"],
    "cohort": ["auto", "off", "slots", "vmap", "on"],
    "engine": ["local", "flower"],  # ray starts one for each: minutes
    "track": ["", "nobody", "json:dumps"],
    "checkpoint_every": ["0", "1", "1s", "s", "1m", "-1", ""],
}
# would train for hours, write elsewhere, or are the trial's own
APART = {"device", "quiet", "out", "ray_address", "workers", "threads", "rounds", "data_root"}
LARGE = {"clients", "local_epochs", "local_steps", "model_options"}


def value_of(key):
    if key in NAMES:
        return st.sampled_from(NAMES[key]) | TEXTS
    if key.endswith("_options"):
        inner = st.dictionaries(st.sampled_from(["k", "m", "mu", "start", "x"]), NUMBERS | WORDS)
        return inner.map(json.dumps) | TEXTS
    if Config.model_fields[key].annotation is bool:
        return st.booleans()
    return NUMBERS.map(str) | WORDS


KEYS = [key for key in Config.model_fields if key not in APART | LARGE]
GIVEN = st.dictionaries(st.sampled_from(KEYS), st.none(), max_size=4).flatmap(
    lambda keys: st.fixed_dictionaries({key: value_of(key) for key in keys})
)


def words(key, value):
    flag = "--" + key.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    return [f"{flag}={value}"]


def judge(arguments, folder, capsys):
    """Run the command as a user does; it ends well, or with one line that names a flag."""
    out = folder / f"run{len(list(folder.iterdir()))}"
    code = main([*arguments, "--out", str(out)])
    said = capsys.readouterr().err
    if code == 0:
        assert (out / "summary.json").exists()
    elif code == 1:
        assert said.strip().splitlines()[-1].startswith("fedsam: training stopped: ")
    else:
        assert code == 2
        lines = said.splitlines()
        assert len(lines) == 1, said
        assert lines[0].startswith("fedsam: error: ")
        assert "--" in lines[0]
    return code


def any_config(folder, capsys, trials):
    codes = []

    @settings(
        max_examples=trials,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(GIVEN)
    def trial(given_keys):
        words_of = [word for key, value in given_keys.items() for word in words(key, value)]
        codes.append(judge([*SMALL, *words_of], folder, capsys))

    trial()
    return codes


def test_any_config_runs_its_first_round_or_is_refused_by_name(tmp_path, capsys):
    codes = any_config(tmp_path, capsys, TRIALS)
    assert {0, 2} <= set(codes)


@pytest.mark.long
@pytest.mark.usefixtures("pictures")
def test_a_thousand_configs(tmp_path, capsys):
    codes = any_config(tmp_path, capsys, 1000)  # each of which is judged
    assert {0, 2} <= set(codes)
    with capsys.disabled():
        print({code: codes.count(code) for code in sorted(set(codes))})


YAML = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(YAML.map(yaml.safe_dump) | st.text(max_size=40) | st.binary(max_size=40))
def test_any_yaml_file_is_refused_in_one_line_or_a_config(tmp_path_factory, content):
    from fedsam.config.schema import resolve
    from fedsam.sweep.grid import read

    file = tmp_path_factory.mktemp("yaml") / "file.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "replace"))
    for load in (lambda: resolve({}, file), lambda: read(str(file))):
        said = ""
        try:
            load()
        except UsageError as error:
            said = str(error)
        assert "\n" not in said
        assert len(said) < 2000


CELLS = st.sampled_from(
    ["0", "1", "59", "60", "-1", "x", "", "1.5", "user_id", "image_id", "\x00", '"']
)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.lists(st.lists(CELLS, max_size=4), max_size=6) | st.binary(max_size=60))
def test_any_csv_partition_is_refused_in_one_line_or_a_split(tmp_path_factory, rows):
    file = tmp_path_factory.mktemp("csv") / "split.csv"
    if isinstance(rows, bytes):
        file.write_bytes(b"user_id,image_id,class\n" + rows)
    else:
        head = "user_id,image_id,class\n"
        file.write_text(head + "\n".join(",".join(row) for row in rows))
    labels = torch.arange(60) % 10
    said, last = "", 0
    try:
        last = int(csv(labels, 2, np.random.default_rng(0), path=str(file)).indices.max())
    except UsageError as error:
        said = str(error)
    assert "\n" not in said
    assert last < 60
