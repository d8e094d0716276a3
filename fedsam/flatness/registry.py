"""Every measure by its name, and how one is taken."""

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import mean
from typing import Any

import torch

from fedsam.base.errors import UsageError, flag, nearest
from fedsam.base.randomness import torch_generator
from fedsam.flatness.measures.adversarial import adversarial
from fedsam.flatness.measures.clients import clients
from fedsam.flatness.measures.cohort_spread import cohort_spread
from fedsam.flatness.measures.connectivity import connectivity
from fedsam.flatness.measures.corruptions import corruptions
from fedsam.flatness.measures.fit import fit
from fedsam.flatness.measures.hessian import density, hessian, trace
from fedsam.flatness.measures.plane import plane
from fedsam.flatness.measures.quantisation import quantisation
from fedsam.flatness.measures.sharpness import average_sharpness, sharpness
from fedsam.flatness.measures.slope import slope
from fedsam.flatness.measures.surface import surface, surface_line
from fedsam.flatness.measures.weight_noise import weight_noise
from fedsam.flatness.options import COHORT
from fedsam.flatness.sampling import errors_of_images
from fedsam.flatness.subject import Subject, Tick, silent

Measure = Callable[..., dict[str, Any]]

MEASURES: dict[str, Measure] = {
    "fit": fit,
    "slope": slope,
    "hessian": hessian,
    "trace": trace,
    "density": density,
    "sharpness": sharpness,
    "sharpness-inf": partial(sharpness, p="inf"),
    "adaptive-sharpness": partial(sharpness, adaptive=True),
    "adaptive-sharpness-inf": partial(sharpness, p="inf", adaptive=True),
    "average-sharpness": average_sharpness,
    "average-sharpness-inf": partial(average_sharpness, p="inf"),
    "adaptive-average-sharpness": partial(average_sharpness, adaptive=True),
    "adaptive-average-sharpness-inf": partial(average_sharpness, p="inf", adaptive=True),
    "surface-line": surface_line,
    "surface": surface,
    "corruptions": corruptions,
    "weight-noise": weight_noise,
    "quantisation": quantisation,
    "adversarial": adversarial,
    "clients": clients,
}
COMPARISONS: dict[str, Measure] = {"plane": plane, "connectivity": connectivity}
EVERY: dict[str, Measure] = {**MEASURES, **COMPARISONS, COHORT: cohort_spread}


def take(
    subject: Subject, name: str, options: Mapping[str, Any], tick: Tick = silent
) -> dict[str, Any]:
    """Return what a measure says of a subject.

    Parameters
    ----------
    subject : Subject
        A model and its data.
    name : str
        A key of ``MEASURES``.
    options : mapping
        Those of them are used that the measure takes. ``on`` may also be "clients", or
        "clients:N" for N of them, drawn by the seed: then the scalars are means over the clients,
        each measured on its own images, and ``clients`` holds those of each. Beside a mean of
        ratios, "a/b", stands the ratio of the means, "a/b of means".
    tick : callable
        Told how much is done, and of how much.
    """
    function, taken = MEASURES[name], chosen(name, options)
    over_clients = re.fullmatch(r"clients(?::(\d+))?", str(taken.get("on", "")))
    if over_clients is None:
        return function(subject, **taken, **ticking(name, tick))
    clients = sample_of_clients(subject, over_clients[1])
    results = {}
    for number, client in enumerate(clients):
        results[client] = function(subject, **taken | {"on": f"client:{client}"})
        tick(number + 1, len(clients))
    by_client = {str(client): result["scalars"] for client, result in results.items()}
    scalars = mean_of_clients(list(by_client.values()))
    sizes = [1] * len(clients)
    return {
        "scalars": scalars | ratios_of_means(scalars),
        "errors": {
            "clients": errors_of_images(
                scalars, list(by_client.values()), sizes, len(subject.partition)
            )
        },
        "warnings": unknown_of_clients(list(by_client.values())) + warnings_of_clients(results),
        "settings": results[clients[0]]["settings"] | {"on": taken["on"], "clients": len(clients)},
        "clients": by_client,
    }


def mean_of_clients(each: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each scalar over the clients where it is known; NaN if it never is."""
    means = {}
    for name in each[0]:
        known = [scalars[name] for scalars in each if math.isfinite(scalars[name])]
        means[name] = mean(known) if known else math.nan
    return means


def unknown_of_clients(each: Sequence[Mapping[str, float]]) -> list[str]:
    """Return in words which scalars are the mean of some clients only."""
    lines = []
    for name in each[0]:
        known = sum(math.isfinite(scalars[name]) for scalars in each)
        if known < len(each):
            lines.append(f"{name} is known of {known} of {len(each)} clients")
    return lines


def warnings_of_clients(results: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Return in a line of how many clients there is a warning, and the first of them."""
    warned = [(client, r["warnings"][0]) for client, r in results.items() if r.get("warnings")]
    if not warned:
        return []
    client, line = warned[0]
    return [f"a warning of {len(warned)} of {len(results)} clients; of client {client}: {line}"]


def ratios_of_means(scalars: Mapping[str, float]) -> dict[str, float]:
    """Return for each scalar "a/b", a mean of ratios, the ratio of the means of a and b."""
    ratios = {}
    for name in scalars:
        above, slash, below = name.partition("/")
        if slash:
            known = scalars[below] > 0
            ratio = scalars[above] / scalars[below] if known else math.nan
            ratios[f"{name} of means"] = ratio
    return ratios


def key(name: str, options: Mapping[str, Any]) -> str:
    """Return what a result is called: "hessian", or "hessian@test" where it is not of train."""
    on = options.get("on", "train")
    return name if on == "train" or "on" not in options_of(name) else f"{name}@{on}"


def sample_of_clients(subject: Subject, count: str | None) -> list[int]:
    """Return which clients are measured, ascending."""
    clients = len(subject.partition)
    wanted = clients if count is None else int(count)
    if not 1 <= wanted <= clients:
        raise UsageError(f"--on clients:{count}: the run has {clients} clients")
    order = torch.randperm(clients, generator=torch_generator(subject.seed, "measure clients"))
    return sorted(order[:wanted].tolist())


def chosen(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the options that a measure takes."""
    return {key: value for key, value in options.items() if key in options_of(name)}


def ticking(name: str, tick: Tick) -> dict[str, Tick]:
    """Return the argument by which a measure tells how far it is, if it does."""
    return {"tick": tick} if "tick" in inspect.signature(EVERY[name]).parameters else {}


def options_of(name: str) -> set[str]:
    """Return what a measure takes beside its subject."""
    return {*inspect.signature(EVERY[name]).parameters} - {"subject", "subjects", "cohort", "tick"}


def defaults_of(option: str) -> dict[str, Any]:
    """Return the defaults of an option by the functions that take it, in their order."""
    defaults: dict[str, Any] = {}
    for measure in EVERY.values():
        function: Any = measure.func if isinstance(measure, partial) else measure
        signature = inspect.signature(function).parameters
        if option in signature:
            defaults[function.__name__.replace("_", "-")] = signature[option].default
    return defaults


def check(names: list[str], options: Mapping[str, Any]) -> None:
    """Raise UsageError if there is no such measure, or none of them takes an option."""
    for name in names:
        if name not in EVERY:
            have = ", ".join(EVERY)
            raise UsageError(f"--measure: no {name!r}{nearest(name, EVERY)}; have {have}")
    for key in options:
        if not any(key in options_of(name) for name in names):
            takers = ", ".join(name for name in EVERY if key in options_of(name))
            raise UsageError(f"{flag(key)}: belongs to {takers}; give --measure")
