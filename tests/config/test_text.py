"""Numbers in YAML are numbers, texts stay texts."""

import math
import string
import time
import tracemalloc
from contextlib import suppress

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsam.base.errors import UsageError
from fedsam.config.schema import dump, resolve
from fedsam.config.text import parse, write
from fedsam.sweep.grid import cells_of, read


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_as_python_writes_them(x):
    forms = [repr(x), f"{x:.17e}", f"{x:.17E}", f"{x:.17e}".replace("e+", "e"), f"{x:+.17e}"]
    for form in forms:
        assert parse(f"{{x: {form}}}") == {"x": x}, form
        assert parse(form) == x
    assert parse(write({"x": x})) == {"x": x}


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("1E5", 1e5), ("-.5", -0.5), (".5e1", 5.0), ("1.e2", 100.0), ("2.", 2.0)],
)
def test_short_numbers(text, value):
    assert parse(text) == value
    assert isinstance(parse(text), float)


SAME = ["1", "007", "0x1f", "1_000", "none", "null", "~", "true", "60s"]
SAME += ["1e", "e5", ".", "-", "+", "..", "1.2.3", "a/1e5", "data", "1e5x"]
SAME += ["v1.0", ".inf", "-.inf", ".nan", "0b11", "", "True", "NULL"]


@pytest.mark.parametrize("text", SAME)
def test_all_else_is_read_as_before(text):
    before, now = yaml.safe_load(text), parse(text)
    assert type(before) is type(now)
    assert before == now or (math.isnan(before) and math.isnan(now))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10), ("-010", -10), ("0o10", 8), ("08", 8), ("1:30", "1:30"), ("1:30.5", "1:30.5"),
        ("2026-11-27", "2026-11-27"), ("2001-13-45", "2001-13-45"), ("y", "y"), ("=", "="),
        ("2026-11-27 12:00:00", "2026-11-27 12:00:00"), ("inf", "inf"),
    ],
)  # fmt: skip
def test_surprises_of_yaml_1_1(text, value):
    assert parse(text) == value
    assert type(parse(text)) is type(value)
    assert parse(f"[{text}]") == [value]


@pytest.mark.parametrize("word", ["yes", "no", "NO", "on", "off", "Off"])
def test_yes_and_no_are_texts_that_only_true_or_false_takes_for_its_own(word, tmp_path):
    is_true = word in ("yes", "on")
    (tmp_path / "run.yaml").write_text(f"swa: {word}\ndataset: {word}\nrounds: 7\n")
    config = resolve({}, tmp_path / "run.yaml")
    assert (config.swa, config.dataset) == (is_true, word)
    (tmp_path / "config.yaml").write_text(dump(config))
    assert resolve({}, tmp_path / "config.yaml") == config
    for text in (f"rounds: {word}", f"model_options: {{bias: {word}}}", f"lr: {word}"):
        (tmp_path / "run.yaml").write_text(text)
        with pytest.raises(UsageError, match=f"--(rounds|lr|model-options) .*{word}"):
            resolve({}, tmp_path / "run.yaml")
    assert parse(f"'{word}'") == word
    assert resolve({"model_options": f"{{name: '{word}'}}"}).model_options == {"name": word}


@pytest.mark.parametrize("value", [True, False])
def test_true_is_no_number(value):
    for key in ("rounds", "lr", "split_seed", "local_epochs"):
        with pytest.raises(UsageError, match=f"--{key.replace('_', '-')} {value}: must be a numb"):
            resolve({key: value})


