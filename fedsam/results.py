"""Finished runs, read back from their folders and gathered into a table of methods x settings."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from zipfile import BadZipFile

from fedsam.base.errors import UsageError
from fedsam.config.schema import HOW, Config, resolve

COLUMNS = ("dataset", "alpha", "clients_per_round")  # a table's columns, where they differ
# what may differ between runs of one cell; the last three are the method's name
APART = HOW | {"seed", "algorithm", "swa", "average"}


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
    """

    path: Path
    config: Config
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]

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
        from fedsam.plots import curves_of

        return curves_of(self.metrics)

    def model(self) -> Any:
        """Return the network that was evaluated, on the CPU and in eval mode."""
        from safetensors.torch import load_file

        from fedsam.experiment import load_dataset, new_model

        module = new_model(self.config, load_dataset(self.config))
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


def load(path: Path) -> Run:
    """Read the folder of one run.

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
        return Run(path, resolve({}, path / "config.yaml"), lines, summary)
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


@dataclass(frozen=True)
class Cell:
    """Runs that differ in their seed alone."""

    runs: tuple[Run, ...]

    @property
    def mean(self) -> float:
        """Mean of their accuracies, in [0, 1]."""
        return mean(run.accuracy for run in self.runs)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation of their accuracies; None for a single run."""
        return stdev(run.accuracy for run in self.runs) if len(self.runs) > 1 else None


class Grid:
    """Methods in rows, settings in columns.

    Parameters
    ----------
    runs : sequence of Run
        In any order; rows and columns are sorted.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = list(runs)

    @cached_property
    def column_keys(self) -> tuple[str, ...]:
        """The config keys that make a column."""
        split = [run for run in self.runs if not run.central] or self.runs
        runs = {key: self.runs if key == "dataset" else split for key in COLUMNS}
        return tuple(k for k in COLUMNS if len({getattr(r.config, k) for r in runs[k]}) > 1)

    @cached_property
    def row_keys(self) -> tuple[str, ...]:
        """Further keys in which runs of one method and setting differ; they part rows."""
        places: dict[Any, list[Run]] = {}
        for run in self.runs:
            places.setdefault((run.method, self.column(run)), []).append(run)
        keys = [k for k in Config.model_fields if k not in APART and k not in self.column_keys]
        return tuple(
            key
            for key in keys
            if any(_distinct(getattr(r.config, key) for r in runs) > 1 for runs in places.values())
        )

    def column(self, run: Run) -> tuple[Any, ...]:
        """Return the column that a run is in."""
        return tuple(getattr(run.config, key) for key in self.column_keys)

    def columns_of(self, run: Run) -> list[tuple[Any, ...]]:
        """Return the columns that a run stands in: a central one in all of its data set."""
        if not run.central:
            return [self.column(run)]
        beside = [r for r in self.runs if not r.central and r.config.dataset == run.config.dataset]
        return sorted({self.column(other) for other in beside}) or [self.column(run)]

    def row(self, run: Run) -> str:
        """Return the row that a run is in."""
        more = (self._told(run, key) for key in self.row_keys)
        return ", ".join(filter(None, [run.method, *more]))

    def _told(self, run: Run, key: str) -> str:
        """Return a key of a run in words; of options, what its method's runs differ in."""
        value = getattr(run.config, key)
        if not isinstance(value, dict):
            return f"{key} {value}"
        every = [getattr(r.config, key) for r in self.runs if r.method == run.method]
        entries = [e for e in value if _distinct(held.get(e) for held in every) > 1]
        return " ".join(f"{entry} {value[entry]}" for entry in entries)

    @cached_property
    def cells(self) -> dict[tuple[str, tuple[Any, ...]], Cell]:
        """Every cell that has runs."""
        found: dict[tuple[str, tuple[Any, ...]], list[Run]] = {}
        for run in sorted(self.runs, key=lambda run: (run.central, run.config.seed)):
            for column in self.columns_of(run):
                found.setdefault((self.row(run), column), []).append(run)
        return {place: Cell(tuple(runs)) for place, runs in found.items()}

    @property
    def rows(self) -> list[str]:
        """The rows' names."""
        return sorted({row for row, _ in self.cells}, key=lambda row: (row.count("+"), row))

    @property
    def columns(self) -> list[tuple[Any, ...]]:
        """The columns, as values of ``column_keys``."""
        return sorted({column for _, column in self.cells})

    def best(self, column: tuple[Any, ...]) -> set[str]:
        """Return the rows with the best mean of a column, as it is printed."""
        means = {
            row: self.cells[row, column].mean for row in self.rows if (row, column) in self.cells
        }
        shown = {row: f"{100 * value:.2f}" for row, value in means.items() if not math.isnan(value)}
        top = max(shown.values(), key=float, default="")
        return {row for row, value in shown.items() if value == top}

    def title(self, column: tuple[Any, ...]) -> str:
        """Return the heading of a column."""
        return words(self.column_keys, column) or "accuracy"


def words(keys: Sequence[str], values: Sequence[Any]) -> str:
    """Return config values as a reader would say them: "alpha 0.5, clients per round 5"."""
    pairs = zip(keys, values, strict=True)
    return ", ".join(f"{key.replace('_', ' ')} {short(value)}" for key, value in pairs)


def short(value: Any) -> str:
    """Return a config's value as a table shows it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _distinct(values: Iterable[Any]) -> int:
    return len({repr(value) for value in values})
