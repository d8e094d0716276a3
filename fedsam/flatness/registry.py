"""Every measure by its name, and how one is taken."""

import inspect
import re
from collections.abc import Callable, Mapping
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
COHORT = "cohort"  # of clients that train: neither of one model nor of several that are there
EVERY: dict[str, Measure] = {**MEASURES, **COMPARISONS, COHORT: cohort_spread}
QUICK = ("fit", "slope", "sharpness", "adaptive-sharpness", "hessian")


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
        each measured on its own images, and ``clients`` holds those of each.
    tick : callable
        Told how much is done, and of how much.
    """
    function, given = MEASURES[name], chosen(name, options)
    found = re.fullmatch(r"clients(?::(\d+))?", str(given.get("on", "")))
    if found is None:
        return function(subject, **given, **ticking(name, tick))
    several = sample_of_clients(subject, found[1])
    results = {}
    for number, client in enumerate(several):
        results[client] = function(subject, **given | {"on": f"client:{client}"})
        tick(number + 1, len(several))
    each = {str(client): result["scalars"] for client, result in results.items()}
    first = results[several[0]]
    return {
        "scalars": {key: mean(s[key] for s in each.values()) for key in first["scalars"]},
        "settings": first["settings"] | {"on": given["on"], "clients": len(several)},
        "clients": each,
    }


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
