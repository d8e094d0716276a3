"""What metrics.jsonl and summary.json hold: every key once, and how its number is made.

A line of metrics.jsonl is a JSON object; a number that is not finite is null. A task names its
headline, the metric in [0, 1] that stands for the run; where it is another than ``accuracy``, such
as ``miou``, each ``accuracy`` in a key below is that name.

=====================  ===========================================================  ================
key                    meaning                                                      where it stands
=====================  ===========================================================  ================
``round``              0 is the model before training                               always
``seconds``            of the round, by the wall clock                              but for round 0
``clients``            the cohort's numbers, ascending                              but for round 0
``train_loss``         nats, mean over the clients' steps, weighted by the          but for round 0
                       strategy; ``train_`` and a name: whatever clients report
``left_out``           clients that failed, or whose update was not usable          if there are any
``headline``           the headline's name                                          if evaluated,
                                                                                    not ``accuracy``
``accuracy``           in [0, 1], on the test set; and whatever else the task       if evaluated
                       measures
``loss``               nats, mean over the test set                                 if evaluated
``client_accuracy``    in [0, 1], mean over the clients of that on their own       if evaluated and
                       shares of the test set; ``client_accuracy_std`` over them,  ``client_tests``
                       ``client_accuracy_worst`` of the worst tenth of them
``groups``             the task's metrics of each named group of test rows          if evaluated and
                                                                                    any are named
``worst``, ``gap``     the headline of the worst group; the best group's minus it,  the same
                       or that of ``seen`` minus that of ``unseen``
``validation_``        and the headline, and the loss: of the training images that  if evaluated and
                       are held out                                                 ``validation``
``client_norm``        sqrt(mean_k abs(w_k - w)^2), l2 lengths of the round's       if evaluated
                       updates
``client_drift``       sqrt(mean_k abs(w_k - mean)^2)                               if evaluated
``update_norm``        abs(w_new - w)                                               if evaluated
``task_accuracy``      in [0, 1], of each task begun so far, a list                 if evaluated, in
                                                                                    lifelong runs
``unseen_accuracy``    in [0, 1], of each task not begun yet, a list                the same
=====================  ===========================================================  ================

summary.json is written when a run ends, however it does.

=====================  =============================================================================
key                    meaning
=====================  =============================================================================
``finished``           whether it went to its end: all rounds, or an early stop
``ended``              why it ended, in words
``headline``           the headline's name, where it is not ``accuracy``
``final_accuracy``     in [0, 1]: mean of the evaluations in the last 100 rounds; null without one
``last_accuracy``      in [0, 1]: of the last evaluation
``best_accuracy``      in [0, 1]: the largest of all evaluations
``client_accuracy``    and those beside it in metrics.jsonl, of the last evaluation
``groups``             where there are groups: the headline of each, the mean of the evaluations in
                       the last 100 rounds; ``worst`` and ``gap`` are those of these means
``selected_round``     where there is validation: the first round of the best validation headline,
                       with that, ``validation_accuracy``, and the test result of that round,
                       ``selected_accuracy``: what was chosen without a look at the test set, which
                       ``best_accuracy`` was not
``evaluations``        how many, without that of round 0
``rounds``             how many were played
``seconds``            that the run took, by the wall clock
``rounds_per_second``  of training alone, without evaluations
``parameters``         how many the model trains
``split``              how unlike the clients are: ``fedsam.data.partition.heterogeneity``
``versions``           of the packages that a result depends on
``seals``              of a run that has finished: SHA-256 of config.yaml, metrics.jsonl,
                       partition.npz and the models, by name
``seal``               of the rest of this file, as ``runs/seals.py`` makes it
``lifelong``           of a lifelong run: ``accuracy_matrix`` a, where a[k][j] is the accuracy on
                       task j after task k; ``average_accuracy``, ``forgetting``,
                       ``backward_transfer`` and ``forward_transfer``, null before the last task is
                       done
=====================  =============================================================================

Average accuracy and forgetting are those of Chaudhry et al., "Riemannian Walk for Incremental
Learning", ECCV 2018, section 3; backward and forward transfer those of Lopez-Paz and Ranzato,
"Gradient Episodic Memory for Continual Learning", NeurIPS 2017 (arXiv 1706.08840), section 2.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import mean, pstdev
from typing import TYPE_CHECKING, Any

from fedsam import tasks

if TYPE_CHECKING:  # who reads keys needs no torch
    from torch import Tensor

ROUND = "round"
SECONDS = "seconds"
CLIENTS = "clients"
TRAIN = "train_"  # and the name of what clients report
TRAIN_LOSS = f"{TRAIN}loss"
LEFT_OUT = "left_out"
HEADLINE = "headline"
LOSS = "loss"
GROUPS = "groups"
WORST = "worst"
GAP = "gap"
SEEN = "seen"  # the group of the domains that clients train on
UNSEEN = "unseen"  # and that of the one which is left out
VALIDATION = "validation"
CLIENT_NORM = "client_norm"
CLIENT_DRIFT = "client_drift"
UPDATE_NORM = "update_norm"

FINISHED = "finished"
ENDED = "ended"
SEALS = "seals"
SEAL = "seal"
EVALUATIONS = "evaluations"
ROUNDS = "rounds"
ROUNDS_PER_SECOND = "rounds_per_second"
SELECTED_ROUND = "selected_round"
PARAMETERS = "parameters"
SPLIT = "split"
VERSIONS = "versions"
LIFELONG = "lifelong"
FORGETTING = "forgetting"
BACKWARD_TRANSFER = "backward_transfer"
FORWARD_TRANSFER = "forward_transfer"

ALL_ROUNDS = "all rounds done"  # why most runs end
LAST = 100  # rounds whose evaluations make the final number, as in the paper

Line = Mapping[str, Any]
Matrix = Sequence[Sequence[float]]


def named(headline: str) -> dict[str, str]:
    """Return what a line or a summary says of its headline: nothing, if it is the usual one."""
    return {} if headline == tasks.HEADLINE else {HEADLINE: headline}


def headline_of(said: Line) -> str:
    """Return the name of the headline of a summary, or of a line that was evaluated."""
    headline: str = said.get(HEADLINE, tasks.HEADLINE)
    return headline


def headline_in(lines: Sequence[Line]) -> str:
    """Return the name of the headline of a run's lines."""
    return next((headline_of(line) for line in lines if HEADLINE in line), tasks.HEADLINE)


