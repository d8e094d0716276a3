"""What a run leaves behind: config, metrics, summary, model, partition and pictures."""

import errno
import hashlib
import json
import math
import os
import platform
import time
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from fedsam.base.errors import UsageError
from fedsam.base.system import shown, version, write_whole
from fedsam.base.timers import timed
from fedsam.config.schema import Config, dump
from fedsam.data.partition import Partition, heterogeneity
from fedsam.messages import VectorRecord
from fedsam.models.pretrained.lora import Lora, LoraOptions, merged
from fedsam.runs import checkpoint, files, metrics
from fedsam.runs.checkpoint import Snapshot
from fedsam.runs.lock import Lock
from fedsam.runs.plots import draw_answers, draw_curves, draw_lifelong, draw_partition
from fedsam.runs.seals import own_seal, seal_of, sealed


class RunDir:
    """The folder of one run.

    Parameters
    ----------
    lock : Lock
        Of the folder.
    config : Config
        What is run; config.yaml holds it.
    partition : Partition
        Of the training images; partition.npz holds it.
    labels : Tensor
        int64, of these.
    new : bool
        Whether this process made it.
    """

    def __init__(
        self, lock: Lock, config: Config, partition: Partition, labels: Tensor, *, new: bool
    ) -> None:
        self.path = path = lock.folder
        self.config = config
        self.new = new
        self.split = heterogeneity(_counts(partition, labels))
        self._whose = partition, labels
        self.lines: list[dict[str, Any]] = []
        self.length = 0  # of metrics.jsonl, in bytes
        self.began = time.perf_counter()
        self._lock = lock
        self._seals = {
            name: [seal_of((path / name).read_bytes())] for name in (files.CONFIG, files.PARTITION)
        }
        self._sum = hashlib.sha256()  # of metrics.jsonl so far
        self._metrics: IO[bytes] = (path / files.METRICS).open("ab", buffering=0)

    @property
    def seconds(self) -> float:
        """Seconds that the run has taken so far."""
        return time.perf_counter() - self.began

    @property
    def position(self) -> dict[str, Any]:
        """What a checkpoint keeps of the folder: where its files end, and their seals."""
        return {"metrics": self.length, "seconds": self.seconds, "seals": self._all_seals()}

    def _all_seals(self) -> dict[str, list[str]]:
        """Return the seals of files, as they are now, by name."""
        return self._seals | {files.METRICS: [self._sum.hexdigest()]}

    @staticmethod
    def check(out: str, *, new: bool) -> None:
        """Raise UsageError if the folder ``out`` cannot be made, or gone on with, by now."""
        if not new:
            with Lock(Path(out)):
                return
        if out and Path(out).exists():
            raise UsageError(
                f"--out {out}: exists already; name a new folder, or --resume {shown(Path(out))}"
            )

    @classmethod
    def reopen(
        cls, config: Config, partition: Partition, labels: Tensor, snapshot: Snapshot
    ) -> "RunDir":
        """Go on in the folder ``config.out``, from where a snapshot was taken.

        Raises
        ------
        UsageError
            If another process writes there, or metrics or split are not those of the run.
        """
        path, seals = Path(config.out), snapshot.tree["seals"]
        with ExitStack() as failing:
            lock = failing.enter_context(Lock(path))
            if snapshot.newest not in ("", *files.checkpoints(path)[-1:]):
                raise UsageError(
                    f"--resume {path}: another process went on with it just now; try again"
                )
            sealed(path / files.PARTITION, seals[files.PARTITION])
            if not partition.same_as(Partition.load(path / files.PARTITION)):
                raise UsageError(f"--resume {path}: the data are split in another way than there")
            lines = path / files.METRICS
            before = sealed(lines, seals[files.METRICS], snapshot.tree["metrics"])
            with files.storing(path):
                _unfinish(path, snapshot.round)
                _rewrite_config(path, config)
                os.truncate(lines, len(before))
                run = cls(lock, config, partition, labels, new=False)
            run.began -= snapshot.tree["seconds"]
            for line in before.splitlines():
                run._remember(json.loads(line))
            run.length = len(before)
            run._sum.update(before)
            failing.pop_all()
            return run

    def remove(self) -> None:
        """Remove the folder of a run that could not begin, so that it can be tried again."""
        self._metrics.close()
        self._lock.remove_folder()

    def close(self) -> None:
        """Let others write here."""
        self._metrics.close()
        self._lock.close()

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint; what metrics.jsonl held then is on the disk before."""
        self._lock.check()
        os.fsync(self._metrics.fileno())
        checkpoint.save(self.path, snapshot)

    def save_model(self, name: str, model: VectorRecord) -> str:
        """Write a model's file, tensors as its ``state_dict`` calls them; return its seal.

        LoRA's products are added to their weights: any copy of the network can load the file.
        """
        from safetensors.torch import save

        self._lock.check()
        path = files.weights(self.path, name)
        path.parent.mkdir(exist_ok=True)
        tensors = model.layout.whole(model.state)
        if self.config.lora:
            options: dict[str, Any] = dict(self.config.lora_options)
            tensors = merged(tensors, Lora(self.config.lora, options=LoraOptions(**options)))
        whole = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
        data = save(whole)
        write_whole(path, data)
        return seal_of(data)

    @classmethod
    def create(cls, config: Config, partition: Partition, labels: Tensor) -> "RunDir":
        """Make the folder and write what is known before the first round."""
        path = Path(config.out) if config.out else _new_name(config)
        try:
            path.mkdir(parents=True)
            lock = Lock(path)
        except FileExistsError as error:
            if not config.out:  # another run took the name just now
                return cls.create(config, partition, labels)
            raise UsageError(f"--out {path}: exists already; name a new folder") from error
        except OSError as error:
            raise UsageError(f"--out {path}: cannot be made: {error.strerror}") from error
        try:
            with files.storing(path):
                write_whole(path / files.CONFIG, _text(config))
                partition.save(path / files.PARTITION, _counts(partition, labels))
                return cls(lock, config, partition, labels, new=True)
        except BaseException:
            lock.remove_folder()
            lock.close()
            raise

    @timed("write")
    def log(self, line: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl; what is not finite is written as null."""
        clean = _finite(line)
        data = (json.dumps(clean) + "\n").encode()
        if self._metrics.write(data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.length += len(data)
        self._sum.update(data)
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
        models = {files.MODEL: evaluated}
        if evaluated is not trained:
            models[files.TRAINED] = trained
        seals = {files.weights_name(name): self.save_model(name, m) for name, m in models.items()}
        summary = {metrics.FINISHED: finished} | self.summary(evaluated.layout.trainable, reason)
        if finished:
            of_files = {name: seal for name, (seal,) in self._all_seals().items()}
            summary[metrics.SEALS] = of_files | seals
            summary[metrics.SEAL] = own_seal(summary)
        write_whole(self.path / files.SUMMARY, json.dumps(summary, indent=2) + "\n")
        # not before: what draws takes a second to import, for which a first round would wait
        draw_partition(_counts(*self._whose), self.path / files.PARTITION_PICTURE)
        draw_curves(self.lines, self.path / files.CURVES_PICTURE)
        if self.config.lifelong:
            draw_lifelong(self.lines, self.config.task_ends, self.path / files.LIFELONG_PICTURE)
        return summary

    def draw_answers(self, images: Tensor, truth: Tensor, answers: Tensor, outside: int) -> None:
        """Draw what is true and what is said of the pixels of some images (n, H, W, C)."""
        pixels, right, said = (tensor.cpu().numpy() for tensor in (images, truth, answers))
        draw_answers(pixels, right, said, outside, self.path / files.ANSWERS_PICTURE)

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


def _text(config: Config) -> str:
    """Return what config.yaml holds."""
    return dump(config.model_copy(update={"out": ""}))


def _rewrite_config(path: Path, config: Config) -> None:
    """Let config.yaml hold the config with which a run goes on."""
    text = _text(config)
    if (path / files.CONFIG).read_bytes() == text.encode():
        return
    checkpoint.accept(path, files.CONFIG, seal_of(text.encode()))
    write_whole(path / files.CONFIG, text)


def _unfinish(path: Path, round: int) -> None:
    """Let summary.json, where there is one, say that the run goes on."""
    file = path / files.SUMMARY
    if file.exists():
        said = {metrics.FINISHED: False, metrics.ENDED: f"goes on after round {round}"}
        write_whole(file, json.dumps(said, indent=2) + "\n")


def _new_name(config: Config) -> Path:
    """Return a folder under runs/ that is not there yet."""
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    average = "" if config.averaging == "none" else f"+{config.averaging.rpartition(':')[2]}"
    dataset = Path(config.dataset.rpartition(":")[2]).name
    split = f"alpha{config.alpha:g}" if config.by_alpha else config.partition
    name = f"{dataset}-{config.algorithm}{average}-{split}-seed{config.seed}-{now}"
    path = Path("runs") / name
    number = 1
    while path.exists():
        number += 1
        path = Path("runs") / f"{name}-{number}"
    return path


def _counts(partition: Partition, labels: Tensor) -> Tensor:
    return partition.counts(labels, int(labels.max()) + 1)


def _finite(value: Any) -> Any:
    """Return a value of JSON with None for each number that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
