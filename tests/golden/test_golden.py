"""Some sixty small runs end where they always ended, in float64 and so on any machine."""

import json

import pytest
from record import NUMBERS, commands, ended, float64, joint, resumed, summary

EXPECTED = json.loads(NUMBERS.read_text())
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