def words_of(headline: str) -> str:
    """Return a headline's name as one reads it."""
    return tasks.ABBREVIATIONS.get(headline, headline.replace("_", " "))


def heading(text: str) -> str:
    """Return a text that begins with a capital letter, or with an abbreviation as it is written."""
    first = text.partition(" ")[0]
    return text[:1].upper() + text[1:] if first.islower() else text


def finals(headline: str) -> tuple[str, str, str]:
    """Return the keys of a summary that hold the final, the last and the best number."""
    return f"final_{headline}", f"last_{headline}", f"best_{headline}"


def of_validation(name: str) -> str:
    """Return the key of a metric of the training images that are held out."""
    return f"{VALIDATION}_{name}"


def of_selected(headline: str) -> str:
    """Return the key of the headline in the round that validation chooses."""
    return f"selected_{headline}"


def of_selection(headline: str) -> tuple[str, str, str]:
    """Return a summary's keys of what validation chose: round, its validation, its test result."""
    return SELECTED_ROUND, of_validation(headline), of_selected(headline)


def of_clients(headline: str) -> str:
    """Return the key of the mean over clients, with which those beside it begin."""
    return f"client_{headline}"


def of_tasks(headline: str) -> tuple[str, str]:
    """Return the keys of a lifelong run's tasks: of those begun, and of those to come."""
    return f"task_{headline}", f"unseen_{headline}"


