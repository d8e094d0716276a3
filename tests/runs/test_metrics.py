"""Lines and summaries, by hand."""

import math

import pytest

from fedsam.runs import metrics

LINES = [
    {"round": 0, "accuracy": 0.1, "loss": 2.0},
    {"round": 1, "seconds": 2.0, "train_loss": 1.5, "accuracy": 0.9, "loss": None},
    {"round": 2, "seconds": None},
    {"round": 150, "seconds": 4.0, "accuracy": 0.5, "loss": 1.0},
    {"round": 200, "seconds": 4.0, "accuracy": 0.7, "loss": 0.5},
]


def test_a_line_marks_what_clients_report_and_says_who_was_left_out():
    line = metrics.line_of_round(3, 0.5, [1, 4], {"loss": 2.0, "steps": 8.0}, [])
    assert line == {
        **{"round": 3, "seconds": 0.5, "clients": [1, 4]},
        **{"train_loss": 2.0, "train_steps": 8.0},
    }
    assert metrics.line_of_round(3, 0.5, [1, 4], {}, [4])["left_out"] == [4]


def test_the_final_accuracy_is_that_of_the_last_hundred_rounds():
    assert metrics.summary_of(LINES) == {
        "final_accuracy": pytest.approx(0.6),
        "last_accuracy": 0.7,
        "best_accuracy": 0.9,
        "evaluations": 3,
        "rounds": 200,
        "rounds_per_second": 20.0,
    }


def test_a_run_of_no_round_has_no_accuracy():
    summary = metrics.summary_of(LINES[:1])
    assert {summary[key] for key in metrics.finals("accuracy")} == {None}
    assert summary["rounds_per_second"] is None


def test_curves_leave_out_what_is_not_there_and_what_was_not_finite():
    assert metrics.curve(LINES, "loss") == {0: 2.0, 150: 1.0, 200: 0.5}
    assert metrics.curve(LINES, "train_loss") == {1: 1.5}


def test_seconds_to_a_target_are_those_of_training():
    assert metrics.reaches(LINES, 0.1) == (0, 0.0)
    assert metrics.reaches(LINES, 0.9) == (1, 2.0)
    assert metrics.reaches(LINES[2:], 0.6) == (200, 8.0)
    assert metrics.reaches(LINES, math.nextafter(0.9, 1)) is None
