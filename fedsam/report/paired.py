"""What the runs say of methods: differences from a baseline, paired over seeds."""

import math
from collections.abc import Iterator
from statistics import mean, stdev
from typing import Any, NamedTuple

from fedsam.report.table import Cell, ResultTable

LEVEL = 0.95


class Difference(NamedTuple):
    """How much better one cell is than another, over the seeds that both have.

    Attributes
    ----------
    mean : float
        Of the differences of their headlines, seed by seed, in percentage points.
    half : float
        Half the 95 % confidence interval of that mean, by Student's t; NaN with one seed.
    seeds : int
        How many pairs there are.
    """

    mean: float
    half: float
    seeds: int

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero."""
        return abs(self.mean) > self.half and bool(round(self.mean, 6))

    def __str__(self) -> str:
        mean = f"{round(self.mean, 2) + 0.0:+.2f}"  # no -0.00
        if math.isnan(self.half):
            return f"{mean} (one seed)"
        return f"{mean} ± {self.half:.2f}{'' if self.clear else ' (unclear)'}"


def difference(cell: Cell, base: Cell) -> Difference | None:
    """Return how much better a cell is than its baseline; None if they share no seed."""
    ours, theirs = ({run.config.seed: 100 * run.final for run in c.runs} for c in (cell, base))
    apart = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    apart = [value for value in apart if not math.isnan(value)]
    if not apart:
        return None
    if len(apart) == 1:
        return Difference(apart[0], math.nan, 1)
    from scipy.stats import t

    half = t.ppf((1 + LEVEL) / 2, len(apart) - 1) * stdev(apart) / math.sqrt(len(apart))
    return Difference(mean(apart), float(half), len(apart))


def clearly_best(table: ResultTable, column: tuple[Any, ...]) -> str:
    """Return the row that is clearly better than every other one of a column; "" if none is."""
    cells = {row: table.cells[row, column] for row in table.rows if (row, column) in table.cells}
    for row, cell in cells.items():
        others = [difference(cell, other) for name, other in cells.items() if name != row]
        if others and all(d is not None and d.mean > 0 and d.clear for d in others):
            return row
    return ""


def verdicts(table: ResultTable) -> Iterator[str]:
    """Yield a line for each method but the first: how much better it is than that, by column."""
    base, *others = table.rows
    for row in others:
        said, seeds = [], set()
        for column in table.columns:
            cell, first = (table.cells.get((name, column)) for name in (row, base))
            d = difference(cell, first) if cell and first else None
            if d is None:
                continue
            seeds.add(d.seeds)
            where = f" at {table.title(column)}" if table.column_keys else ""
            said.append(f"{d}{where}")
        if said:
            many = " to ".join(str(n) for n in sorted({min(seeds), max(seeds)}))
            plural = "" if seeds == {1} else "s"
            yield f"{row} against {base}: {', '.join(said)}; over {many} seed{plural}"
