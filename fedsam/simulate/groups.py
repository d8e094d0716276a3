"""Which images are told of together, and what a line of metrics.jsonl says of them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedsam.base.errors import UsageError
from fedsam.base.randomness import numpy_generator
from fedsam.config.schema import Config
from fedsam.data import groups
from fedsam.data.datasets import Dataset
from fedsam.data.groups import Groups, Places
from fedsam.data.partition import shares_of_test
from fedsam.data.partitions.held_out import HeldOut
from fedsam.runs import metrics
from fedsam.tasks import headline_of
from fedsam.training.client import Trainer

ByNumber = Mapping[int, dict[str, float]]  # the task's metrics of each group


def test_groups(config: Config, dataset: Dataset) -> Groups:
    """Return the groups of test images that have names."""
    if config.test_groups == "classes":
        return groups.by_class(dataset.classes_of_test, dataset.classes)
    named = {} if dataset.test_domains is None else dict(_by_domain(dataset))
    if config.leave_out:
        for name in (metrics.SEEN, metrics.UNSEEN, metrics.VALIDATION):
            if name in dataset.domain_names:
                raise UsageError(
                    f"--leave-out: a domain of {dataset.name} is called {name!r}, as a group of "
                    "several is; give it another name"
                )
        return {metrics.UNSEEN: torch.arange(len(dataset.test_labels)), **named}
    return named | dict(dataset.test_groups or {})


def _by_domain(dataset: Dataset) -> Groups:
    """Return the test rows of each domain that has any."""
    assert dataset.test_domains is not None
    names = enumerate(dataset.domain_names)
    rows = {name: (dataset.test_domains == n).nonzero()[:, 0] for n, name in names}
    return {name: of_domain for name, of_domain in rows.items() if len(of_domain)}


def beside_groups(config: Config, held: HeldOut) -> Groups:
    """Return the groups of the images that are evaluated beside the test set."""
    validation = {metrics.VALIDATION: held.validation} if len(held.validation) else {}
    if not len(held.seen) or config.test_groups == "classes":
        return validation
    return validation | {metrics.SEEN: held.seen, **held.domains}


class EvaluationGroups:
    """The clients' shares of the test set, a lifelong run's tasks, and groups that have names.

    Attributes
    ----------
    places : Places
        Where they lie in the test set: clients, tasks and named groups, numbered in this order.
    beside : Places
        Where the groups of the images beside the test set lie among those.
    """

    def __init__(self, config: Config, trainer: Trainer) -> None:
        self.trainer = trainer
        self.clients = _shares(config, trainer) if config.client_tests else []
        lifelong = trainer.lifelong
        self.tasks = lifelong.rows_by_task(trainer.test.classes) if lifelong else []
        self.places = Places([*self.clients, *self.tasks, *trainer.groups.values()])
        self.named_beside = trainer.beside.groups if trainer.beside else {}
        self.beside = Places(list(self.named_beside.values()))

    def told(self, by_group: ByNumber, beside: ByNumber, round: int) -> dict[str, Any]:
        """Return what a line says of them after a round, from the task's metrics of each."""
        headline, line = headline_of(self.trainer.task), dict[str, Any]()
        first, end = len(self.clients), len(self.clients) + len(self.tasks)
        if self.clients:
            having = [number for number in range(first) if number in by_group]
            line |= metrics.over_clients([by_group[n][headline] for n in having], headline)
        if self.trainer.lifelong is not None:
            begun = self.trainer.lifelong.at(round) + 1
            of_tasks = [by_group[number][headline] for number in range(first, end)]
            parts = of_tasks[:begun], of_tasks[begun:]
            line |= dict(zip(metrics.of_tasks(headline), parts, strict=True))
        named = {name: by_group[n] for n, name in enumerate(self.trainer.groups, end)}
        named |= {name: beside[number] for number, name in enumerate(self.named_beside)}
        if validation := named.pop(metrics.VALIDATION, None):
            line |= {
                metrics.of_validation(key): validation[key] for key in (headline, metrics.LOSS)
            }
        if named:
            line[metrics.GROUPS] = named
            line |= metrics.worst_and_gap({n: of[headline] for n, of in named.items()})
        return line


def _shares(config: Config, trainer: Trainer) -> list[Tensor]:
    """Return which test images are whose."""
    partition = shares_of_test(
        trainer.partition,
        trainer.train.classes.cpu(),
        trainer.test.classes.cpu(),
        numpy_generator(config.seed, "client tests"),
    )
    return [partition[client] for client in range(len(partition))]
