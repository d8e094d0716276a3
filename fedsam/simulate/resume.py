"""What a run needs to go on: gathered after a round, put back before the next one."""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.serverapp.strategy import Strategy

from fedsam.base.errors import UsageError, flag
from fedsam.config.presets import over
from fedsam.config.schema import Config, keys, resolve
from fedsam.messages import VectorRecord
from fedsam.runs import checkpoint, files
from fedsam.runs.checkpoint import Snapshot, load
from fedsam.server.side_vectors import SideVectors
from fedsam.simulate.build import new_method
from fedsam.simulate.schedule import EarlyStop
from fedsam.training.method import Vectors

log = logging.getLogger("fedsam")
FORMAT = 2  # of a snapshot's tree: 1 had the fields of strategies that did without the adapter


@dataclass
class RunState:
    """All that changes from round to round.

    Attributes
    ----------
    strategy : Strategy
        Flower's or ours.
    side_vectors : SideVectors
        What the server sends beside the model.
    memories : dict
        What the clients that have trained keep, by client; filled by the engine.
    stop : EarlyStop
        Counts evaluations.
    """

    strategy: Strategy
    side_vectors: SideVectors
    memories: dict[int, Vectors]
    stop: EarlyStop

    def __post_init__(self) -> None:
        self._made = checkpoint.flatten(self.strategy, "strategy", {})

    def gather(self, round: int, arrays: VectorRecord, metrics: int, seconds: float) -> Snapshot:
        """Return the state after a round; tensors are held, not copied.

        Parameters
        ----------
        round : int
            The last one that is done.
        arrays : VectorRecord
            The global model.
        metrics : int
            Length of metrics.jsonl in bytes.
        seconds : float
            That the run has taken so far.
        """
        tensors = {"model": arrays.state}
        strategy = checkpoint.flatten(self.strategy, "strategy", tensors)
        tree = {
            "format": FORMAT,
            "strategy": checkpoint.without_defaults(strategy, self._made),
            "best": self.stop.best,
            "since": self.stop.since,
            "clients": sorted(self.memories),
            "metrics": metrics,
            "seconds": seconds,
        }
        tensors |= {f"sent.{name}": vector for name, vector in self.side_vectors.vectors.items()}
        for client, vectors in self.memories.items():
            tensors |= {f"memory.{client}.{name}": vector for name, vector in vectors.items()}
        return Snapshot(round, tree, tensors)

    def put_back(self, snapshot: Snapshot, like: VectorRecord) -> VectorRecord:
        """Let all be as it was when the snapshot was gathered; return the global model."""
        layout, tree, tensors = like.layout, snapshot.tree, snapshot.tensors
        checkpoint.unflatten(tree["strategy"], tensors, layout, self.strategy)
        self.stop.best, self.stop.since = tree["best"], tree["since"]
        vectors = {name: tensor.to(layout.device) for name, tensor in tensors.items()}
        self.side_vectors.vectors = {
            name: vectors[f"sent.{name}"] for name in self.side_vectors.vectors
        }
        for client in tree["clients"]:
            start = f"memory.{client}."
            self.memories[client] = {
                name.removeprefix(start): v for name, v in vectors.items() if name.startswith(start)
            }
        return VectorRecord(layout, vectors["model"])


def went_on(config: Config) -> tuple[Config, Snapshot | None]:
    """Return a config, and where its run goes on in ``config.out`` if it was begun there.

    A folder that holds nothing to go on from is removed, and the run begins anew.

    Raises
    ------
    UsageError
        As ``resumed``, and if the config names no folder.
    """
    if not config.out:
        raise UsageError("--go-on: needs --out")
    folder = Path(config.out)
    if folder.is_dir() and files.is_barren(folder):
        log.warning("--go-on: %s has no checkpoint; the run begins anew", folder)
        shutil.rmtree(folder)
    if not folder.exists():
        return config, None
    return resumed(folder, config.model_dump())


def _over_all_rounds(before: Config, config: Config) -> str:
    """Return which part of a run would differ, had it had other rounds from the start, or ""."""
    if config.lifelong:
        return "--lifelong"
    if config.lr_schedule != "constant":
        return f"--lr-schedule {config.lr_schedule}"
    axes = [new_method(c).axes for c in (before, config)]
    for axis, part in axes[0].items():
        if _unlike(part, axes[1][axis]):
            return axis
    return ""


def _unlike(one: object, other: object) -> bool:
    """Return whether two parts, made alike, hold different numbers or texts."""
    if isinstance(one, bool | int | float | str):
        return one != other
    return any(
        _unlike(value, vars(other)[name]) for name, value in getattr(one, "__dict__", {}).items()
    )


def resumed(folder: Path, given: Mapping[str, Any]) -> tuple[Config, Snapshot]:
    """Return the config with which a run goes on, and where it was.

    Parameters
    ----------
    folder : Path
        The run's.
    given : mapping
        Config keys to go on with.

    Raises
    ------
    UsageError
        If there is no checkpoint, or the config contradicts the run.
    """
    if not files.is_run(folder):
        raise UsageError(f"--resume {folder}: there is no run")
    before = resolve({}, folder / files.CONFIG)
    config = resolve(over(before.model_dump(), given))
    free = keys("how") + keys("free")
    for key, value in config.model_dump().items():
        if key not in free and value != getattr(before, key):
            raise UsageError(
                f"{flag(key)} {value}: the run in {folder} has {getattr(before, key)}; "
                "it can only go on with that"
            )
    if config.rounds != before.rounds and (what := _over_all_rounds(before, config)):
        raise UsageError(
            f"--rounds {config.rounds}: {what} of the run in {folder} goes by its {before.rounds}; "
            "it can only go on with that"
        )
    snapshot = load(folder)
    if snapshot is None:
        raise UsageError(f"--resume {folder}: it has no checkpoint to go on from; start it anew")
    if snapshot.tree.get("format") != FORMAT:
        raise UsageError(
            f"--resume {folder}: another version of fedsam wrote its checkpoint; go on with that "
            "one, or start it anew"
        )
    if config.rounds < snapshot.round:
        raise UsageError(f"--rounds {config.rounds}: the run has done {snapshot.round} already")
    starts = {before.averages_from, config.averages_from}
    if config.averaging != "none" and len(starts) > 1 and min(starts) < snapshot.round:
        raise UsageError(
            f"--swa-start {config.swa_start:g}: averaging began after round "
            f"{before.averages_from} of the run; give --swa-start {before.averages_from}"
        )
    return config.model_copy(update={"out": str(folder)}), snapshot
