"""A table of finished runs: methods in rows, settings in columns."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import mean, stdev
from typing import Any

from fedsam.config.schema import Config, keys
from fedsam.runs.metrics import words_of
from fedsam.runs.run import Run

COLUMNS = keys("column")  # a table's columns, where they differ
APART = keys("how") + keys("cell")  # what may differ between runs of one cell


@dataclass(frozen=True)
class Cell:
    """Runs that differ in their seed alone."""

    runs: tuple[Run, ...]

    @property
    def mean(self) -> float:
        """Mean of their headlines, in [0, 1]."""
        return mean(run.final for run in self.runs)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation of their headlines; None for a single run."""
        return stdev(run.final for run in self.runs) if len(self.runs) > 1 else None


class ResultTable:
    """Methods in rows, settings in columns.

    Parameters
    ----------
    runs : sequence of Run
        In any order; rows and columns are sorted.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = list(runs)

    @cached_property
    def headlines(self) -> list[str]:
        """The names of the runs' headlines."""
        return sorted({run.headline for run in self.runs})

    @property
    def headline(self) -> str:
        """The same in words: "accuracy", or "accuracy or mIoU" if their tasks differ in it."""
        return " or ".join(map(words_of, self.headlines))

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
        runs_at: dict[tuple[str, tuple[Any, ...]], list[Run]] = {}
        for run in sorted(self.runs, key=lambda run: (run.central, run.config.seed)):
            for column in self.columns_of(run):
                runs_at.setdefault((self.row(run), column), []).append(run)
        return {place: Cell(tuple(runs)) for place, runs in runs_at.items()}

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
        return words(self.column_keys, column) or self.headline


def words(keys: Sequence[str], values: Sequence[Any]) -> str:
    """Return config values as a reader would say them: "alpha 0.5, clients per round 5"."""
    pairs = zip(keys, values, strict=True)
    return ", ".join(f"{key.replace('_', ' ')} {short(value)}" for key, value in pairs)


def short(value: Any) -> str:
    """Return a config's value as a table shows it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _distinct(values: Iterable[Any]) -> int:
    return len({repr(value) for value in values})
