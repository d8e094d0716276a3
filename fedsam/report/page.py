"""The pictures that lie in run folders, as a page can hold them."""

from base64 import b64encode
from pathlib import Path
from typing import Any

from fedsam.config.schema import Config
from fedsam.report import scalars
from fedsam.report.charts import Chart, Panel, Series, all_charts, partitions
from fedsam.report.formats import TAU_NOTE, note, number_of
from fedsam.report.table import ResultTable, short
from fedsam.report.template import PAGE
from fedsam.runs import files, metrics
from fedsam.runs.metrics import heading
from fedsam.runs.plots import SHOWN
from fedsam.runs.run import Run

PATTERNS = (
    files.ANSWERS_PICTURE,
    files.FLATNESS_PICTURE.format("*"),
    files.LIFELONG_PICTURE,
)
MOST = 20  # pictures
LARGEST = 1 << 20  # bytes each


def pictures(table: ResultTable) -> tuple[list[dict[str, str]], int]:
    """Return pictures as data URLs with their text, and how many were left out.

    Those of the first seed of each method and setting come first; at most ``MOST``, none of more
    than ``LARGEST`` bytes.
    """
    ranked = [
        (seed, number, run)
        for number, cell in enumerate(table.cells.values())
        for seed, run in enumerate(cell.runs)
    ]
    order = [run for *_, run in sorted(ranked, key=lambda entry: entry[:2])]
    every = [(run, file) for run in order for file in _of(run)]
    small = [(run, file) for run, file in every if file.stat().st_size <= LARGEST]
    chosen = [
        {
            "data": f"data:image/png;base64,{b64encode(file.read_bytes()).decode()}",
            "text": f"{run.path.name}: {file.stem.replace('-', ' ')}",
        }
        for run, file in small[:MOST]
    ]
    return chosen, len(every) - len(chosen)


def _of(run: Run) -> list[Path]:
    return [file for pattern in PATTERNS for file in sorted(run.path.glob(pattern))]


# matplotlib's ten colours, so that a method has one colour on paper and on screen
COLORS = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd"),
    *("#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"),
)
BUBBLE = 13  # pixels, the largest
HEIGHT, NAME = 340, 19  # pixels of a chart, and of each name in a long legend


def html(table: ResultTable, target: float | None = None) -> str:
    """Return the page: table, charts to zoom into, partitions, and what the runs were."""
    from jinja2 import Environment
    from plotly.offline import get_plotlyjs

    plots: dict[str, Any] = {}
    sections = []
    for chart in all_charts(table, target):
        panels = {f"{chart.name}-{n}": panel for n, panel in enumerate(chart.panels)}
        plots |= {name: plot(chart, panel) for name, panel in panels.items()}
        sections.append((chart.heading, {name: panel.title for name, panel in panels.items()}))
    splits = {f"partition-{n}": pair for n, pair in enumerate(partitions(table))}
    plots |= {name: bubbles(run) for name, (_, run) in splits.items()}
    embedded, left_out = pictures(table)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(PAGE).render(
        title=_title(table),
        runs=len(table.runs),
        note=note(table),
        headline=heading(table.headline),
        table=_table(table),
        sections=sections,
        splits={name: title for name, (title, _) in splits.items()},
        shown=SHOWN,
        plots=plots,
        measures=scalars.tables(table),
        tau_note=TAU_NOTE,
        taus=[[t.dataset, t.scalar, t.gap, t] for t in scalars.taus(table)],
        pictures=embedded,
        left_out=left_out,
        plotly=get_plotlyjs(),
        **_configs(table),
    )


def plot(chart: Chart, panel: Panel) -> dict[str, Any]:
    """Return one panel as Plotly's data and layout."""
    axis: dict[str, Any] = {"title": {"text": panel.x_label or chart.x_label}}
    vertical: dict[str, Any] = {"title": {"text": panel.y_label or chart.y_label}}
    if chart.one_scale:
        vertical["range"] = [0, 1.05 * chart.top or 1]
    if chart.categories:
        axis |= {"type": "category", "categoryorder": "array", "categoryarray": chart.categories}
        axis["range"] = [-0.5, len(chart.categories) - 0.5]
    return {
        "data": [trace for one in panel.series for trace in TRACES[chart.kind](one)],
        "layout": {
            "xaxis": axis,
            "yaxis": vertical,
            "hovermode": "x unified" if chart.kind == "bands" else "closest",
            "showlegend": True,
        },
        "height": HEIGHT + NAME * max(0, len(panel.series) - 3),
    }