SCALARS = (
    st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(string.printable, max_size=8)
    | st.sampled_from(["1e3", "-.5", "1E5", "2.", "on", "0x1f", "1_0e2", "+1e-3", "NO", "010"])
    | st.sampled_from(["1:30", "2026-11-27", "0o7", "~", ".inf", "=", "<<", "-", "[", "a: b"])
)
VALUES = st.dictionaries(
    st.text(string.ascii_letters, min_size=1, max_size=4),
    SCALARS | st.lists(SCALARS, max_size=3),
    max_size=4,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(VALUES)
def test_what_is_written_is_read_again(values):
    again = parse(write(values))
    assert again == values
    assert list(map(type, again.values())) == list(map(type, values.values()))


def test_options_files_and_sweeps_read_1e_3_as_a_number(tmp_path):
    by_flag = resolve({"minimizer_options": "{sigma: 1e-3}"})
    assert by_flag.minimizer_options == {"sigma": 0.001}
    (tmp_path / "run.yaml").write_text("strategy_options: {tau: 1e-3, name: 'x1e-3'}\nlr: 1e-2\n")
    by_file = resolve({}, tmp_path / "run.yaml")
    assert by_file.strategy_options == {"tau": 0.001, "name": "x1e-3"}
    assert by_file.lr == 0.01
    (tmp_path / "sweep.yaml").write_text(
        "grid: {lr: [1e-3, 1e-2]}\nset: {client_options: {mu: 1e-4}}\n"
    )
    cells = cells_of(read(str(tmp_path / "sweep.yaml")), tmp_path, {})
    assert [cell.config.lr for cell in cells] == [0.001, 0.01]
    assert cells[0].config.client_options == {"mu": 0.0001}


def test_a_text_that_looks_like_a_number_survives_a_saved_config(tmp_path):
    config = resolve({"out": "1e3", "model_options": {"name": "1e5"}})
    (tmp_path / "config.yaml").write_text(dump(config))
    assert resolve({}, tmp_path / "config.yaml") == config


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_config_that_is_printed_reads_back_the_same(tmp_path_factory, data):
    texts = SCALARS.map(str) | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    given_keys = {
        "dataset": data.draw(texts),
        "model": data.draw(texts),
        "seed": data.draw(st.integers(0, 10**40)),
        "lr": data.draw(st.floats(1e-300, 1e300)),
        "model_options": data.draw(VALUES.filter(lambda v: "inf" not in repr(v))),
        "swa": data.draw(st.booleans()),
    }
    config = resolve(given_keys)
    file = tmp_path_factory.mktemp("dumped") / "config.yaml"
    file.write_text(dump(config))
    again = resolve({}, file)
    assert again == config
    assert repr(again) == repr(config)


MANY = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 20))
BOMBS = {
    "laughs": "a0: &a0 [lol]\n" + MANY,
    "merges": "a0: &a0 {k: 1}\n"
    + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 20)),
    "recursion": "lr: &a [*a]",
    "recursive merge": "&a {<<: *a}",
    "depth": "lr: " + "[" * 10**5,
    "closed depth": "lr: " + "[" * 10**4 + "]" * 10**4,
    "block depth": "\n".join(" " * i + "a:" for i in range(1200)),
    "mappings": "lr: " + "{a: " * 10**4,
    "keys": "? " * 10**4,
    "sequences": "- " * 10**5,
    "comment of 5 MB": "# x\n" * 1_250_000 + "lr: 0.5",
    "comment of 1 MB": "# x\n" * 250_000 + "lr: x",
    "text of 900 kB": "dataset: [" + "x" * 900_000,
    "values": "lr: [" + "1," * 400_000 + "]",
    "keys of 900 kB": "".join(f"k{i}: 1\n" for i in range(90_000)),
    "digits": "seed: " + "9" * 5000,
    "hex digits": "lr: 0x" + "f" * 500_000,
    "fewer digits": "rounds: " + "9" * 4000,
    "of a float": "lr: " + "9" * 4000,
    "of an option": "model_options: {a: [[" + "9" * 4000 + "]]}",
    "negative": "rounds: -" + "9" * 400,
    "exponent": "lr: 1e999999999",
    "colons": "lr: " + "1:" * 100_000 + "1",
    "int": "lr: !!int abc",
    "empty int": "lr: !!int ''",
    "float": "lr: !!float abc",
    "bool": "lr: !!bool abc",
    "date": "lr: !!timestamp 2001-13-45",
    "binary": "dataset: !!binary '!'",
    "bytes": "dataset: !!binary aGk=",
    "set": "lr: !!set {a, b}",
    "omap": "lr: !!omap [a: 1]",
    "python": "lr: !!python/object/apply:os.system ['touch owned']",
    "own tag": "lr: !mine x",
    "str of a list": "dataset: !!str [1]",
    "map of a list": "!!map [1]",
    "twice": "lr: 0.1\nlr: 0.2",
    "twice in options": "model_options: {a: 1, a: 2}",
    "twice as numbers": "model_options: {1: 1, 01: 2}",
    "list as a key": "[1]: 2",
    "mapping as a key": "? {a: 1}\n: 2",
    "anchor": "lr: *nobody",
    "two documents": "lr: 1\n---\nlr: 2",
    "tab": "\tlr: 1",
    "NUL": "lr: \0",
    "escape": 'dataset: "\\ud800"\nlr: x',
    "base": "base: " + "x" * 5000,
    "base with NUL": 'base: "a\\0b"',
    "base of a list": "base: [1]",
    "base of a folder": "base: .",
    "directive": "%YAML 9.9\n---\nlr: 1",
    "scalar": "x" * 10**5,
    "list": "[1, 2]",
    "null key": "~: 1",
    "out": "out: " + "x" * 300,
    "NUL in out": 'out: "a\\0b"',
    "a list for a text": "dataset: [a]",
    "a mapping for a number": "lr: {a: {b: " + "[1, 2]}}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_text_that_is_none_is_one_line_at_once(name, tmp_path):
    (tmp_path / "run.yaml").write_text(BOMBS[name])
    refused = []
    for read_it in (
        lambda: resolve({}, tmp_path / "run.yaml"),
        lambda: read(str(tmp_path / "run.yaml")),
        lambda: resolve({"model_options": BOMBS[name]}),
        lambda: resolve({"lr": BOMBS[name]}),
    ):
        began, said = time.process_time(), ""
        try:
            read_it()
        except UsageError as error:
            said = str(error)
        assert time.process_time() - began < 1
        assert said.isprintable()
        assert len(said) <= 1000
        refused.append(bool(said))
    assert refused[0]


def test_a_text_of_legal_size_takes_little_memory():
    for name in ("values", "keys of 900 kB", "laughs", "comment of 1 MB", "text of 900 kB"):
        tracemalloc.start()
        with suppress(UsageError):
            parse(BOMBS[name])
        assert tracemalloc.get_traced_memory()[1] < 100e6
        tracemalloc.stop()