def of_lifelong(headline: str) -> tuple[str, ...]:
    """Return the keys of the numbers that a summary has of a lifelong run."""
    return f"average_{headline}", FORGETTING, BACKWARD_TRANSFER, FORWARD_TRANSFER


def line_of_round(
    number: int,
    seconds: float,
    clients: Sequence[int],
    reported: Mapping[str, float],
    left_out: Sequence[int],
) -> dict[str, Any]:
    """Return the line of a round, before what an evaluation adds.

    Parameters
    ----------
    number : int
        From 1.
    seconds : float
        Wall-clock time of the round.
    clients : sequence of int
        The cohort.
    reported : mapping
        The clients' metrics, as the strategy aggregated them; marked as training's here.
    left_out : sequence of int
        Clients whose update was not used.
    """
    line = {ROUND: number, SECONDS: seconds, CLIENTS: list(clients)}
    line |= {f"{TRAIN}{name}": value for name, value in reported.items()}
    return line | ({LEFT_OUT: list(left_out)} if left_out else {})


def curve(lines: Sequence[Line], key: str) -> dict[int, Any]:
    """Return a number of metrics.jsonl by round, where it stands and is finite."""
    return {line[ROUND]: line[key] for line in lines if line.get(key) is not None}


def reaches(lines: Sequence[Line], target: float) -> tuple[int, float] | None:
    """Return rounds and training seconds to the first evaluation at a target, if any."""
    seconds, headline = 0.0, headline_in(lines)
    for line in lines:
        seconds += line.get(SECONDS) or 0.0
        if (line.get(headline) or 0.0) >= target:
            return line[ROUND], seconds
    return None


def summary_of(lines: Sequence[Line]) -> dict[str, Any]:
    """Return those numbers of summary.json that follow from the lines alone."""
    rounds = max((line[ROUND] for line in lines), default=0)  # a signal came first
    headline = headline_in(lines)
    tests = [line for line in lines if line.get(headline) is not None and line[ROUND]]
    late = [line for line in tests if line[ROUND] > rounds - LAST]
    values = [line[headline] for line in tests]
    final, last, best = finals(headline)
    training = sum(line.get(SECONDS) or 0.0 for line in lines)
    by_clients = {
        key: value
        for key, value in (tests[-1] if tests else {}).items()
        if key.startswith(of_clients(headline))
    }
    return {
        **by_clients,
        **named(headline),
        final: _mean(late, headline),
        last: values[-1] if tests else None,
        best: max(values) if tests else None,
        **_summary_of_groups(late, headline),
        **selection(tests, headline),
        EVALUATIONS: len(tests),
        ROUNDS: rounds,
        ROUNDS_PER_SECOND: rounds / training if training else None,
    }


def selection(tests: Sequence[Line], headline: str) -> dict[str, Any]:
    """Return the round of the best validation, the first of equals, and what it came to.

    The test set has no part in the choice: "training-domain validation" of Gulrajani and Lopez-Paz,
    ICLR 2021 (arXiv 2007.01434).
    """
    key = of_validation(headline)
    validated = [line for line in tests if line.get(key) is not None]
    if not validated:
        return {}
    chosen = max(validated, key=lambda line: line[key])
    values = chosen[ROUND], chosen[key], chosen[headline]
    return dict(zip(of_selection(headline), values, strict=True))


def _mean(lines: Sequence[Line], key: str) -> float | None:
    """Return the mean of a number over the lines; None without one."""
    values = [line[key] for line in lines if line[key] is not None]
    return math.fsum(values) / len(values) if values else None


def _summary_of_groups(late: Sequence[Line], headline: str) -> dict[str, Any]:
    """Return the mean headline of each group over the late evaluations, the worst and the gap."""
    evaluated = [line[GROUPS] for line in late if GROUPS in line]
    if not evaluated:
        return {}
    means = {n: _mean([groups[n] for groups in evaluated], headline) for n in evaluated[-1]}
    return {GROUPS: means} | worst_and_gap(means)


