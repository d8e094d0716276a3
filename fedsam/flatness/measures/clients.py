"""Federated evaluation: how well the model serves each client, and the worst served."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsam.base.errors import UsageError
from fedsam.base.randomness import torch_generator
from fedsam.data.images import Images
from fedsam.data.partition import Partition
from fedsam.flatness.measures.evaluation import headline_in
from fedsam.flatness.objective import full_precision
from fedsam.flatness.subject import Subject
from fedsam.runs.metrics import LOSS, named
from fedsam.tasks import headline_of

CHUNK = 500  # images at a time
WORST = 0.1  # share of the clients
LISTED = 1000  # clients whose values are written one by one; of more, only quantiles


def clients(subject: Subject) -> dict[str, Any]:
    """Return headline and loss of the model on each client's images, and what they come to.

    Two sets a client: its own training images, without augmentation; and, as no data set here
    comes with test images of its clients, a local test set of as many test images of each class as
    it has training images of it, drawn with replacement and keyed by the seed. Every image goes
    through the model once, however many clients hold it.

    Parameters
    ----------
    subject : Subject
        Its task's ``statistics`` must work under ``torch.vmap``, its targets be labels (N,).

    Returns
    -------
    dict
        ``scalars``: ``SET_METRIC_STATISTIC`` for SET ``train`` and ``local_test``, METRIC
        the headline (``accuracy``) and ``loss``, STATISTIC ``mean`` over the clients,
        ``weighted_mean`` (by their images), ``deviation`` (over the clients, of the population),
        ``worst_tenth`` (mean of the worst 10 % of the clients, rounded up) and ``bottom`` (the
        worst client); ``bottom_client`` is its number, the lowest where several tie. ``quantiles``:
        at 0, 1, ..., 100 %; ``values`` by client if there are at most 1,000. ``settings``.
    """
    own = subject.partition
    local = local_tests(own, subject.train.classes.cpu(), subject.test.classes.cpu(), subject.seed)
    scalars: dict[str, float] = {}
    quantiles, values = {}, {}
    for name, images, split in (("train", subject.train, own), ("local_test", subject.test, local)):
        for metric, of_clients in by_client(subject, images, split).items():
            scalars |= {
                f"{name}_{metric}_{key}": value
                for key, value in spread(of_clients, split.sizes.numpy(), metric == LOSS).items()
            }
            quantiles[f"{name}_{metric}"] = np.quantile(of_clients, np.linspace(0, 1, 101)).tolist()
            values[f"{name}_{metric}"] = of_clients.tolist() if len(own) <= LISTED else []
    settings = {
        **named(headline_of(subject.task)),
        "clients": len(own),
        "worst": f"{WORST:.0%} of the clients, rounded up",
        "local_test": "test images with the label counts of the client's training images, drawn "
        "with replacement",
        "seed": subject.seed,
    }
    return {"scalars": scalars, "settings": settings, "quantiles": quantiles, "values": values}


def by_client(subject: Subject, images: Images, split: Partition) -> dict[str, NDArray[np.float64]]:
    """Return headline in [0, 1] and mean loss in nats of each client, (clients,)."""
    each = statistics_of_each(subject, images, split.indices)
    owner = torch.repeat_interleave(torch.arange(len(split)), split.sizes)
    # on the CPU, where index_add adds in order: the same bytes every time
    totals = each.new_zeros(len(split), each.shape[1]).index_add_(0, owner, each[split.indices])
    rows = [subject.task.metrics(total) for total in totals]
    headlines = np.array([headline_in(subject.task, row) for row in rows])
    return {headline_of(subject.task): headlines, LOSS: np.array([row[LOSS] for row in rows])}


@torch.no_grad()
def statistics_of_each(subject: Subject, images: Images, needed: Tensor) -> Tensor:
    """Return the task's statistics of each image by itself, float64 (N, ...), on the CPU.

    Of images that are not ``needed``, zeros.
    """
    subject.network.load(subject.state)
    subject.network.module.eval()
    once = needed.unique()
    parts = []
    with full_precision(subject.network.layout.device):
        for rows in once.to(images.targets.device).split(images.at_a_time(CHUNK)):
            batch = images.rows(rows)
            output = subject.network.forward(batch.images)
            each = torch.vmap(subject.task.statistics)(output[:, None], batch.targets[:, None])
            parts.append(each.double().cpu())
    known = torch.cat(parts)
    return known.new_zeros(len(images), known.shape[1]).index_copy_(0, once, known)


def local_tests(own: Partition, train: Tensor, test: Tensor, seed: int) -> Partition:
    """Return a test set for each client, with the label counts of its training images.

    Parameters
    ----------
    own : Partition
        Of the training images.
    train, test : Tensor
        Labels, int64 (N,) and (M,).
    seed : int
        The draw is a function of it and of the partition.

    Returns
    -------
    Partition
        Rows of the test set, client after client; one may stand several times.
    """
    if test.dim() != 1:
        raise UsageError("local test sets need one label an image; this task's targets are others")
    classes = int(max(train.max(), test.max())) + 1
    per_class = torch.bincount(test, minlength=classes)
    labels = train[own.indices]
    if bool((per_class[labels] == 0).any()):
        lacking = int(labels[per_class[labels] == 0][0])
        raise UsageError(f"local test sets: no test image has label {lacking}")
    begins = per_class.cumsum(0) - per_class
    by_class = test.argsort(stable=True)
    u = torch.rand(len(labels), generator=torch_generator(seed, "local test"), dtype=torch.float64)
    drawn = by_class[begins[labels] + (u * per_class[labels]).long()]
    return Partition(drawn, own.offsets)


def spread(
    values: NDArray[np.float64], sizes: NDArray[np.int64], high_is_bad: bool
) -> dict[str, float]:
    """Return what the values of the clients (clients,) come to; sizes are their images."""
    badness = values if high_is_bad else -values
    worst = np.argsort(-badness, kind="stable")
    tenth = worst[: -(-len(values) // round(1 / WORST))]
    return {
        "mean": float(values.mean()),
        "weighted_mean": float(np.average(values, weights=sizes)),
        "deviation": float(values.std()),
        "worst_tenth": float(values[tenth].mean()),
        "bottom": float(values[worst[0]]),
        "bottom_client": int(worst[0]),
    }
