"""Finished runs, read back from their folders."""

import io
import json
import math
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from fedsam import tasks
from fedsam.base.errors import UsageError, one_line
from fedsam.config.schema import Config, resolve
from fedsam.runs import files, metrics
from fedsam.runs.seals import own_seal, sealed

DAMAGED_ARCHIVE = (  # what NumPy and zipfile raise of one
    *(OSError, KeyError, ValueError, BadZipFile, zlib.error, struct.error, EOFError),
    *(RuntimeError, MemoryError, OverflowError, TypeError),
)
NUMBERS = int | float | list | None  # what a line of metrics.jsonl holds, but for these
KINDS: dict[str, Any] = {metrics.HEADLINE: str, metrics.GROUPS: dict}


def _no_network(config: Config) -> Any:
    raise TypeError("this run was read without its network: use fedsam.load")


@dataclass(frozen=True, repr=False)
class Run:
    """One finished run.

    Attributes
    ----------
    path : Path
        Its folder.
    config : Config
        What was run.
    metrics : list of dict
        metrics.jsonl, a row a round: ``pandas.DataFrame(run.metrics)`` is a table.
    summary : dict
        summary.json.
    new_network : callable
        From a config to its untrained network; what reads no model needs none.
    """

    path: Path
    config: Config
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]
    new_network: Callable[[Config], Any] = field(default=_no_network, compare=False)

    def __repr__(self) -> str:
        """Return what was run and how well it did, in a line."""
        what = f"{self.method} on {self.config.dataset}, {self.summary[metrics.ROUNDS]} rounds"
        return (
            f"Run({str(self.path)!r}: {what}, {metrics.words_of(self.headline)} {self.final:.2%})"
        )

    @property
    def method(self) -> str:
        """The algorithm's name, with the average around it."""
        average = self.config.averaging
        return self.config.algorithm + ("" if average == "none" else f" + {average}")

    @property
    def central(self) -> bool:
        """Whether one client holds all images: there is no split then."""
        return self.config.clients == 1

    @property
    def headline(self) -> str:
        """Name of the metric that stands for the run: "accuracy", if its task names no other."""
        return metrics.headline_of(self.summary)

    @property
    def final(self) -> float:
        """Headline, mean of the last 100 rounds' evaluations, in [0, 1]; NaN without one."""
        value = self.summary[metrics.finals(self.headline)[0]]
        return math.nan if value is None else float(value)

    @property
    def selected(self) -> float:
        """Headline in the round of the best validation, in [0, 1]; NaN without validation."""
        value = self.summary.get(metrics.of_selected(self.headline))
        return math.nan if value is None else float(value)

    @property
    def accuracy(self) -> float:
        """Its ``final``, where the headline is the accuracy; NaN where it is another."""
        return self.final if self.headline == tasks.HEADLINE else math.nan

    @cached_property
    def measures(self) -> dict[str, dict[str, float]]:
        """The finite numbers that were measured of the evaluated model, by measure and name.

        Those of flatness.json, a lifelong run's own, the headline of groups of test images, and
        what validation chose.

        Raises
        ------
        UsageError
            If flatness.json is damaged.
        """
        file, scalars = self.path / files.FLATNESS, {}
        try:
            whole = json.loads(file.read_text()) if file.exists() else {}
            scalars = {
                name: dict(one["scalars"]) for name, one in whole.get(files.MODEL, {}).items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{file}: damaged: {error!r}") from error
        lifelong = self.summary.get(metrics.LIFELONG, {})
        scalars[metrics.LIFELONG] = {
            key.replace("_", " "): lifelong.get(key) for key in metrics.of_lifelong(self.headline)
        }
        scalars[metrics.GROUPS] = {
            **{key: self.summary.get(key) for key in (metrics.WORST, metrics.GAP)},
            **self.summary.get(metrics.GROUPS, {}),
        }
        scalars[metrics.VALIDATION] = {
            key.replace("_", " "): self.summary.get(key)
            for key in metrics.of_selection(self.headline)
        }
        numbers = {measure: _numbers(values) for measure, values in scalars.items()}
        return {measure: values for measure, values in numbers.items() if values}

    def plot(self) -> Any:
        """Return a matplotlib figure of headline and loss over rounds.

        A notebook shows it once ``%matplotlib inline`` was said.
        """
        from fedsam.runs.plots import curves_of

        return curves_of(self.metrics)

    def model(self) -> Any:
        """Return the network that was evaluated, on the CPU and in eval mode."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        module = self.new_network(self.config)
        content = self._content(files.weights_name(files.MODEL))
        try:
            tensors = load(content)
        except SafetensorError as error:
            file = files.weights(self.path, files.MODEL)
            raise UsageError(f"{file}: damaged: {one_line(error)}") from error
        module.load_state_dict(tensors)
        return module.eval()

    def _content(self, name: str) -> bytes:
        """Return what a file holds, if it is as the run left it, as far as the summary says."""
        return _content(self.path / name, self.summary)

    def partition_counts(self) -> Any:
        """Return how many images of each class each client holds: int64 (clients, classes)."""
        import numpy as np
        import torch

        try:
            content = io.BytesIO(self._content(files.PARTITION))
            with np.load(content, allow_pickle=False) as archive:
                return torch.from_numpy(archive["counts"])
        except UsageError:
            raise
        except DAMAGED_ARCHIVE as error:
            raise UsageError(
                f"{self.path / files.PARTITION}: damaged: {one_line(error)}"
            ) from error

    def curve(self, name: str) -> dict[int, float]:
        """Return a metric by round, where it was measured."""
        return metrics.curve(self.metrics, name)

    def reaches(self, target: float) -> tuple[int, float] | None:
        """Return rounds and training seconds to the first evaluation at ``target``, if any."""
        return metrics.reaches(self.metrics, target)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def load(path: Path, new_network: Callable[[Config], Any] = _no_network) -> Run:
    """Read the folder of one run; ``fedsam.load`` does so with its network.

    Raises
    ------
    UsageError
        If it is no folder of a finished run.
    """
    for name in (files.SUMMARY, files.METRICS, files.CONFIG):
        if not (path / name).is_file():
            raise UsageError(f"{path}: no finished run: it has no {name}")
    summary = _summary(path)
    if not summary[metrics.FINISHED]:
        raise UsageError(f"{path}: no finished run: {summary[metrics.ENDED]}")
    lines = _lines(path / files.METRICS, summary)
    _content(path / files.CONFIG, summary)
    try:
        config = resolve({}, path / files.CONFIG)
    except UsageError as error:
        raise UsageError(f"{path / files.CONFIG}: {error}") from error
    run = Run(path, config, lines, summary, new_network)
    try:
        _ = run.accuracy
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"{path / files.SUMMARY}: damaged: {error!r}") from error
    return run


def _content(path: Path, summary: Mapping[str, Any]) -> bytes:
    """Return what a file holds, if it is as the run left it, as far as its summary says."""
    seal = summary.get(metrics.SEALS, {}).get(path.name)
    try:
        return path.read_bytes() if seal is None else sealed(path, [seal])
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error


def _lines(path: Path, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl."""
    lines = []
    for number, text in enumerate(_content(path, summary).splitlines(), 1):
        line = _parsed(text, f"{path}: line {number}")
        of_kind = all(isinstance(value, KINDS.get(key, NUMBERS)) for key, value in line.items())
        if type(line.get(metrics.ROUND)) is not int or not of_kind:
            raise UsageError(f"{path}: line {number}: damaged: must hold a round and numbers")
        lines.append(line)
    return lines


def _parsed(content: bytes, where: str) -> dict[str, Any]:
    """Return the mapping that JSON holds."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: damaged: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{where}: damaged: must hold a mapping")
    return values


def load_all(paths: Sequence[Path]) -> list[Run]:
    """Read runs, and all finished runs below other folders.

    Raises
    ------
    UsageError
        If a path holds none.
    """
    runs = []
    for path in paths:
        if files.is_run(path):
            runs.append(load(path))
            continue
        below = [load(folder) for folder in files.folders_below(path) if finished(folder)]
        if not below:
            raise UsageError(f"{path}: no finished run in it")
        runs += below
    return runs


def finished(folder: Path) -> bool:
    """Return whether a folder holds a run that went to its end."""
    return ending(folder)[0]


def ending(folder: Path) -> tuple[bool, str]:
    """Return whether a folder holds a run that went to its end, and why it ended, if it did."""
    if not (folder / files.SUMMARY).exists():
        return False, ""
    summary = _summary(folder)
    return summary[metrics.FINISHED], summary[metrics.ENDED]


def _summary(folder: Path) -> dict[str, Any]:
    file = folder / files.SUMMARY
    summary = _parsed(file.read_bytes(), str(file))
    if not isinstance(summary.get(metrics.SEALS, {}), dict):
        raise UsageError(f"{file}: damaged: {metrics.SEALS} must hold a mapping")
    rest = {key: value for key, value in summary.items() if key != metrics.SEAL}
    if summary.get(metrics.SEAL, seal := own_seal(rest)) != seal:
        raise UsageError(
            f"{file}: was changed or damaged after the run wrote it (its checksum is another one)"
        )
    return {metrics.FINISHED: False, metrics.ENDED: "unknown"} | summary
