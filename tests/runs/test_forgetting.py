"""Average accuracy and forgetting: by hand, and of runs that are not done."""

import pytest

from fedsam.runs.metrics import (
    average,
    backward_transfer,
    forgetting,
    forward_transfer,
    lifelong_summary,
    matrix,
    of_lifelong,
    summary_of,
)

A = [[0.9], [0.5, 0.8], [0.6, 0.9, 0.7]]


def test_by_hand():
    assert average(A) == pytest.approx(2.2 / 3)
    # task 1 was best at first, task 2 is better than ever: it has forgotten less than nothing
    assert forgetting(A) == pytest.approx((0.9 - 0.6 + 0.8 - 0.9) / 2)
    assert forgetting([[0.5], [0.6, 1.0], [0.4, 1.0, 1.0]]) == pytest.approx(0.1)


def test_transfer_by_hand():
    assert backward_transfer(A) == pytest.approx((0.6 - 0.9 + 0.9 - 0.8) / 2)
    lines = [
        {"round": 0, "unseen_accuracy": [0.1, 0.2]},
        {"round": 1, "unseen_accuracy": [0.9, 0.9]},  # in the middle of the first task
        {"round": 2, "unseen_accuracy": [0.4, 0.3]},
        {"round": 4, "unseen_accuracy": [0.25]},
        {"round": 6, "unseen_accuracy": []},
    ]
    # the second task was met at 0.4, the third at 0.25
    assert forward_transfer(lines, (2, 4, 6)) == pytest.approx((0.4 - 0.1 + 0.25 - 0.2) / 2)
    assert forward_transfer(lines[1:], (2, 4, 6)) is None  # a run of before


def test_the_matrix_is_read_at_the_ends_of_the_tasks():
    lines = [
        {"round": 0, "task_accuracy": [0.0]},
        {"round": 2, "task_accuracy": [0.9]},
        {"round": 3, "task_accuracy": [0.7, 0.1]},
        {"round": 4, "task_accuracy": [0.5, 0.8]},
        {"round": 5},
    ]
    assert matrix(lines, (2, 4, 6)) == A[:2]
    summary = lifelong_summary(lines, (2, 4, 6))
    assert summary == {"accuracy_matrix": A[:2]} | dict.fromkeys(of_lifelong("accuracy"))
    lines.append({"round": 6, "task_accuracy": A[2]})
    assert lifelong_summary(lines, (2, 4, 6))["forgetting"] == pytest.approx(0.1)


def test_a_run_that_was_stopped_before_its_first_line_has_a_summary():
    summary = summary_of([])
    assert (summary["rounds"], summary["evaluations"], summary["final_accuracy"]) == (0, 0, None)