def _marks(series: Series) -> list[dict[str, Any]]:
    return [
        {
            "name": series.label,
            "x": series.x,
            "y": _short(series.y),
            "error_y": {"array": _short(series.spread), "visible": any(series.spread)},
            "mode": "lines+markers",
            "line": {"color": COLORS[series.number % len(COLORS)]},
        }
    ]


def _points(series: Series) -> list[dict[str, Any]]:
    return [
        {
            "name": series.label,
            "x": _short(series.x),
            "y": _short(series.y),
            "mode": "markers",
            "marker": {"color": COLORS[series.number % len(COLORS)], "size": 8, "opacity": 0.8},
        }
    ]


def _band(series: Series) -> list[dict[str, Any]]:
    color = COLORS[series.number % len(COLORS)]
    line = {
        "name": series.label,
        "legendgroup": series.label,
        "x": series.x,
        "y": _short(series.y),
        "mode": "lines",
        "line": {"color": color, "width": 1.8},
    }
    if not any(series.spread):
        return [line]
    low = [y - s for y, s in zip(series.y, series.spread, strict=True)]
    high = [y + s for y, s in zip(series.y, series.spread, strict=True)]
    band = {
        "legendgroup": series.label,
        "x": [*series.x, *reversed(series.x)],
        "y": _short([*high, *reversed(low)]),
        "mode": "none",
        "fill": "toself",
        "fillcolor": f"{color}30",
        "hoverinfo": "skip",
        "showlegend": False,
    }
    return [band, line]


TRACES = {"bands": _band, "names": _marks, "values": _marks, "points": _points}


def bubbles(run: Run) -> dict[str, Any]:
    """Return the split of a run as Plotly's data and layout."""
    counts = run.partition_counts()[:SHOWN]
    client, cls = counts.nonzero(as_tuple=True)
    images = counts[client, cls]
    return {
        "data": [
            {
                "x": client.tolist(),
                "y": cls.tolist(),
                "customdata": images.tolist(),
                "hovertemplate": "client %{x}, class %{y}: %{customdata} images<extra></extra>",
                "mode": "markers",
                "marker": {
                    "size": images.tolist(),
                    "sizemode": "area",
                    "sizeref": max(1, int(counts.max())) / BUBBLE**2,
                    "color": [COLORS[c % len(COLORS)] for c in cls.tolist()],
                    "line": {"width": 0},
                },
            }
        ],
        "layout": {
            "xaxis": {"title": {"text": "client"}, "range": [-1, len(counts)]},
            "yaxis": {
                "title": {"text": "class"},
                "range": [-0.8, counts.shape[1] - 0.2],
                "dtick": 1 if counts.shape[1] <= 20 else 10,
            },
            "showlegend": False,
        },
    }


def _title(table: ResultTable) -> str:
    datasets = sorted({Path(run.config.dataset.rpartition(":")[2]).name for run in table.runs})
    return f"fedsam: {', '.join(datasets)}"


def _table(table: ResultTable) -> dict[str, Any]:
    """Return headings, and rows of (text, whether it is the best of its column)."""
    rows = []
    for row in table.rows:
        cells = [table.cells.get((row, column)) for column in table.columns]
        best = [row in table.best(column) for column in table.columns]
        shown = [number_of(cell) if cell else "-" for cell in cells]
        rows.append((row, list(zip(shown, best, strict=True))))
    return {"head": [table.title(column) for column in table.columns], "rows": rows}


def _configs(table: ResultTable) -> dict[str, Any]:
    """Return what all runs share, and a table of what they do not."""
    dumped = [run.config.model_dump(exclude={"out"}) for run in table.runs]
    keys = [key for key in Config.model_fields if key != "out"]
    differing = [key for key in keys if len({repr(values[key]) for values in dumped}) > 1]
    shared = {key: dumped[0][key] for key in keys if key not in differing}
    finals = [key for headline in table.headlines for key in metrics.finals(headline)]
    head = [
        "run",
        *differing,
        *(name.replace("_", " ") for name in finals),
        metrics.ROUNDS,
        metrics.SECONDS,
    ]
    lines = []
    for run, values in zip(table.runs, dumped, strict=True):
        numbers = [run.summary.get(name) for name in finals]
        lines.append(
            [
                run.path.name,
                *(short(values[key]) for key in differing),
                *("-" if a is None else f"{100 * a:.2f}" for a in numbers),
                run.summary[metrics.ROUNDS],
                f"{run.summary[metrics.SECONDS]:.1f}",
            ]
        )
    versions = {name: v for run in table.runs for name, v in run.summary[metrics.VERSIONS].items()}
    return {"shared": shared, "head": head, "lines": lines, "versions": versions}


def _short(values: list[float]) -> list[float]:
    """Return numbers of six digits: a page of many curves stays small."""
    return [float(f"{value:.6g}") for value in values]
