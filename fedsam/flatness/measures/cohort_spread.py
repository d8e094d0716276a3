"""Where the clients of one round end: how far from each other, and what their average is worth."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from torch import Tensor

from fedsam.base.errors import UsageError
from fedsam.base.vector import weighted_mean
from fedsam.flatness.measures.connectivity import barrier, steps
from fedsam.flatness.measures.landscape import (
    Named,
    combined,
    cosine,
    distance,
    evaluate,
    folded,
    samples,
    settings_of,
)
from fedsam.flatness.objective import full_precision
from fedsam.flatness.subject import (
    Subject,
    Tick,
    opened,
    read_model,
    silent,
)
from fedsam.runs.files import MODEL, round_of
from fedsam.runs.metrics import drift
from fedsam.simulate.run import sampling
from fedsam.training.client import ClientJob, Trainer


@dataclass(frozen=True)
class TrainedCohort:
    """The models of one round's clients.

    Attributes
    ----------
    subject : Subject
        The global model that they started from, with its data.
    clients : list of int
        Their numbers.
    states : list of Tensor
        Where they ended, K times (S,).
    average : Tensor
        FedAvg of them, (S,): weighted by images.
    """

    subject: Subject
    clients: list[int]
    states: list[Tensor]
    average: Tensor

    def subjects(self, count: int = 3) -> list[Named]:
        """Return the first clients' models by name, as ``plane`` takes them."""
        return [
            (f"client {client}", self.subject.with_state(state))
            for client, state in list(zip(self.clients, self.states, strict=True))[:count]
        ]


def train_cohort(
    trainer: Trainer,
    state: Tensor,
    clients: Sequence[int],
    *,
    round: int,
    lr: float,
    tick: Tick = silent,
) -> TrainedCohort:
    """Train clients for one round, one after the other, as the run's engine would.

    Parameters
    ----------
    trainer : Trainer
        The run's.
    state : Tensor
        The global model (S,); not changed.
    clients : sequence of int
        The cohort.
    round : int
        From 1: which mini-batches and augmentations are drawn.
    lr : float
        The clients' learning rate.
    tick : callable
        Is told how many clients have trained.

    Notes
    -----
    A client that remembers vectors (SCAFFOLD, FedDyn) starts as in its first round.
    """
    network = trainer.new_network()
    ended = []
    with full_precision(network.layout.device):
        for done, client in enumerate(clients, 1):
            ended.append(trainer.train_client(network, ClientJob(client, state, round, lr)))
            tick(done, len(clients))
    states = [done.state for done in ended]
    average = weighted_mean(states, [done.examples for done in ended])
    return TrainedCohort(Subject.of(trainer, state), list(clients), states, average)


