"""Pictures of measures of flatness: one measure of one model, or scalars over rounds."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsam.flatness.figures import robustness, surface
from fedsam.runs.files import FLATNESS_PICTURE, MODEL, round_of

Result = Mapping[str, Any]
POINTS = 500  # of a density's curve
WIDTH = 0.01  # of its Gaussians, as a part of the spectrum's range


def draw_eigenvalues(result: Result) -> Any:
    """Return the largest eigenvalues of the Hessian and the lowest, as bars."""
    figure, axes = _axes()
    values = [*result["eigenvalues"], result["scalars"]["lambda_min"]]
    errors = [*result["residuals"], result["lowest_residual"]]
    names = [*(str(i + 1) for i in range(len(values) - 1)), "min"]
    axes.bar(names, values, yerr=errors, color=["C0"] * (len(values) - 1) + ["C3"], capsize=3)
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.set(xlabel="eigenvalue", ylabel="lambda", title=_title(result))
    return figure


def draw_density(result: Result) -> Any:
    """Return the density of the Hessian's spectrum, smoothed by Gaussians, on a log scale."""
    figure, axes = _axes()
    x, curve = density_of(result["nodes"], result["weights"])
    axes.semilogy(x, curve, color="C0")
    axes.set_ylim(bottom=curve.max() * 1e-9)
    axes.set(xlabel="eigenvalue", ylabel="density", title=_title(result))
    return figure


def density_of(
    nodes: Sequence[Sequence[float]], weights: Sequence[Sequence[float]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return eigenvalues and their density, both (POINTS,): Gaussians at nodes, mean over probes.

    A probe's weights sum to one, and so does the integral of the density.
    """
    centres = np.concatenate([np.asarray(probe, float) for probe in nodes])
    shares = np.concatenate([np.asarray(probe, float) for probe in weights]) / len(weights)
    span = np.ptp(centres) or 1.0
    width = WIDTH * span
    x = np.linspace(centres.min() - 0.05 * span, centres.max() + 0.05 * span, POINTS)
    bells = np.exp(-0.5 * ((x[:, None] - centres) / width) ** 2)
    return x, bells @ shares / (width * math.sqrt(2 * math.pi))


def draw_sharpness(result: Result) -> Any:
    """Return the loss's rise over the steps of the ascent, the mean over the batches."""
    figure, axes = _axes()
    rises = [0.0, *result["by_step"]]
    axes.plot(range(len(rises)), rises, color="C0", marker="o", label="ascent, best so far")
    axes.axhline(result["scalars"]["one_step"], color="C3", linestyle=":", label="SAM's one step")
    axes.set(xlabel="step", ylabel="highest rise of the loss (nats)", title=_title(result))
    axes.legend(frameon=False)
    return figure


def draw_along(results: Mapping[str, Mapping[str, Result]], name: str) -> Any:
    """Return a measure's scalars over the rounds of the models that have it."""
    from matplotlib.figure import Figure

    by_round = {round_of(model): measures[name] for model, measures in results.items()}
    keys = list(next(iter(by_round.values()))["scalars"])
    figure = Figure(figsize=(4 * len(keys), 3.3), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        values = _numbers([result["scalars"][key] for result in by_round.values()])
        errors = _numbers([_error(result, key) for result in by_round.values()])
        axes.errorbar(list(by_round), values, errors, marker="o", ms=3, capsize=2)
        axes.set(xlabel="round", title=f"{name}: {key}")
        _plain(axes)
    return figure


DRAW: dict[str, Callable[[Result], Any]] = {
    "hessian": draw_eigenvalues,
    "density": draw_density,
    "sharpness": draw_sharpness,
    "sharpness-inf": draw_sharpness,
    "adaptive-sharpness": draw_sharpness,
    "adaptive-sharpness-inf": draw_sharpness,
    "surface-line": surface.draw_line,
    "surface": surface.draw_surface,
    "plane": surface.draw_plane,
    "connectivity": surface.draw_connectivity,
    "cohort": surface.draw_cohort,
    "corruptions": robustness.draw_corruptions,
    "weight-noise": robustness.draw_weight_noise,
    "quantisation": robustness.draw_quantisation,
    "adversarial": robustness.draw_adversarial,
    "clients": robustness.draw_clients,
}


def draw_all(
    folder: Path, results: Mapping[str, Mapping[str, Result]], *, along: bool
) -> list[str]:
    """Write the figures of a run's results as PNG and PDF; return the PNGs' names."""
    figures = {}
    if along:
        shared = set.intersection(*(set(measures) for measures in results.values()))
        for name in sorted(shared):
            figures[f"along-{name}"] = draw_along(results, name)
    else:
        for model, measures in results.items():
            part = "" if model == MODEL else f"{model.replace('/', '-')}-"
            for name, result in measures.items():
                draw = DRAW.get(name.partition("@")[0])
                if draw and not ("@" in name and "clients" in result):
                    figures[f"{part}{name}"] = draw(result)
    written = []
    for name, figure in figures.items():
        picture = FLATNESS_PICTURE.format(name.replace("@", "-").replace(":", ""))
        for path in (folder / picture, (folder / picture).with_suffix(".pdf")):
            figure.savefig(path, dpi=130)
        written.append(picture)
    return written


def _error(result: Result, scalar: str) -> float:
    """Return the root of the sum of the squares of a scalar's errors, where they are known."""
    by_cause = (errors.get(scalar) for errors in result.get("errors", {}).values())
    return math.hypot(*(error for error in by_cause if error is not None and error >= 0))


def _numbers(values: Sequence[float | None]) -> NDArray[np.float64]:
    return np.array(values, dtype=np.float64)  # None, where JSON had no number, is NaN


def _axes() -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # a second of import that only this needs

    figure = Figure(figsize=(5.2, 3.5), layout="constrained")
    axes = figure.subplots()
    _plain(axes)
    return figure, axes


def _plain(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _title(result: Result) -> Any:
    how = result["settings"]
    parts = [f"{how['images']} images of {how['on']}"]
    parts += [f"{key} {how[key]}" for key in ("p", "rho", "m", "probes", "steps") if key in how]
    return ", ".join(parts)
