"""Some sixty small runs end where they always ended, in float64 and so on any machine."""

import json

import pytest
from record import NUMBERS, SAID, commands, ended, float64, joint, resumed, said, summary, talking

EXPECTED = json.loads(NUMBERS.read_text())
WORDS = json.loads(SAID.read_text())
# the same numbers with and without vector instructions differ by 1e-14 (measured, x86)
TOLERANCE = 1e-9


def test_the_record_holds_every_run():
    assert set(EXPECTED) == {*commands(), "resumed", "joint"}


@pytest.mark.parametrize("name", commands())
def test_a_run_ends_where_it_always_ended(tmp_path, name):
    with float64():
        model = ended(commands()[name], tmp_path / "run")
    assert summary(model) == pytest.approx(EXPECTED[name], rel=TOLERANCE)


@pytest.mark.parametrize("run", [resumed, joint])
def test_a_resumed_run_and_two_as_one_program_end_where_they_always_ended(tmp_path, run):
    with float64():
        model = run(tmp_path / "run")
    assert summary(model) == pytest.approx(EXPECTED[run.__name__], rel=TOLERANCE)


def leaves(value, path=""):
    """Yield every number or text of nested lists and mappings with where it stands, in order."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in pairs:
            yield from leaves(inner, f"{path}/{key}")
    else:
        yield path, value


@pytest.mark.parametrize("name", talking())
def test_a_run_writes_the_keys_that_it_always_wrote_with_the_same_numbers(tmp_path, name):
    with float64():
        now = list(leaves(said(talking()[name], tmp_path / "run")))
    before = list(leaves(WORDS[name]))
    assert [path for path, _ in now] == [path for path, _ in before]
    for (path, value), (_, expected) in zip(now, before, strict=True):
        assert value == pytest.approx(expected, rel=TOLERANCE), path
