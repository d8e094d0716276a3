"""Finished runs, read back from their folders."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from fedsam import tasks
from fedsam.base.errors import UsageError
from fedsam.config.schema import Config, resolve
from fedsam.runs import files, metrics


def _no_network(config: Config) -> Any:
    raise TypeError("this run was read without its network: use fedsam.load")


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes
    ----------
    path : Path
        Its folder.
    config : Config
        What was run.
    metrics : list of dict
        metrics.jsonl, a row a round: ``pandas.DataFrame(run.metrics)`` is a table.
    summary : dict
        summary.json.
    new_network : callable
        From a config to its untrained network; what reads no model needs none.
    """

    path: Path
    config: Config
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]
    new_network: Callable[[Config], Any] = field(default=_no_network, repr=False, compare=False)

    @property
    def method(self) -> str:
        """The algorithm's name, with the average around it."""
        average = self.config.averaging
        return self.config.algorithm + ("" if average == "none" else f" + {average}")

    @property
    def central(self) -> bool:
        """Whether one client holds all images: there is no split then."""
        return self.config.clients == 1

    @property
    def headline(self) -> str:
        """Name of the metric that stands for the run: "accuracy", if its task names no other."""
        return metrics.headline_of(self.summary)

    @property
    def final(self) -> float:
        """Headline, mean of the last 100 rounds' evaluations, in [0, 1]; NaN without one."""
        value = self.summary[metrics.finals(self.headline)[0]]
        return math.nan if value is None else float(value)

    @property
    def accuracy(self) -> float:
        """Its ``final``, where the headline is the accuracy; NaN where it is another."""
        return self.final if self.headline == tasks.HEADLINE else math.nan

    @cached_property
    def measures(self) -> dict[str, dict[str, float]]:
        """The finite numbers that were measured of the evaluated model, by measure and name.

        Those of flatness.json, a lifelong run's own, and the headline of groups of test images.

        Raises
        ------
        UsageError
            If flatness.json is damaged.
        """
        file, scalars = self.path / files.FLATNESS, {}
        try:
            whole = json.loads(file.read_text()) if file.exists() else {}
            scalars = {
                name: dict(one["scalars"]) for name, one in whole.get(files.MODEL, {}).items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{file}: damaged: {error!r}") from error
        lifelong = self.summary.get(metrics.LIFELONG, {})
        scalars[metrics.LIFELONG] = {
            key.replace("_", " "): lifelong.get(key) for key in metrics.of_lifelong(self.headline)
        }
        scalars[metrics.GROUPS] = {
            **{key: self.summary.get(key) for key in (metrics.WORST, metrics.GAP)},
            **self.summary.get(metrics.GROUPS, {}),
        }
        numbers = {measure: _numbers(values) for measure, values in scalars.items()}
        return {measure: values for measure, values in numbers.items() if values}

    def plot(self) -> Any:
        """Return a matplotlib figure of headline and loss over rounds.

        A notebook shows it once ``%matplotlib inline`` was said.
        """
        from fedsam.runs.plots import curves_of

        return curves_of(self.metrics)

    def model(self) -> Any:
        """Return the network that was evaluated, on the CPU and in eval mode."""
        from safetensors.torch import load_file

        module = self.new_network(self.config)
        module.load_state_dict(load_file(files.weights(self.path, files.MODEL)))
        return module.eval()

    def partition_counts(self) -> Any:
        """Return how many images of each class each client holds: int64 (clients, classes)."""
        import numpy as np
        import torch

        try:
            with np.load(self.path / files.PARTITION, allow_pickle=False) as archive:
                return torch.from_numpy(archive["counts"])
        except (OSError, KeyError, ValueError, BadZipFile) as error:
            raise UsageError(f"{self.path}: damaged {files.PARTITION}: {error}") from error

    def curve(self, name: str) -> dict[int, float]:
        """Return a metric by round, where it was measured."""
        return metrics.curve(self.metrics, name)

    def reaches(self, target: float) -> tuple[int, float] | None:
        """Return rounds and training seconds to the first evaluation at ``target``, if any."""
        return metrics.reaches(self.metrics, target)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def load(path: Path, new_network: Callable[[Config], Any] = _no_network) -> Run:
    """Read the folder of one run; ``fedsam.load`` does so with its network.

    Raises
    ------
    UsageError
        If it is no folder of a finished run.
    """
    try:
        summary = _summary(path)
        if not summary[metrics.FINISHED]:
            raise UsageError(f"{path}: no finished run: {summary[metrics.ENDED]}")
        lines = [json.loads(line) for line in (path / files.METRICS).read_text().splitlines()]
        return Run(path, resolve({}, path / files.CONFIG), lines, summary, new_network)
    except FileNotFoundError as error:
        name = Path(error.filename).name
        raise UsageError(f"{path}: no finished run: it has no {name}") from error
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}: damaged: {error}") from error


def load_all(paths: Sequence[Path]) -> list[Run]:
    """Read runs, and all finished runs below other folders.

    Raises
    ------
    UsageError
        If a path holds none.
    """
    runs = []
    for path in paths:
        if files.is_run(path):
            runs.append(load(path))
            continue
        below = [load(folder) for folder in files.folders_below(path) if finished(folder)]
        if not below:
            raise UsageError(f"{path}: no finished run in it")
        runs += below
    return runs


def finished(folder: Path) -> bool:
    """Return whether a folder holds a run that went to its end."""
    return ending(folder)[0]


def ending(folder: Path) -> tuple[bool, str]:
    """Return whether a folder holds a run that went to its end, and why it ended, if it did."""
    if not (folder / files.SUMMARY).exists():
        return False, ""
    summary = _summary(folder)
    return summary[metrics.FINISHED], summary[metrics.ENDED]


def _summary(folder: Path) -> dict[str, Any]:
    try:
        summary = json.loads((folder / files.SUMMARY).read_text())
    except json.JSONDecodeError as error:
        raise UsageError(f"{folder}: damaged {files.SUMMARY}: {error}") from error
    return {metrics.FINISHED: False, metrics.ENDED: "unknown"} | summary
