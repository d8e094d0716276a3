"""The YAML files of configs/: presets of the methods, experiments, and yours."""

from os import PathLike
from pathlib import Path
from typing import Any

import yaml

import fedsam
from fedsam.base.errors import UsageError, nearest
from fedsam.config import text

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
    return values | read(published[dataset]) if dataset in published else values


def located(file: str | PathLike[str]) -> Path:
    """Return the path of a file, or of the one in ``configs/`` that is named so.

    Raises
    ------
    UsageError
        If there is neither.
    """
    for path in (Path(file), CONFIGS / f"{file}.yaml", CONFIGS / file):
        if path.is_file():
            return path
    files = [p for p in CONFIGS.rglob("*.yaml") if p.parent.name != "sweeps"]
    shipped = sorted(str(p.relative_to(CONFIGS).with_suffix("")) for p in files)
    hint = nearest(str(file), shipped) or f"; shipped ones: {', '.join(shipped)}"
    raise UsageError(f"--config {file}: no such file{hint}")


def read(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return a file's keys over those of the file that its ``base`` key names, if any."""
    try:
        values = text.parse(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--config {path}: cannot be read as YAML: {reason}") from error
    values = {} if values is None else values
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"--config {path}: must be a mapping of keys to values")
    base = values.pop("base", None)
    if base is None:
        return values
    if path in below:
        raise UsageError(f"--config {path}: builds on itself (base: {base})")
    beside = path.parent / str(base)
    if not beside.is_file():
        raise UsageError(f"--config {path}: base: there is no file {beside}")
    return read(beside, (*below, path)) | values
