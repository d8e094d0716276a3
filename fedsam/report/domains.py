"""The table of domain generalisation: each domain left out in turn, and the mean over them."""

import math
from collections.abc import Callable
from statistics import mean, stdev
from typing import NamedTuple

from fedsam.report.scalars import Table
from fedsam.report.table import ResultTable, words
from fedsam.runs.run import Run

LEAVE_OUT = "leave_out"
MEAN, WORST = "mean", "worst"
FIGURES: dict[str, Callable[[Run], float]] = {
    "at the round of the best validation": lambda run: run.selected,
    "mean of the last 100 rounds": lambda run: run.final,
}


class LeaveOneOut(NamedTuple):
    """A figure of every method on each domain that was left out.

    Attributes
    ----------
    figure : str
        Which of ``FIGURES`` it is.
    setting : str
        What else the runs share, in words.
    domains : list of str
        In order.
    values : dict
        By the table's row, then by domain, ``MEAN`` and ``WORST``: a number a seed, in [0, 1]; mean
        and worst of those seeds that left out each domain.
    """

    figure: str
    setting: str
    domains: list[str]
    values: dict[str, dict[str, list[float]]]


def leave_one_out(table: ResultTable) -> list[LeaveOneOut]:
    """Return a table a setting and figure, where runs left out different domains."""
    if LEAVE_OUT not in table.column_keys:
        return []
    place = table.column_keys.index(LEAVE_OUT)
    others = sorted({(*c[:place], *c[place + 1 :]) for c in table.columns})
    keys = (*table.column_keys[:place], *table.column_keys[place + 1 :])
    made = []
    for figure, value_of in FIGURES.items():
        for other in others:
            columns = [c for c in table.columns if (*c[:place], *c[place + 1 :]) == other]
            names = [column[place] for column in columns if column[place]]
            rows = {}
            for row in table.rows:
                by_domain = {
                    column[place]: {
                        run.config.seed: value
                        for run in table.cells[row, column].runs
                        if not math.isnan(value := value_of(run))
                    }
                    for column in columns
                    if column[place] and (row, column) in table.cells
                }
                if any(by_domain.values()):
                    rows[row] = _over_domains(by_domain, names)
            if rows and len(names) > 1:
                made.append(LeaveOneOut(figure, words(keys, other), names, rows))
    return made


def _over_domains(
    by_domain: dict[str, dict[int, float]], names: list[str]
) -> dict[str, list[float]]:
    """Return the numbers of each domain, and of each seed that has all their mean and minimum."""
    every = [by_domain.get(name, {}) for name in names]
    whole = [
        [values[seed] for values in every] for seed in every[0] if all(seed in v for v in every)
    ]
    return {
        **{name: list(values.values()) for name, values in zip(names, every, strict=True)},
        MEAN: [mean(values) for values in whole],
        WORST: [min(values) for values in whole],
    }


def tables(table: ResultTable) -> list[Table]:
    """Return them as texts: methods in rows, domains in columns, then mean and worst."""
    made = []
    for one in leave_one_out(table):
        title = f"{table.headline} on the domain that is left out (%), {one.figure}"
        title = ": ".join(filter(None, [one.setting, title]))
        head = [*one.domains, MEAN, WORST]
        rows = [[row, *(shown(of[name]) for name in head)] for row, of in one.values.items()]
        made.append(Table(title, ["method", *head], rows))
    return made


def shown(values: list[float]) -> str:
    """Return mean and sample deviation over seeds in percent."""
    if not values:
        return "-"
    percent = f"{100 * mean(values):.2f}"
    return f"{percent} ± {100 * stdev(values):.2f}" if len(values) > 1 else percent
