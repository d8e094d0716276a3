"""Which test rows are told of together, and what a line of metrics.jsonl says of them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fedsam.base.randomness import numpy_generator
from fedsam.config.schema import Config
from fedsam.data.groups import Places
from fedsam.data.partition import shares_of_test
from fedsam.runs import metrics
from fedsam.tasks import headline_of
from fedsam.training.client import Trainer


class EvaluationGroups:
    """The clients' shares of the test set, a lifelong run's tasks, and groups that have names.

    Attributes
    ----------
    places : Places
        Where they lie: clients, tasks and named groups, numbered in this order.
    """

    def __init__(self, config: Config, trainer: Trainer) -> None:
        self.trainer = trainer
        self.clients = _shares(config, trainer) if config.client_tests else []
        lifelong = trainer.lifelong
        self.tasks = lifelong.rows_by_task(trainer.test.classes) if lifelong else []
        self.places = Places([*self.clients, *self.tasks, *trainer.groups.values()])

    def told(self, by_group: Mapping[int, dict[str, float]], round: int) -> dict[str, Any]:
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
        if self.trainer.groups:
            named = {name: by_group[n] for n, name in enumerate(self.trainer.groups, end)}
            line[metrics.GROUPS] = named
            line |= metrics.worst_and_gap(of_group[headline] for of_group in named.values())
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