def worst_and_gap(groups: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return the smallest of the groups' numbers, and the largest minus it.

    Where there are groups ``seen`` and ``unseen``, the gap is from that to this.
    """
    numbers = groups.items()
    known = {n: value for n, value in numbers if value is not None and math.isfinite(value)}
    if not known:
        return {WORST: None, GAP: None}
    if {SEEN, UNSEEN} <= groups.keys():
        both = SEEN in known and UNSEEN in known
        gap = known[SEEN] - known[UNSEEN] if both else None
    else:
        gap = max(known.values()) - min(known.values())
    return {WORST: min(known.values()), GAP: gap}


def matrix(lines: Sequence[Line], ends: Sequence[int]) -> list[list[float]]:
    """Return a: a[k][j], the headline on task j after task k, j <= k; of the tasks that are done.

    Parameters
    ----------
    lines : sequence of mapping
        Of metrics.jsonl.
    ends : sequence of int
        The last round of each task.
    """
    key, _ = of_tasks(headline_in(lines))
    by_round = {line[ROUND]: list(line[key]) for line in lines if key in line}
    return [by_round[end] for end in ends if end in by_round]


def average(a: Matrix) -> float:
    """Return the mean over all tasks of the headline after the last."""
    return mean(a[-1])


def forgetting(a: Matrix) -> float:
    """Return the mean, over all tasks but the last, of the best number before minus the final."""
    last = len(a) - 1
    return mean(max(row[j] for row in a[j:last]) - a[last][j] for j in range(last))


def over_clients(values: Sequence[float], headline: str) -> dict[str, float]:
    """Return mean and standard deviation of the clients' headlines, and the worst tenth's mean."""
    ordered, key = sorted(values), of_clients(headline)
    worst = ordered[: max(1, len(ordered) // 10)]
    return {key: mean(ordered), f"{key}_std": pstdev(ordered), f"{key}_worst": mean(worst)}


def backward_transfer(a: Matrix) -> float:
    """Return the mean, over all tasks but the last, of the final number minus that at its end."""
    last = len(a) - 1
    return mean(a[last][j] - a[j][j] for j in range(last))


def forward_transfer(lines: Sequence[Line], ends: Sequence[int]) -> float | None:
    """Return the mean, over all tasks but the first, of the headline just before minus that at 0.

    Just before a task is learnt, and before any training; None where a line does not have them.
    """
    _, key = of_tasks(headline_in(lines))
    unseen = {line[ROUND]: list(line[key]) for line in lines if key in line}
    if any(number not in unseen for number in (0, *ends[:-1])):
        return None
    before = unseen[0]  # of the second task and those behind it
    return mean(unseen[end][0] - before[task] for task, end in enumerate(ends[:-1]))


def lifelong_summary(lines: Sequence[Line], ends: Sequence[int]) -> dict[str, Any]:
    """Return what summary.json says of a lifelong run, whose tasks end with these rounds."""
    a, headline = matrix(lines, ends), headline_in(lines)
    whole = len(a) == len(ends)
    return {
        f"{headline}_matrix": a,
        f"average_{headline}": average(a) if whole else None,
        FORGETTING: forgetting(a) if whole else None,
        BACKWARD_TRANSFER: backward_transfer(a) if whole else None,
        FORWARD_TRANSFER: forward_transfer(lines, ends) if whole else None,
    }


def drift(before: "Tensor", clients: "Sequence[Tensor]", after: "Tensor") -> dict[str, float]:
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
    import torch

    # an update at a time: all K of them are as much memory as the replies
    mean = clients[0] - before
    for w_k in clients[1:]:
        mean += w_k - before
    mean /= len(clients)
    walked = torch.stack([(w_k - before).norm() for w_k in clients])
    apart = torch.stack([(w_k - before).sub_(mean).norm() for w_k in clients])
    lengths = walked.square().mean().sqrt(), apart.square().mean().sqrt(), (after - before).norm()
    keys = CLIENT_NORM, CLIENT_DRIFT, UPDATE_NORM
    return dict(zip(keys, torch.stack(lengths).tolist(), strict=True))
