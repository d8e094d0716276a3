"""Live tracking: a run tells TensorBoard, Weights & Biases, MLflow or an object of yours."""

import inspect
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fedsam.base.errors import UsageError, one_line
from fedsam.base.system import write_whole
from fedsam.config import plugins
from fedsam.config.schema import Config
from fedsam.runs import files, metrics

log = logging.getLogger("fedsam")


@runtime_checkable
class Tracker(Protocol):
    """What follows a run. It is made without arguments, and follows one run.

    What a tracker raises ends the run; its folder is left as after a mistake in training: with a
    checkpoint of the round before, and a summary.
    """

    def start(self, config: Config, folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
        """Begin, or go on: the run's folder is there, with the config and the partition in it.

        If this raises in a run that begins, its folder is removed.

        Parameters
        ----------
        config : Config
            What is run.
        folder : Path
            The run's.
        lines : sequence of mapping
            What metrics.jsonl holds so far (null is None, ``clients`` is left out): nothing in a
            run that begins; up to the round after which a resumed one goes on. ``log`` gets the
            later ones, and may have had some of those before.
        """
        ...

    def log(self, line: Mapping[str, Any]) -> None:
        """Take a line of metrics.jsonl; floats may be NaN here."""
        ...

    def finish(self, summary: Mapping[str, Any], error: BaseException | None) -> None:
        """End, whatever happened.

        Parameters
        ----------
        summary : mapping
            What summary.json holds; empty if the run did not come to write one.
        error : BaseException or None
            What ended the run: a TrainingError, a KeyboardInterrupt, ...; None if all went well.
        """
        ...


def new_trackers(track: str) -> list[Tracker]:
    """Return the trackers that ``--track`` names.

    Parameters
    ----------
    track : str
        Names out of fedsam/simulate/trackers and import paths, between commas; "" for none.

    Raises
    ------
    UsageError
        If there is no such tracker, its extra is not installed, or it lacks a method.
    """
    trackers: dict[Any, Tracker] = {}  # by what makes them
    for name in track.split(",") if track else []:
        make: Any = plugins.find("track", name.strip(), "fedsam.simulate.trackers", Tracker)
        if make in trackers:
            raise UsageError(f"--track {track}: names {name.strip()} twice; leave out one")
        try:
            inspect.signature(make).bind()
        except TypeError as error:
            raise UsageError(f"--track {name}: must be made without arguments: {error}") from error
        tracker = make()
        if not isinstance(tracker, Tracker):
            raise UsageError(f"--track {name}: needs the methods start, log and finish")
        try:
            inspect.signature(tracker.start).bind("config", "folder", "lines")
        except TypeError as error:
            raise UsageError(f"--track {name}: must be start(config, folder, lines)") from error
        trackers[make] = tracker
    return list(trackers.values())


@contextmanager
def tracking(
    trackers: Sequence[Tracker], config: Config, folder: Path, lines: Sequence[Mapping[str, Any]]
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Start trackers, yield what gives all of them a line, and finish those that were started."""
    started: list[Tracker] = []

    def tell(line: Mapping[str, Any]) -> None:
        for tracker in started:
            tracker.log(line)

    try:
        for tracker in trackers:
            tracker.start(config, folder, lines)
            started.append(tracker)
        yield tell
    except BaseException as error:
        _finish(started, folder, error)
        raise
    _finish(started, folder, None)


def _finish(trackers: Sequence[Tracker], folder: Path, error: BaseException | None) -> None:
    """Finish all; raise the first mistake in that, unless it would hide what ended the run."""
    if not trackers:
        return
    file = folder / files.SUMMARY
    summary = json.loads(file.read_text()) if file.exists() else {}
    first = error
    for tracker in trackers:
        try:
            tracker.finish(summary, error)
        except Exception as mistake:
            if first is None:
                first = mistake
            else:
                log.exception("--track: %s could not finish", type(tracker).__name__)
    if first is not None and first is not error:
        raise first


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numeric metrics of a line or a summary; the round is not one.

    Those of a group of test rows are called ``groups/NAME/METRIC``.
    """
    groups = values.get(metrics.GROUPS) or {}
    of_groups = {
        f"{metrics.GROUPS}/{group}/{name}": value
        for group, of_group in groups.items()
        for name, value in of_group.items()
    }
    return {
        name: float(value)
        for name, value in {**values, **of_groups}.items()
        if isinstance(value, int | float) and name != metrics.ROUND
    }


def finals(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return the final, last and best headline of a summary, those that it has."""
    wanted = metrics.finals(metrics.headline_of(summary))
    return numbers({name: summary.get(name) for name in wanted})


def hyperparameters(config: Config) -> dict[str, bool | int | float | str]:
    """Return every key of a config as a scalar: mappings as JSON, what is not given as ""."""
    items = config.model_dump().items()
    scalars = {key: json.dumps(v) if isinstance(v, dict) else v for key, v in items}
    return {key: "" if v is None else v for key, v in scalars.items()}


def pictures(folder: Path) -> dict[str, Path]:
    """Return the pictures that a run's folder holds by now."""
    paths = [folder / name for name in (files.PARTITION_PICTURE, files.CURVES_PICTURE)]
    return {path.stem: path for path in paths if path.exists()}


def run_id(folder: Path, service: str) -> str:
    """Return under which id a service knows the run in a folder; "" if it never did."""
    return _ids(folder).get(service, "")


def keep_run_id(folder: Path, service: str, value: str) -> None:
    """Let ``run_id`` return it, also after a kill."""
    ids = _ids(folder) | {service: value}
    write_whole(folder / files.TRACKING, json.dumps(ids, indent=2) + "\n")


def _ids(folder: Path) -> dict[str, str]:
    """Return the ids of a run by service.

    Raises
    ------
    UsageError
        If the file that holds them is damaged.
    """
    file = folder / files.TRACKING
    try:
        ids = json.loads(file.read_text()) if file.exists() else {}
        if not isinstance(ids, dict) or not all(isinstance(one, str) for one in ids.values()):
            raise ValueError("must hold a text for each service")
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{file}: damaged: {one_line(error)}; remove it, and the run is a new one to trackers"
        ) from error
    return ids


@contextmanager
def needing(extra: str) -> Iterator[None]:
    """Raise UsageError where a block's import fails because an extra is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--track {extra}: there is no module {error.name!r}; pip install 'fedsam[{extra}]'"
        ) from error
