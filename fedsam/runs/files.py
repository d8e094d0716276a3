"""Every file of a run's folder, its name once.

================================  ================================================================
``config.yaml``                   every key of the run, but its folder
``metrics.jsonl``                 a line a round: ``runs/metrics.py``
``summary.json``                  what it came to, once it has ended: ``runs/metrics.py``
``model.safetensors``             the model that was evaluated, by its ``state_dict`` names
``model-trained.safetensors``     the model that was trained, where the other is an average
``models/000100.safetensors``     the model that was evaluated after round 100
``partition.npz``                 which image is whose
``partition.png``                 a picture of it
``curves.png``                    the headline (accuracy) and loss
``answers.png``                   some test images, the truth and the answer, of each pixel
``lifelong.png``                  the headline by task, of a lifelong run
``checkpoints/``                  what the run needs to go on: ``runs/checkpoint.py``
``profile.json``                  time by phase
``trace.json.gz``                 a PyTorch profiler's trace
``.lock``                         held by the process that writes there: ``runs/lock.py``
``tracking.json``                 under which ids trackers' services know the run
``tensorboard/``                  what a tracker of that name writes
``flatness.json``                 what ``fedsam.flatness`` measured, by model and measure
``flatness-*.png``                its figures
================================  ================================================================
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedsam.base.errors import StorageError

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
PARTITION = "partition.npz"
CHECKPOINTS = "checkpoints"
PROFILE = "profile.json"
TRACE = "trace.json.gz"
LOCK = ".lock"
TRACKING = "tracking.json"
TENSORBOARD = "tensorboard"
FLATNESS = "flatness.json"

PARTITION_PICTURE = "partition.png"
CURVES_PICTURE = "curves.png"
ANSWERS_PICTURE = "answers.png"
LIFELONG_PICTURE = "lifelong.png"
FLATNESS_PICTURE = "flatness-{}.png"

# a model is named by its file, without the ending
MODEL = "model"
TRAINED = "model-trained"
WEIGHTS = ".safetensors"
BY_ROUND = "models/{:06d}"


def is_run(folder: Path) -> bool:
    """Return whether a folder is that of a run, finished or not."""
    return (folder / CONFIG).is_file()


def is_barren(folder: Path) -> bool:
    """Return whether a folder is empty, or that of a run that ended before it left anything."""
    if is_run(folder):
        return not checkpoints(folder) and not (folder / SUMMARY).exists()
    return all(path.name == LOCK or path.suffix == ".part" for path in folder.iterdir())


@contextmanager
def storing(folder: Path) -> Iterator[None]:
    """Raise StorageError where the disk is full or gone."""
    try:
        yield
    except OSError as error:
        whole = "; the checkpoints written before are whole" if checkpoints(folder) else ""
        raise StorageError(f"{folder}: {error.strerror or error}{whole}") from error


def folders_below(path: Path) -> list[Path]:
    """Return the folders of all runs below ``path``, finished or not."""
    return sorted(config.parent for config in path.rglob(CONFIG))


def weights(folder: Path, model: str) -> Path:
    """Return the file of one of a run's models."""
    return folder / weights_name(model)


def weights_name(model: str) -> str:
    """Return the name of the file of a model, from the run's folder on."""
    return f"{model}{WEIGHTS}"


def model_after(round: int) -> str:
    """Return the name of the model that ``--save-every`` keeps after a round."""
    return BY_ROUND.format(round)


def round_of(model: str) -> int | None:
    """Return the round after which a model was kept; None of those of the run's end."""
    numbered = re.fullmatch(r"models/(\d+)", model)
    return int(numbered[1]) if numbered else None


def models_of(folder: Path) -> list[str]:
    """Return the models that a run's folder holds: model, model-trained, models/000100, ..."""
    paths = [*folder.glob(f"*{WEIGHTS}"), *folder.glob(f"models/*{WEIGHTS}")]
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in paths)


def models_by_round(folder: Path) -> dict[int, str]:
    """Return the models that ``--save-every`` kept, by round, ascending."""
    rounds = {round_of(model): model for model in models_of(folder)}
    return {number: rounds[number] for number in sorted(n for n in rounds if n is not None)}


def checkpoints(folder: Path) -> list[str]:
    """Return the names of a run's checkpoints, without their endings, the oldest first."""
    return sorted(path.stem for path in (folder / CHECKPOINTS).glob("round-*.json"))
