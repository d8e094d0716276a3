"""The YAML files of configs/: presets of the methods, experiments, and yours."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import fedsam
from fedsam.base.errors import UsageError, nearest
from fedsam.base.system import expanded
from fedsam.config import text

OPTIONS = "_options"
OF_TASK = {"segmentation": "digit-scenes"}  # data sets that go with a task, where none is named
CONFIGS = next(p for folder in fedsam.__path__ if (p := Path(folder) / "configs").is_dir())


def preset(algorithm: str, dataset: str) -> dict[str, Any]:
    """Return the values of a method, with those that were published for this data set.

    Raises
    ------
    UsageError
        If there is no such method.
    """
    presets = sorted(path.stem for path in CONFIGS.glob("algorithms/*.yaml"))
    if algorithm not in presets:
        raise UsageError(
            f"--algorithm: no {algorithm!r}{nearest(str(algorithm), presets)}; "
            f"have {', '.join(presets)} (or combine --minimizer, --client and --strategy)"
        )
    values = read(CONFIGS / "algorithms" / f"{algorithm}.yaml")
    published = {path.parent.name: path for path in CONFIGS.glob(f"algorithms/*/{algorithm}.yaml")}
    return over(values, read(published[dataset])) if dataset in published else values


def usual(dataset: str) -> dict[str, Any]:
    """Return the values that a data set is trained with, where those of all others do not fit."""
    files = {path.stem: path for path in CONFIGS.glob("datasets/*.yaml")}
    return read(files[dataset]) if dataset in files else {}


def over(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of each layer over those of the layers before it, options key by key.

    Where a layer names another plug-in than one below it (another minimizer, model, ...), the
    options of the one that is replaced go with it. ``swa`` is short for the average of this name.
    """
    out: dict[str, Any] = {}
    for layer in layers:
        out = _over(out, layer)
    return out


def _over(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(lower)
    swa = upper.get("swa") is True and "average" not in upper
    if "average" in upper and out.get("swa") is True:
        out |= {"swa": False, "average": "swa"}
    elif swa and out.get("average", "swa") != "swa":
        del out["average"]
        out.pop("average_options", None)
    for key in [key for key in out if key.endswith(OPTIONS)]:
        name = key.removesuffix(OPTIONS)
        if name in upper and name in out and _another(name, out[name], upper[name]):
            del out[key]
    for key, value in upper.items():
        below, above = _mapping(key, out.get(key)), _mapping(key, value)
        both = key.endswith(OPTIONS) and isinstance(below, dict) and isinstance(above, dict)
        out[key] = {**below, **above} if both else value
    return out


def _mapping(key: str, value: Any) -> Any:
    """Return options as the mapping that a text says; all else as it is, for Config to judge."""
    if not key.endswith(OPTIONS) or not isinstance(value, str):
        return value
    try:
        said = text.parse(value or "{}")
    except UsageError:
        return value
    return said if isinstance(said, dict) else value


def _another(name: str, below: Any, above: Any) -> bool:
    if name == "lifelong":  # a number of tasks, 0 for none
        return str(above) == "0"
    return str(below).replace("-", "_") != str(above).replace("-", "_")


def located(file: str | PathLike[str]) -> Path:
    """Return the path of a file, or of the one in ``configs/`` that is named so.

    Raises
    ------
    UsageError
        If there is neither.
    """
    try:
        own = Path(expanded(file))
    except UsageError as error:
        raise UsageError(f"--config {file}: {error}") from error
    for path in (own, CONFIGS / f"{file}.yaml", CONFIGS / file):
        if path.is_file():
            return path
    every = [path.relative_to(CONFIGS).with_suffix("") for path in CONFIGS.rglob("*.yaml")]
    names = sorted(str(path) for path in every if path.parts[0] != "sweeps")
    whole = [name for name in names if not name.startswith(("algorithms/", "datasets/"))]
    hint = nearest(str(file), names) or f"; shipped ones: {', '.join(whole)}"
    raise UsageError(f"--config {file}: no such file{hint}")


def read(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return a file's keys ``over`` those of the file that its ``base`` key names, if any."""
    try:
        values = text.load(path)
    except UsageError as error:
        raise UsageError(f"--config {path}: cannot be read as YAML: {error}") from error
    values = {} if values is None else values
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"--config {path}: must be a mapping of keys to values")
    base = values.pop("base", None)
    if base is None:
        return values
    if path in below:
        raise UsageError(f"--config {path}: builds on itself (base: {base})")
    try:
        beside = path.parent / expanded(str(base))
    except UsageError as error:
        raise UsageError(f"--config {path}: base: {error}") from error
    if not beside.is_file():
        raise UsageError(f"--config {path}: base: there is no file {beside}")
    return over(read(beside, (*below, path)), values)
