"""Numbers in YAML are numbers, texts stay texts."""

import math
import string

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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


SAME = ["1", "007", "0x1f", "1_000", "on", "off", "yes", "no", "none", "null", "~", "true", "60s"]
SAME += ["1e", "e5", ".", "-", "+", "..", "1.2.3", "2026-11-27", "12:30", "a/1e5", "data", "1e5x"]
SAME += ["v1.0", ".inf", "-.inf", ".nan"]


@pytest.mark.parametrize("text", SAME)
def test_all_else_is_read_as_before(text):
    before, now = yaml.safe_load(text), parse(text)
    assert type(before) is type(now)
    assert before == now or (math.isnan(before) and math.isnan(now))


SCALARS = (
    st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(string.printable, max_size=8)
    | st.sampled_from(["1e3", "-.5", "1E5", "2.", "on", "0x1f", "1_0e2", "+1e-3"])
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
