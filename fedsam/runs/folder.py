"""What a run leaves behind: config, metrics, summary, model, partition and pictures."""

import errno
import json
import math
import os
import platform
import shutil
import time
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from fedsam.base.errors import StorageError, UsageError
from fedsam.base.system import version, write_whole
from fedsam.base.timers import timed
from fedsam.config.schema import Config, dump
from fedsam.data.partition import Partition, heterogeneity
from fedsam.messages import VectorRecord
from fedsam.runs import checkpoint, files, metrics
from fedsam.runs.checkpoint import Snapshot
from fedsam.runs.plots import draw_curves, draw_lifelong, draw_partition


class RunDir:
    """The folder of one run.

    Parameters
    ----------
    path : Path
        An empty folder.
    config : Config
        What is run.
    split : dict
        How unlike its clients are: ``heterogeneity`` of the split.
    """

    def __init__(self, path: Path, config: Config, split: dict[str, float]) -> None:
        self.path = path
        self.config = config
        self.split = split
        self.lines: list[dict[str, Any]] = []
        self.length = 0  # of metrics.jsonl, in bytes
        self.began = time.perf_counter()
        self._metrics: IO[bytes] = (path / files.METRICS).open("ab", buffering=0)

    @property
    def seconds(self) -> float:
        """Seconds that the run has taken so far."""
        return time.perf_counter() - self.began

    @staticmethod
    def check(out: str) -> None:
        """Raise UsageError if the folder ``out`` is there already."""
        if out and Path(out).exists():
            raise UsageError(f"--out {out}: exists already; name a new folder, or --resume {out}")

    @classmethod
    def reopen(
        cls, config: Config, partition: Partition, labels: Tensor, snapshot: Snapshot
    ) -> "RunDir":
        """Go on in the folder ``config.out``, from where a snapshot was taken.

        Raises
        ------
        UsageError
            If the metrics or the split are not those of the run.
        """
        path = Path(config.out)
        if not partition.same_as(Partition.load(path / files.PARTITION)):
            raise UsageError(f"--resume {path}: the data are split in another way than there")
        length = snapshot.tree["metrics"]
        lines = path / files.METRICS
        if lines.stat().st_size < length:
            raise UsageError(
                f"--resume {path}: {files.METRICS} is shorter than it was; start it anew"
            )
        write_whole(path / files.CONFIG, dump(config.model_copy(update={"out": ""})))
        os.truncate(lines, length)
        run = cls(path, config, heterogeneity(_counts(partition, labels)))
        run.length = length
        run.began -= snapshot.tree["seconds"]
        for line in lines.read_text().splitlines():
            run._remember(json.loads(line))
        return run

    def remove(self) -> None:
        """Remove the folder of a run that could not begin, so that it can be tried again."""
        self._metrics.close()
        shutil.rmtree(self.path)

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint; what metrics.jsonl held then is on the disk before."""
        os.fsync(self._metrics.fileno())
        checkpoint.save(self.path, snapshot)

    def save_model(self, name: str, model: VectorRecord) -> None:
        """Write a model's file by its name: tensors as its ``state_dict`` calls them."""
        from safetensors.torch import save

        path = files.weights(self.path, name)
        path.parent.mkdir(exist_ok=True)
        tensors = model.layout.read(model.state)
        whole = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
        write_whole(path, save(whole))

    @classmethod
    def create(cls, config: Config, partition: Partition, labels: Tensor) -> "RunDir":
        """Make the folder and write what is known before the first round."""
        path = Path(config.out) if config.out else _new_name(config)
        try:
            path.mkdir(parents=True)
        except FileExistsError as error:
            if not config.out:  # another run took the name just now
                return cls.create(config, partition, labels)
            raise UsageError(f"--out {path}: exists already; name a new folder") from error
        except OSError as error:
            raise UsageError(f"--out {path}: cannot be made: {error.strerror}") from error
        counts = _counts(partition, labels)
        split = heterogeneity(counts)
        try:
            (path / files.CONFIG).write_text(dump(config.model_copy(update={"out": ""})))
            partition.save(path / files.PARTITION, counts)
            draw_partition(counts, path / files.PARTITION_PICTURE)
            return cls(path, config, split)
        except OSError as error:  # a full disk: nothing is left that a later start could stumble at
            shutil.rmtree(path, ignore_errors=True)
            raise StorageError(f"{path}: {error.strerror or error}; nothing was kept") from error

    @timed("write")
    def log(self, line: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl; what is not finite is written as null."""
        clean = {k: None if _not_finite(v) else v for k, v in line.items()}
        data = (json.dumps(clean) + "\n").encode()
        if self._metrics.write(data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.length += len(data)
        self._remember(clean)

    def _remember(self, line: dict[str, Any]) -> None:
        self.lines.append({k: v for k, v in line.items() if k != metrics.CLIENTS})

    def finish(
        self, evaluated: VectorRecord, trained: VectorRecord, reason: str, *, finished: bool
    ) -> dict[str, Any]:
        """Write model, summary and curves; return the summary.

        Parameters
        ----------
        evaluated : VectorRecord
            The model that was evaluated: the average where there is one.
        trained : VectorRecord
            The global model; written beside the other where they differ.
        reason : str
            Why the run ended.
        finished : bool
            Whether that was its end, and not a failure or an interruption.
        """
        self._metrics.close()
        self.save_model(files.MODEL, evaluated)
        if evaluated is not trained:
            self.save_model(files.TRAINED, trained)
        summary = {metrics.FINISHED: finished} | self.summary(evaluated.layout.trainable, reason)
        write_whole(self.path / files.SUMMARY, json.dumps(summary, indent=2) + "\n")
        draw_curves(self.lines, self.path / files.CURVES_PICTURE)
        if self.config.lifelong:
            draw_lifelong(self.lines, self.config.task_ends, self.path / files.LIFELONG_PICTURE)
        return summary

    def summary(self, parameters: int, reason: str) -> dict[str, Any]:
        """Return what summary.json holds, but for whether the run has finished."""
        summary = {
            **metrics.summary_of(self.lines),
            metrics.ENDED: reason,
            metrics.SECONDS: self.seconds,
            metrics.PARAMETERS: parameters,
            metrics.SPLIT: self.split,
            metrics.VERSIONS: versions(),
        }
        if self.config.lifelong:
            summary[metrics.LIFELONG] = metrics.lifelong_summary(self.lines, self.config.task_ends)
        return summary


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    packages = ("fedsam", "flwr", "torch", "torchvision", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def _new_name(config: Config) -> Path:
    """Return a folder under runs/ that is not there yet."""
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    average = "" if config.averaging == "none" else f"+{config.averaging.rpartition(':')[2]}"
    dataset = config.dataset.rpartition(":")[2]
    name = f"{dataset}-{config.algorithm}{average}-alpha{config.alpha:g}-seed{config.seed}-{now}"
    path = Path("runs") / name
    number = 1
    while path.exists():
        number += 1
        path = Path("runs") / f"{name}-{number}"
    return path


def _counts(partition: Partition, labels: Tensor) -> Tensor:
    return partition.counts(labels, int(labels.max()) + 1)


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
