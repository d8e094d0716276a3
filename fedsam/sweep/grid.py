"""The cells of a sweep: a grid over config keys, each cell a run in a folder of its own."""

import itertools
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedsam.base.errors import UsageError, flag, nearest
from fedsam.base.system import LONGEST_NAME, expanded
from fedsam.config import text
from fedsam.config.presets import CONFIGS, OPTIONS, over
from fedsam.config.schema import Config, keys, resolve
from fedsam.runs import files
from fedsam.runs.lock import Lock
from fedsam.runs.metrics import ALL_ROUNDS
from fedsam.runs.run import ending, finished

PATIENCE = 60.0  # seconds for the cells of this sweep that a kill of it left to end
MOST_CELLS = 100_000
WITH_COMMAS = (  # one value each, whatever commas it holds
    *("augment", "client_rotations", "data_root", "lora_targets", "node_keys", "ray_address"),
    *("track", "train", "weights"),
)


class When(BaseModel):
    """Keys of the cells that match all of ``if``."""

    model_config = ConfigDict(extra="forbid")
    match: dict[str, Any] = Field(alias="if")
    set: dict[str, Any]


class Sweep(BaseModel):
    """A sweep's file.

    Attributes
    ----------
    config : str
        A run's YAML file, or a shipped one's name, that all cells start from.
    set : dict
        Keys of every cell.
    grid : dict
        From a key to its values; a cell is one of each. ``minimizer_options.start`` is the entry
        ``start`` of that mapping, here and in the others.
    when : list of When
        Keys of some cells; a later entry stands before an earlier one. Options merge key by key.
    """

    model_config = ConfigDict(extra="forbid")
    config: str = ""
    set: dict[str, Any] = {}
    grid: dict[str, list[Any]] = {}
    when: list[When] = []


@dataclass(frozen=True)
class SweepPoint:
    """One run of a sweep: its name, its folder, its config."""

    name: str
    folder: Path
    config: Config

    @property
    def log(self) -> Path:
        """What a process of it that failed printed."""
        return self.folder.parent / f"{self.name}.log"

    def done(self) -> bool:
        """Return whether the run is finished.

        Raises
        ------
        UsageError
            If its folder holds a run with another config.
        """
        if not finished(self.folder):
            return False
        before = resolve({}, self.folder / files.CONFIG)
        for key, value in before.model_dump().items():
            wanted = getattr(self.config, key)
            if key in keys("how") or wanted == value or (not wanted and key in keys("noted")):
                continue
            if key == "rounds" and wanted > value and files.checkpoints(self.folder):
                continue
            raise UsageError(
                f"{self.folder}: was run with {key} {value!r}, not {wanted!r}; give another --out"
            )
        return self.config.rounds == before.rounds or ending(self.folder)[1] != ALL_ROUNDS

    def prepare(self) -> Config:
        """Return the config, with the folder as its out; remove what cannot be gone on with."""
        if self.folder.is_dir():
            with Lock(self.folder, PATIENCE) as lock:
                if not files.checkpoints(self.folder):
                    lock.remove_folder()
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        return self.config.model_copy(update={"out": str(self.folder)})


def read(path: str) -> Sweep:
    """Return a sweep's file; ``path`` may be the name of one in ``configs/sweeps``.

    Raises
    ------
    UsageError
        If there is none, or it is wrong; one line.
    """
    try:
        own = Path(expanded(path))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    places = [own, CONFIGS.parent / path, CONFIGS / "sweeps" / f"{path}.yaml"]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        names = sorted(p.stem for p in CONFIGS.glob("sweeps/*.yaml"))
        raise UsageError(f"{path}: no such sweep{nearest(path, names)}; have {', '.join(names)}")
    try:
        values = text.load(file)
    except UsageError as error:
        raise UsageError(f"{file}: no YAML: {error}") from error
    try:
        return Sweep.model_validate({} if values is None else values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UsageError(f"{file}: {where}: {first['msg']}") from error


def cells_of(sweep: Sweep, out: Path, given: Mapping[str, Any]) -> list[SweepPoint]:
    """Return the cells of a sweep.

    Parameters
    ----------
    sweep : Sweep
        Its file.
    out : Path
        Their folders lie there.
    given : mapping
        Keys that override the file: an axis of its grid is replaced, ``axis`` says what makes a
        new one, all else is set in every cell.

    Raises
    ------
    UsageError
        If a cell's config is wrong, there is no axis, or an entry of ``when`` matches no cell.
    """
    axes = {key: axis(key, value) for key, value in given.items()}
    grid = sweep.grid | {k: v for k, v in axes.items() if len(v) > 1 or k in sweep.grid}
    given = {key: value for key, value in given.items() if key not in grid}
    twice = sorted(set(given) & {key.partition(".")[0] for key in grid})
    if twice:
        raise UsageError(f"--{twice[0].replace('_', '-')}: entries of it are keys of the grid")
    if not grid:
        raise UsageError("no grid: name a sweep, or give a flag values, such as --seed 0..2")
    if (number := math.prod(map(len, grid.values()))) > MOST_CELLS:
        raise UsageError(f"the grid has {number} cells; {MOST_CELLS} at most")
    products = itertools.product(*grid.values())
    places = [dict(zip(grid, values, strict=True)) for values in products]
    for number, when in enumerate(sweep.when):
        if not any(when.match.items() <= place.items() for place in places):
            raise UsageError(f"when.{number}: no cell of the grid has {when.match}")
    cells: list[SweepPoint] = []
    names: set[str] = set()
    for place in places:
        layers = [sweep.set, place]
        layers += [when.set for when in sweep.when if when.match.items() <= place.items()]
        values = over(*map(nested, layers), given)
        name = ",".join(f"{key}={value}".replace("/", "-") for key, value in place.items())
        if name in names:
            raise UsageError(f"the grid has the cell {name} twice; leave out one of its values")
        if len(os.fsencode(name)) > LONGEST_NAME - len(".yaml.part") or not name.isprintable():
            raise UsageError(f"no folder can be named {name}, as the cell would be")
        names.add(name)
        cells.append(SweepPoint(name, out / name, resolve(values, sweep.config)))
    return cells


def axis(key: str, value: Any) -> list[Any]:
    """Return the values that a flag's text lists: "0,0.05,0.5", "fedavg,fedasam", "0..2".

    Texts in which a comma means something else are one value: paths, options, augmentations.
    """
    if not isinstance(value, str) or key in WITH_COMMAS or key.endswith(OPTIONS):
        return [value]
    if whole := re.fullmatch(r"(\d+)\.\.(\d+)", value):
        first, last = map(int, whole.groups())
        if last < first or last - first >= MOST_CELLS:
            raise UsageError(f"{flag(key)} {value}: must be FIRST..LAST, the last included")
        return list(range(first, last + 1))
    return [text.parse(part) for part in value.split(",")]


def nested(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys with those like ``minimizer_options.start`` put into their mappings.

    Raises
    ------
    UsageError
        If what stands before the dot is no mapping.
    """
    plain = {key: value for key, value in keys.items() if "." not in key}
    for key, value in keys.items():
        whole, dot, part = key.partition(".")
        if not dot:
            continue
        mapping = plain.get(whole, {})
        if not whole.endswith(OPTIONS) or not isinstance(mapping, dict):
            raise UsageError(f"{key}: {whole} is no mapping")
        plain[whole] = {**mapping, part: value}
    return plain
