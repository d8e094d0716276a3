"""What the measures of robustness found, as matplotlib figures."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from fedsam.runs.metrics import LOSS, heading, headline_of, words_of

Result = Mapping[str, Any]


def draw_corruptions(result: Result) -> Any:
    """Return the headline on each corruption at each severity, as a table of colours."""
    by_corruption = result["accuracies"]
    figure, (axes,) = _figure((5.4, 1.4 + 0.29 * len(by_corruption)))
    values = [[100 * value for value in row] for row in by_corruption.values()]
    picture = axes.imshow(values, cmap="viridis", aspect="auto")
    middle = (picture.norm.vmin + picture.norm.vmax) / 2
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            color = "black" if value > middle else "white"
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=color)
    severities = [str(severity) for severity in range(1, len(values[0]) + 1)]
    axes.set_xticks(range(len(severities)), severities)
    axes.set_yticks(range(len(by_corruption)), [name.replace("_", " ") for name in by_corruption])
    axes.set(xlabel="severity")
    scalars = result["scalars"]
    headline = headline_of(result["settings"])
    means = [name for name in scalars if name.endswith(f"corruption_{headline}")]
    words = [f"{name.replace('_', ' ')} {_percent(scalars[name])}" for name in means]
    axes.set_title(
        f"{heading(_label(result))}, {result['settings']['source']}\n"
        f"{', '.join(words)}; clean {_percent(scalars[headline])}",
        fontsize="medium",
    )
    figure.colorbar(picture, label=_label(result))
    return figure


def draw_weight_noise(result: Result) -> Any:
    """Return the headline against the noise on the weights, a deviation over draws around it."""
    by_sigma = result["accuracies"]
    sigmas = [0.0, *map(float, by_sigma)]
    clean = _clean(result)
    middles = [clean, *(100 * mean(values) for values in by_sigma.values())]
    spreads = [0.0, *(100 * stdev(values) for values in by_sigma.values())]
    figure, (axes,) = _figure()
    axes.errorbar(sigmas, middles, spreads, marker="o", capsize=3)
    draws = result["settings"]["draws"]
    axes.set(
        xlabel="sigma of w (1 + sigma z)",
        ylabel=_label(result),
        ylim=(0, 1.1 * max(map(sum, zip(middles, spreads, strict=True)))),
        title=f"Noise on the weights, {draws} draws",
    )
    return figure


def draw_quantisation(result: Result) -> Any:
    """Return the headline as trained and with each number of bits, bars side by side."""
    scalars, bits = result["scalars"], result["settings"]["bits"]
    headline = headline_of(result["settings"])
    figure, (axes,) = _figure()
    for place, scales in enumerate(("tensor", "channel")):
        heights = [100 * scalars[f"{headline}_int{number}_{scales}"] for number in bits]
        places = [at + 0.4 * (place - 0.5) for at in range(len(bits))]
        bars = axes.bar(places, heights, 0.38, label=f"a scale for each {scales}")
        axes.bar_label(bars, fmt="%.1f", label_type="center", color="white")
    clean = _clean(result)
    axes.axhline(clean, color="black", linewidth=1, linestyle="--", label="as trained")
    axes.set_xticks(range(len(bits)), [f"int{number}" for number in bits])
    axes.set(ylabel=_label(result), title="Quantised weights")
    figure.legend(loc="outside lower center", frameon=False, fontsize="small", ncols=3)
    return figure


def draw_adversarial(result: Result) -> Any:
    """Return the headline against the radius of the attack: a panel for each norm."""
    by_attack, clean = result["accuracies"], _clean(result)
    panels = {"l_inf": ("fgsm", "pgd_linf"), "l_2": ("pgd_l2",)}
    figure, places = _figure((8.4, 3.5), columns=len(panels))
    steps = result["settings"]["steps"]
    labels = {"fgsm": "FGSM", "pgd_linf": f"PGD-{steps}", "pgd_l2": f"PGD-{steps}"}
    for axes, (norm, attacks) in zip(places, panels.items(), strict=True):
        for attack in attacks:
            radii = [0.0, *map(float, by_attack[attack])]
            values = [clean, *(100 * value for value in by_attack[attack].values())]
            axes.plot(radii, values, marker="o", label=labels[attack])
        axes.set(xlabel="radius (255ths of the pixel range)", title=norm)
        axes.set_ylim(0, 1.1 * max(clean, 1))
        axes.legend(frameon=False)
    places[0].set_ylabel(_label(result))
    return figure


def draw_clients(result: Result) -> Any:
    """Return which share of the clients has at most which headline and loss."""
    quantiles, scalars = result["quantiles"], result["scalars"]
    figure, places = _figure((8.4, 3.6), columns=2)
    share = range(101)
    units = {headline_of(result["settings"]): (_label(result), 100), LOSS: ("loss (nats)", 1)}
    for axes, (metric, (label, factor)) in zip(places, units.items(), strict=True):
        for number, (name, title) in enumerate(
            {"train": "own training images", "local_test": "local test set"}.items()
        ):
            key, color = f"{name}_{metric}", f"C{number}"
            values = [factor * value for value in quantiles[key]]
            axes.step(values, share, where="post", color=color, label=title)
            worst = factor * scalars[f"{key}_worst_tenth"]
            axes.axvline(worst, color=color, linestyle=":", linewidth=1.2)
        axes.set(xlabel=label, ylim=(0, 100))
    places[0].set_ylabel("clients with at most this (%)")
    places[0].legend(frameon=False, fontsize="small")
    count = result["settings"]["clients"]
    figure.suptitle(f"{count:,} clients; dotted: mean of the worst 10 %", fontsize="medium")
    return figure


def _label(result: Result) -> str:
    """Return what an axis of the headline says."""
    return f"{words_of(headline_of(result['settings']))} (%)"


def _clean(result: Result) -> float:
    """Return the headline as trained, in percent."""
    return 100 * float(result["scalars"][headline_of(result["settings"])])


def _percent(value: float | None) -> str:
    """Return a share as a percentage; null in the file is what is not known."""
    return "unknown" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def _figure(size: tuple[float, float] = (5.2, 3.7), columns: int = 1) -> tuple[Any, Sequence[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    places = list(figure.subplots(1, columns, squeeze=False)[0])
    for axes in places:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, places
