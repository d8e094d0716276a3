"""What a report draws, as plain numbers: charts of panels of series."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Series:
    """A method's values, with a sample standard deviation to either side.

    Attributes
    ----------
    label : str
        The row of the table.
    number : int
        Of the row: its colour.
    x : list
        Rounds, names or other numbers.
    y, spread : list of float
        As many.
    """

    label: str
    number: int
    x: list[Any]
    y: list[float]
    spread: list[float]


@dataclass(frozen=True)
class Panel:
    """One pair of axes; labels of its own, or the chart's."""

    title: str
    series: list[Series]
    x_label: str = ""
    y_label: str = ""


@dataclass(frozen=True)
class Chart:
    """Panels side by side: those of bands and names are on one scale, from zero.

    Attributes
    ----------
    name : str
        Of its files.
    heading, x_label, y_label : str
        What is seen.
    panels : list of Panel
        At least one.
    categories : list of str
        The places on the x axis where they are names.
    kind : str
        "bands" over rounds, "names", "values" (lines over a number, which the panels share), or
        "points".
    """

    name: str
    heading: str
    x_label: str
    y_label: str
    panels: list[Panel]
    categories: list[str] = field(default_factory=list)
    kind: Literal["bands", "names", "values", "points"] = "bands"

    @property
    def one_scale(self) -> bool:
        """Whether the panels share their y axis, from zero."""
        return self.kind in ("bands", "names")

    @property
    def top(self) -> float:
        """The largest value, with its deviation."""
        every = [series for panel in self.panels for series in panel.series]
        return max(y + s for one in every for y, s in zip(one.y, one.spread, strict=True))
