"""What was measured of a table's runs beside their headline: by cell, and against the gap."""

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple

from fedsam.report.correlation import FEWEST, Correlation, kendall
from fedsam.report.table import Cell, ResultTable, words
from fedsam.runs.metrics import GROUPS, LIFELONG, VALIDATION
from fedsam.runs.run import Run

FIT = "fit"
# measures that are not of sharpness
OTHERS = (
    *(FIT, LIFELONG, GROUPS, VALIDATION, "cohort"),
    *("corruptions", "weight-noise", "quantisation", "adversarial", "clients"),
)


class Scalar(NamedTuple):
    """A number's name: which measure it belongs to, and what it is."""

    measure: str
    name: str

    def __str__(self) -> str:
        return f"{self.measure}: {self.name}"

    def of(self, run: Run) -> float | None:
        """Return a run's value, where it was measured."""
        return run.measures.get(self.measure, {}).get(self.name)

    def over(self, runs: Sequence[Run]) -> tuple[float, float] | None:
        """Return mean and sample deviation over those runs that have it; of one run, 0."""
        values = [value for run in runs if (value := self.of(run)) is not None]
        if not values:
            return None
        return mean(values), stdev(values) if len(values) > 1 else 0.0


class Gap(NamedTuple):
    """A generalisation gap: the factor it is shown with, and the two numbers it lies between.

    They are those of the measure ``FIT``, with the run's headline in their names.
    """

    label: str
    factor: float
    more: str
    less: str

    def of(self, run: Run) -> float | None:
        """Return a run's gap, where its model's fit was measured."""
        names = (name.format(headline=run.headline) for name in (self.more, self.less))
        more, less = (Scalar(FIT, name).of(run) for name in names)
        return None if more is None or less is None else self.factor * (more - less)


# the ASAM paper's is that of the error, which is the headline's turned around
GAPS = {
    "error": Gap("test - train error (points)", 100, "train {headline}", "test {headline}"),
    "loss": Gap("test - train loss (nats)", 1, "test loss", "train loss"),
}


class Tau(NamedTuple):
    """How a measure of sharpness goes with a gap, over the runs on one data set.

    Attributes
    ----------
    dataset : str
        Theirs.
    scalar : Scalar
        The measure.
    gap : str
        One of ``GAPS``.
    runs : list of Run
        Those that have both.
    correlation : Correlation
        Of the two.
    """

    dataset: str
    scalar: Scalar
    gap: str
    runs: list[Run]
    correlation: Correlation

    def __str__(self) -> str:
        tau, low, high, runs = self.correlation
        if math.isnan(tau):
            return f"τ undefined, all equal ({runs} runs)"
        return f"τ = {tau:.2f} (95%: {low:.2f} to {high:.2f}; {runs} runs)"

    def points(self, runs: Sequence[Run]) -> tuple[list[float], list[float]]:
        """Return the measure and the gap of those of ``runs`` that it is of."""
        pairs = [(self.scalar.of(run), GAPS[self.gap].of(run)) for run in runs if run in self.runs]
        both = [(x, y) for x, y in pairs if x is not None and y is not None]
        return [x for x, _ in both], [y for _, y in both]


def scalars(table: ResultTable) -> list[Scalar]:
    """Return the names of all that was measured of any run, in its order."""
    names = {
        Scalar(measure, name): None
        for run in table.runs
        for measure, values in run.measures.items()
        for name in values
    }
    of_run = {LIFELONG: 1, GROUPS: 2, VALIDATION: 3}  # they come last
    return sorted(names, key=lambda s: (of_run.get(s.measure, 0), s.measure != FIT))


def sharpness(table: ResultTable) -> list[Scalar]:
    """Return the names of those that are measures of sharpness."""
    return [scalar for scalar in scalars(table) if scalar.measure not in OTHERS]


def taus(table: ResultTable) -> list[Tau]:
    """Return every correlation for which at least three runs of a data set were measured."""
    every = []
    for dataset in sorted({run.config.dataset for run in table.runs}):
        for scalar in sharpness(table):
            for gap in GAPS:
                runs = [
                    run
                    for run in table.runs
                    if run.config.dataset == dataset
                    and scalar.of(run) is not None
                    and GAPS[gap].of(run) is not None
                ]
                if len(runs) >= FEWEST:
                    tau = Tau(dataset, scalar, gap, runs, Correlation(0, 0, 0, 0))
                    every.append(tau._replace(correlation=kendall(*tau.points(runs))))
    return every


def why_no_tau(table: ResultTable) -> str:
    """Return why there is no correlation although sharpness was measured; "" otherwise."""
    if not sharpness(table) or taus(table):
        return ""
    return (
        f"no Kendall's tau: it needs {FEWEST} runs of a data set with a measure of sharpness and "
        f"the measure {FIT}, from which the generalisation gap follows"
    )


class Table(NamedTuple):
    """Methods side by side, a row a number that was measured of the runs of one setting."""

    title: str
    head: list[str]
    rows: list[list[str]]


def tables(table: ResultTable) -> list[Table]:
    """Return a table a setting, of those with numbers."""
    made = []
    for column in table.columns:
        cells = {
            row: table.cells[row, column] for row in table.rows if (row, column) in table.cells
        }
        rows = [[str(s), *(shown(cell, s) for cell in cells.values())] for s in scalars(table)]
        known = [row for row in rows if set(row[1:]) != {"-"}]
        if known:
            made.append(Table(words(table.column_keys, column), ["measure", *cells], known))
    return made


def shown(cell: Cell, scalar: Scalar) -> str:
    """Return mean and deviation of a cell, with three digits."""
    pair = scalar.over(cell.runs)
    if pair is None:
        return "-"
    middle, deviation = pair
    return f"{middle:.3g} ± {deviation:.2g}" if len(cell.runs) > 1 else f"{middle:.3g}"
