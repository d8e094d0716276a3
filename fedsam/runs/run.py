"""Finished runs, read back from their folders."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from fedsam.base.errors import UsageError
from fedsam.config.schema import Config, resolve


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
    def accuracy(self) -> float:
        """Mean of the last 100 rounds' evaluations, in [0, 1]; NaN without one."""
        value = self.summary["final_accuracy"]
        return math.nan if value is None else float(value)

    @cached_property
    def measures(self) -> dict[str, dict[str, float]]:
        """The finite numbers that were measured of the evaluated model, by measure and name.

        Those of flatness.json, and a lifelong run's own.

        Raises
        ------
        UsageError
            If flatness.json is damaged.
        """
        file, found = self.path / "flatness.json", {}
        try:
            read = json.loads(file.read_text()).get("model", {}) if file.exists() else {}
            found = {measure: dict(held["scalars"]) for measure, held in read.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{file}: damaged: {error!r}") from error
        lifelong = self.summary.get("lifelong", {})
        found["lifelong"] = {
            key.replace("_", " "): lifelong.get(key) for key in ("average_accuracy", "forgetting")
        }
        numbers = {measure: _numbers(scalars) for measure, scalars in found.items()}
        return {measure: scalars for measure, scalars in numbers.items() if scalars}

    def plot(self) -> Any:
        """Return a matplotlib figure of accuracy and loss over rounds.

        A notebook shows it once ``%matplotlib inline`` was said.
        """
        from fedsam.runs.plots import curves_of

        return curves_of(self.metrics)

    def model(self) -> Any:
        """Return the network that was evaluated, on the CPU and in eval mode."""
        from safetensors.torch import load_file

        module = self.new_network(self.config)
        module.load_state_dict(load_file(self.path / "model.safetensors"))
        return module.eval()

    def partition_counts(self) -> Any:
        """Return how many images of each class each client holds: int64 (clients, classes)."""
        import numpy as np
        import torch

        try:
            with np.load(self.path / "partition.npz", allow_pickle=False) as archive:
                return torch.from_numpy(archive["counts"])
        except (OSError, KeyError, ValueError, BadZipFile) as error:
            raise UsageError(f"{self.path}: damaged partition.npz: {error}") from error

    def curve(self, name: str) -> dict[int, float]:
        """Return a metric by round, where it was measured."""
        return {line["round"]: line[name] for line in self.metrics if line.get(name) is not None}

    def reaches(self, target: float) -> tuple[int, float] | None:
        """Return rounds and training seconds to the first evaluation at ``target``, if any."""
        seconds = 0.0
        for line in self.metrics:
            seconds += line.get("seconds") or 0.0
            if (line.get("accuracy") or 0.0) >= target:
                return line["round"], seconds
        return None


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
        if not summary["finished"]:
            raise UsageError(f"{path}: no finished run: {summary['ended']}")
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        return Run(path, resolve({}, path / "config.yaml"), lines, summary, new_network)
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
        if (path / "config.yaml").exists():
            runs.append(load(path))
            continue
        below = [load(folder) for folder in folders_below(path) if finished(folder)]
        if not below:
            raise UsageError(f"{path}: no finished run in it")
        runs += below
    return runs


def folders_below(path: Path) -> list[Path]:
    """Return the folders of all runs below ``path``, finished or not."""
    return sorted(config.parent for config in path.rglob("config.yaml"))


def finished(folder: Path) -> bool:
    """Return whether a folder holds a run that went to its end."""
    return ending(folder)[0]


def ending(folder: Path) -> tuple[bool, str]:
    """Return whether a folder holds a run that went to its end, and why it ended, if it did."""
    if not (folder / "summary.json").exists():
        return False, ""
    summary = _summary(folder)
    return summary["finished"], summary["ended"]


def _summary(folder: Path) -> dict[str, Any]:
    try:
        read = json.loads((folder / "summary.json").read_text())
    except json.JSONDecodeError as error:
        raise UsageError(f"{folder}: damaged summary.json: {error}") from error
    return {"finished": False, "ended": "unknown"} | read
