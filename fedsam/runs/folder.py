"""What a run leaves behind: config, metrics, summary, model, partition and pictures."""

import errno
import json
import math
import os
import platform
import time
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from fedsam.base.errors import UsageError
from fedsam.base.system import write_whole
from fedsam.config.schema import Config, dump
from fedsam.data.partition import Partition
from fedsam.messages import VectorRecord
from fedsam.runs import checkpoint, metrics
from fedsam.runs.checkpoint import Snapshot
from fedsam.runs.plots import draw_curves, draw_lifelong, draw_partition

LAST = 100  # rounds whose evaluations make the final accuracy, as in the paper


class RunDir:
    """The folder of one run.

    Parameters
    ----------
    path : Path
        An empty folder.
    config : Config
        What is run.
    """

    def __init__(self, path: Path, config: Config) -> None:
        self.path = path
        self.config = config
        self.lines: list[dict[str, Any]] = []
        self.length = 0  # of metrics.jsonl, in bytes
        self.began = time.perf_counter()
        self._metrics: IO[bytes] = (path / "metrics.jsonl").open("ab", buffering=0)

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
    def reopen(cls, config: Config, partition: Partition, snapshot: Snapshot) -> "RunDir":
        """Go on in the folder ``config.out``, from where a snapshot was taken.

        Raises
        ------
        UsageError
            If the metrics or the split are not those of the run.
        """
        path = Path(config.out)
        if not partition.same_as(Partition.load(path / "partition.npz")):
            raise UsageError(f"--resume {path}: the data are split in another way than there")
        length = snapshot.tree["metrics"]
        if (path / "metrics.jsonl").stat().st_size < length:
            raise UsageError(
                f"--resume {path}: metrics.jsonl is shorter than it was; start it anew"
            )
        write_whole(path / "config.yaml", dump(config.model_copy(update={"out": ""})))
        os.truncate(path / "metrics.jsonl", length)
        run = cls(path, config)
        run.length = length
        run.began -= snapshot.tree["seconds"]
        for line in (path / "metrics.jsonl").read_text().splitlines():
            run._remember(json.loads(line))
        return run

    def save(self, snapshot: Snapshot) -> None:
        """Write a checkpoint; what metrics.jsonl held then is on the disk before."""
        os.fsync(self._metrics.fileno())
        checkpoint.save(self.path, snapshot)

    def save_model(self, name: str, model: VectorRecord) -> None:
        """Write ``name``.safetensors: a model by its ``state_dict`` names."""
        from safetensors.torch import save

        path = self.path / f"{name}.safetensors"
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
        (path / "config.yaml").write_text(dump(config.model_copy(update={"out": ""})))
        counts = partition.counts(labels, int(labels.max()) + 1)
        partition.save(path / "partition.npz", counts)
        draw_partition(counts, path / "partition.png")
        return cls(path, config)

    def log(self, line: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl; what is not finite is written as null."""
        clean = {k: None if _not_finite(v) else v for k, v in line.items()}
        data = (json.dumps(clean) + "\n").encode()
        if self._metrics.write(data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.length += len(data)
        self._remember(clean)

    def _remember(self, line: dict[str, Any]) -> None:
        self.lines.append({k: v for k, v in line.items() if k != "clients"})

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
        self.save_model("model", evaluated)
        if evaluated is not trained:
            self.save_model("model-trained", trained)
        summary = {"finished": finished} | self.summary(evaluated.layout.trainable, reason)
        write_whole(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")
        draw_curves(self.lines, self.path / "curves.png")
        if self.config.lifelong:
            draw_lifelong(self.lines, self.config.task_ends, self.path / "lifelong.png")
        return summary

    def summary(self, parameters: int, reason: str) -> dict[str, Any]:
        """Return what summary.json holds; accuracies lie in [0, 1], times are seconds."""
        rounds = max(line["round"] for line in self.lines)
        tests = [line for line in self.lines if "accuracy" in line and line["round"]]
        late = [t["accuracy"] for t in tests if t["round"] > rounds - LAST]
        accuracies = [t["accuracy"] for t in tests]
        training = sum(line.get("seconds") or 0.0 for line in self.lines)
        found = {
            "final_accuracy": math.fsum(late) / len(late) if late else None,
            "last_accuracy": accuracies[-1] if tests else None,
            "best_accuracy": max(accuracies) if tests else None,
            "evaluations": len(tests),
            "rounds": rounds,
            "ended": reason,
            "seconds": self.seconds,
            "rounds_per_second": rounds / training if training else None,
            "parameters": parameters,
            "versions": versions(),
        }
        if self.config.lifelong:
            found["lifelong"] = metrics.measured(self.lines, self.config.task_ends)
        return found


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


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