def cohort_spread(
    cohort: TrainedCohort,
    *,
    points: int = 11,
    images: int = 1000,
    update_bn: int = 0,
    tick: Tick = silent,
) -> dict[str, Any]:
    """Return how far a round's clients walk apart, and what lies between them and their average.

    Parameters
    ----------
    cohort : TrainedCohort
        What ``train_cohort`` returned.
    points : int
        Of each line from a client's model to the average, with its ends.
    images : int
        Of each set, at most; 0: all.
    update_bn : int
        Training images on which BatchNorm's statistics are computed anew at each point of the
        lines; 0: they lie on the line.
    tick : callable
        Is told how many models have been evaluated.

    Returns
    -------
    dict
        ``distances`` (K, K) between the clients' models and ``cosines`` (K, K) between their
        updates; ``clients``: number, images, the loss on the client's own training images before
        and after, ``train_loss`` and the others on the samples, and the ``_barrier`` of each on the
        way to the average. The scalars sum up:

        client_norm, client_drift, update_norm
            As metrics.jsonl has them.
        distance_mean, distance_max, cosine_mean, cosine_min
            Over pairs; 0 for a single client.
        own_loss_before, own_loss_after
            Mean over clients of the loss on their own images.
        train_loss, train_loss_gap, train_loss_barrier (and error, and test)
            Of the average; its own less the clients' mean; the mean barrier.
    """
    subject, clients, states = cohort.subject, cohort.clients, cohort.states
    t, rows = steps(points), samples(subject, images)
    trainable = subject.network.layout.trainable
    owned = [subject.partition[client] for client in clients]
    lines = len(clients) * points
    total = lines + 2 * len(clients)

    def between() -> Any:
        for state in states:
            for s in t:
                yield combined((state, cohort.average), (1 - s, s), trainable)

    curves = evaluate(subject, between(), total, rows, tick, update_bn=update_bn)
    own = []
    for number, (state, images_of) in enumerate(zip(states, owned, strict=True)):
        for which, model in enumerate((subject.state, state)):
            objective = subject.with_state(model).objective("train", images_of)
            own.append(float(objective.loss(objective.w)))
            tick(lines + 2 * number + which + 1, total)
    of_clients = {name: folded(values, points) for name, values in curves.whole.items()}
    table: list[dict[str, Any]] = []
    for number, client in enumerate(clients):
        row: dict[str, Any] = {"client": client, "images": len(owned[number])}
        row |= {"own_loss_before": own[2 * number], "own_loss_after": own[2 * number + 1]}
        for name, each in of_clients.items():
            row |= {name: each[number][0], f"{name}_barrier": barrier(t, each[number])}
        table.append(row)
    ends = [state[:trainable] for state in states]
    distances = [[distance(a, b) for b in ends] for a in ends]
    updates = [end - subject.w for end in ends]
    cosines = [[cosine(a, b) for b in updates] for a in updates]
    summary = curves.summarised(partial(worth, t))
    summary["scalars"] = {
        **drift(subject.w, ends, cohort.average[:trainable]),
        **summed_up(distances, cosines),
        "own_loss_before": mean(own[::2]),
        "own_loss_after": mean(own[1::2]),
        **summary["scalars"],
    }
    return {
        **summary,
        "settings": settings_of(subject, rows, points=points, update_bn=update_bn),
        "clients": table,
        "distances": distances,
        "cosines": cosines,
    }


def summed_up(distances: list[list[float]], cosines: list[list[float]]) -> dict[str, float]:
    """Return mean and extreme of two symmetric tables, without their diagonals."""
    size = len(distances)
    pairs = [(i, j) for i in range(size) for j in range(i)]
    apart = [distances[i][j] for i, j in pairs] or [0.0]
    alike = [cosines[i][j] for i, j in pairs] or [0.0]
    return {
        "distance_mean": sum(apart) / len(apart),
        "distance_max": max(apart),
        "cosine_mean": sum(alike) / len(alike),
        "cosine_min": min(alike),
    }


def worth(t: Sequence[float], values_by_name: dict[str, list[float]]) -> dict[str, float]:
    """Return for each metric the average's, its own less the clients' mean, and the barrier.

    The values are those of a line a client, from its model to the average.
    """
    scalars: dict[str, float] = {}
    for name, values in values_by_name.items():
        lines = folded(values, len(t))
        of_average = lines[0][-1]
        scalars |= {
            name: of_average,
            f"{name}_gap": of_average - mean(line[0] for line in lines),
            f"{name}_barrier": mean(barrier(t, line) for line in lines),
        }
    return scalars


def cohort_of_run(
    folder: Path,
    model: str = MODEL,
    tick: Tick = silent,
    *,
    device: str = "",
    data_root: str = "",
) -> TrainedCohort:
    """Return the clients of the round that would follow on a model of a run, trained from it.

    Their learning rate is the config's in its last round; what an average changes is not seen.
    """
    config, trainer = opened(folder, device=device, data_root=data_root)
    if config.lora:
        raise UsageError(
            f"--on clients: {folder} trained with --lora: its model holds W, and not the A and B "
            "that its clients train"
        )
    number = config.rounds if (after := round_of(model)) is None else after
    clients = sampling(config, trainer)(number + 1)
    state, lr = read_model(folder, model, trainer.layout), config.rate(number)
    return train_cohort(trainer, state, clients, round=number + 1, lr=lr, tick=tick)
