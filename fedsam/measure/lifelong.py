"""What is left of earlier tasks: accuracy by task, average accuracy and forgetting.

Chaudhry et al., "Riemannian Walk for Incremental Learning" (ECCV 2018), section 3.
"""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

KEY = "task_accuracy"  # of metrics.jsonl: that of every task begun so far, in [0, 1]
Matrix = Sequence[Sequence[float]]


def matrix(lines: Sequence[Mapping[str, Any]], ends: Sequence[int]) -> list[list[float]]:
    """Return a: a[k][j], accuracy on task j after task k, for j <= k; of the tasks that are done.

    Parameters
    ----------
    lines : sequence of mapping
        Of metrics.jsonl.
    ends : sequence of int
        The last round of each task.
    """
    measured = {line["round"]: list(line[KEY]) for line in lines if KEY in line}
    return [measured[end] for end in ends if end in measured]


def average_accuracy(a: Matrix) -> float:
    """Return the mean over all tasks of the accuracy after the last."""
    return mean(a[-1])


def forgetting(a: Matrix) -> float:
    """Return the mean, over all tasks but the last, of the best accuracy before minus the final."""
    last = len(a) - 1
    return mean(max(row[j] for row in a[j:last]) - a[last][j] for j in range(last))


def measured(lines: Sequence[Mapping[str, Any]], ends: Sequence[int]) -> dict[str, Any]:
    """Return what summary.json holds; the means are None before the last task is done."""
    a = matrix(lines, ends)
    whole = len(a) == len(ends)
    return {
        "accuracy_matrix": a,
        "average_accuracy": average_accuracy(a) if whole else None,
        "forgetting": forgetting(a) if whole else None,
    }
