"""What a line of metrics.jsonl and summary.json hold beside what the task measures.

Lifelong runs: accuracy by task, average accuracy and forgetting (Chaudhry et al., "Riemannian Walk
for Incremental Learning", ECCV 2018, section 3). Drift: how far the clients of a round walk, and
how far from each other.
"""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import torch
from torch import Tensor

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


def drift(before: Tensor, clients: Sequence[Tensor], after: Tensor) -> dict[str, float]:
    """Return the lengths of a round's updates.

    With u_k = w_k - w the update of client k and m the plain mean of all K of them::

        client_norm   sqrt(mean_k |u_k|^2)        how far a client walks
        client_drift  sqrt(mean_k |u_k - m|^2)    how far from each other they end
        update_norm   |w_new - w|                 how far the server goes

    client_norm^2 = |m|^2 + client_drift^2, and with FedAvg over equal clients update_norm = |m|.

    Parameters
    ----------
    before, after : Tensor
        The global parameters (P,) before and after the round.
    clients : sequence of Tensor
        The clients' parameters, K times (P,).
    """
    updates = [w_k - before for w_k in clients]
    mean = sum(updates[1:], updates[0]) / len(updates)
    walked = torch.stack([u.norm() for u in updates])
    apart = torch.stack([(u - mean).norm() for u in updates])
    lengths = walked.square().mean().sqrt(), apart.square().mean().sqrt(), (after - before).norm()
    names = "client_norm", "client_drift", "update_norm"
    return dict(zip(names, torch.stack(lengths).tolist(), strict=True))
