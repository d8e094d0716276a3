"""What a run needs to go on: gathered after a round, put back before the next one."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.serverapp.strategy import Strategy

from fedsam.base.errors import UsageError, flag
from fedsam.config.presets import over
from fedsam.config.schema import Config, keys, resolve
from fedsam.messages import VectorRecord
from fedsam.runs import checkpoint, files, metrics
from fedsam.runs.checkpoint import Snapshot, load
from fedsam.runs.lock import Lock
from fedsam.runs.run import finished
from fedsam.runs.seals import sealed
from fedsam.server.side_vectors import SideVectors
from fedsam.simulate.build.method import new_method
from fedsam.simulate.schedule import EarlyStop
from fedsam.training.method import Vectors

log = logging.getLogger("fedsam")
ENDS = ("rounds", "target_accuracy", "patience")  # keys that say when a run ends
FORMAT = 3  # of a snapshot's tree: 2 had no seals, 1 the fields of strategies without the adapter


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

    def gather(self, round: int, arrays: VectorRecord, folder: Mapping[str, Any]) -> Snapshot:
        """Return the state after a round; tensors are held, not copied.

        Parameters
        ----------
        round : int
            The last one that is done.
        arrays : VectorRecord
            The global model.
        folder : mapping
            What is kept of the run's folder: ``RunDir.position``.
        """
        tensors = {"model": arrays.state}
        strategy = checkpoint.flatten(self.strategy, "strategy", tensors)
        tree = {
            "format": FORMAT,
            "strategy": checkpoint.without_defaults(strategy, self._made),
            "best": self.stop.best,
            "since": self.stop.since,
            "clients": sorted(self.memories),
            **folder,
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


def went_on(config: Config) -> tuple[Config, Snapshot | None] | None:
    """Return a config, and where its run goes on in ``config.out`` if it was begun there.

    None if it has ended there, by this config too: it is to be left alone. A folder that holds
    nothing to go on from is removed, and the run begins anew.

    Raises
    ------
    UsageError
        As ``resumed``, if the config names no folder, or if another process writes there.
    """
    if not config.out:
        raise UsageError("--go-on: needs --out")
    folder = Path(config.out)
    if folder.is_dir() and files.is_barren(folder):
        with Lock(folder) as lock:
            if files.is_barren(folder):  # still
                log.warning("--go-on: %s has no checkpoint; the run begins anew", folder)
                lock.remove_folder()
    if not folder.exists():
        return config, None
    if files.is_run(folder) and not files.checkpoints(folder) and _finished(folder):
        before, _ = _both(folder, config.model_dump())  # it wrote none: --checkpoint-every 0
        if all(getattr(before, key) == getattr(config, key) for key in ENDS):
            return None
    config, snapshot = resumed(folder, config.model_dump())
    return None if ended(config, snapshot) else (config, snapshot)


def ended(config: Config, snapshot: Snapshot) -> str:
    """Return why a run is over where the snapshot was taken, and all is written; or "".

    By the config with which it would go on: with more rounds, another target, ... it is not.
    """
    tree = snapshot.tree
    early = EarlyStop(config.target_accuracy, config.patience, tree["best"], tree["since"])
    reason = early.met or (metrics.ALL_ROUNDS if snapshot.round >= config.rounds else "")
    return reason if reason and _finished(Path(config.out)) else ""


def _finished(folder: Path) -> bool:
    """Return whether a summary says so; a damaged one is written anew."""
    try:
        return finished(folder)
    except UsageError:
        return False


def _over_all_rounds(before: Config, config: Config) -> str:
    """Return which part of a run would differ, had it had other rounds from the start, or ""."""
    if config.lifelong:
        return "--lifelong"
    if config.lr_schedule != "constant":
        return f"--lr-schedule {config.lr_schedule}"
    if config.compile:  # in a run of other rounds it might not pay
        return "--compile"
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


def _both(folder: Path, given: Mapping[str, Any]) -> tuple[Config, Config]:
    """Return the config of the run in a folder, and that with which it would go on."""
    before, noted = resolve({}, folder / files.CONFIG), keys("noted")
    said = {key: value for key, value in given.items() if value or key not in noted}
    config = resolve(over(before.model_dump(), said))
    free = keys("how") + keys("free")
    for key, value in config.model_dump().items():
        if key not in free and value != getattr(before, key):
            raise UsageError(
                f"{flag(key)} {value}: the run in {folder} has {getattr(before, key)}; "
                "it can only go on with that"
            )
    return before, config


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
    if not files.is_run(folder) and not files.checkpoints(folder):
        raise UsageError(f"--resume {folder}: there is no run")
    snapshot = load(folder)
    if snapshot is None:
        raise UsageError(f"--resume {folder}: it has no checkpoint to go on from; start it anew")
    if snapshot.tree.get("format") != FORMAT:
        raise UsageError(
            f"--resume {folder}: another version of fedsam wrote its checkpoint; go on with that "
            "one, or start it anew"
        )
    sealed(folder / files.CONFIG, snapshot.tree["seals"][files.CONFIG])
    before, config = _both(folder, given)
    if config.rounds != before.rounds and (what := _over_all_rounds(before, config)):
        raise UsageError(
            f"--rounds {config.rounds}: {what} of the run in {folder} goes by its {before.rounds}; "
            "it can only go on with that"
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
