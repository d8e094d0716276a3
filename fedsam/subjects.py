"""What is measured, made from a run's folder, or from any network and images."""

import copy
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fedsam.base.errors import UsageError, nearest, one_line
from fedsam.base.vector import Layout
from fedsam.config.schema import Config, resolve
from fedsam.data.images import Images
from fedsam.data.partition import Partition
from fedsam.experiment import new_trainer
from fedsam.measure.cohort_spread import TrainedCohort, train_cohort
from fedsam.measure.selection import Tick, silent
from fedsam.measure.subject import Subject
from fedsam.running import sampling
from fedsam.tasks import Task
from fedsam.tasks.classification import Classification
from fedsam.training.client import Trainer
from fedsam.training.flat_module import FlatModule

ALONG = re.compile(r"models/\d+")


def of_run(folder: Path, model: str = "model", *, device: str = "", data_root: str = "") -> Subject:
    """Return a model of a run with the run's data, in full precision.

    Parameters
    ----------
    folder : Path
        A run's; it need not be finished.
    model : str
        A file of it without its ending: one of ``models_of(folder)``.
    device, data_root : str
        In place of the run's own ``--device`` and ``--data-root``.

    Raises
    ------
    UsageError
        If there is no such run or model, or its data are others today.
    """
    _, trainer = opened(folder, device=device, data_root=data_root)
    return Subject.of(trainer, read(folder, model, trainer.layout))


def opened(folder: Path, *, device: str = "", data_root: str = "") -> tuple[Config, Trainer]:
    """Return a run's config, in full precision, and what its clients need; as for ``of_run``."""
    given = {"device": device, "data_root": data_root}
    here = {key: value for key, value in given.items() if value}
    if not (folder / "config.yaml").is_file():
        raise UsageError(f"{folder}: there is no run: it has no config.yaml")
    config = resolve({}, folder / "config.yaml")
    config = resolve(config.model_dump() | {"precision": "fp32"} | here)
    trainer, _ = new_trainer(config)
    archive = folder / "partition.npz"
    if not archive.is_file() or not trainer.partition.same_as(Partition.load(archive)):
        raise UsageError(f"{folder}: the data are split in another way than in partition.npz")
    return config, trainer


def cohort_of_run(
    folder: Path,
    model: str = "model",
    tick: Tick = silent,
    *,
    device: str = "",
    data_root: str = "",
) -> TrainedCohort:
    """Return the clients of the round that would follow on a model of a run, trained from it.

    Their learning rate is the config's in its last round; what an average changes is not seen.
    """
    config, trainer = opened(folder, device=device, data_root=data_root)
    number = round_of(model) if ALONG.fullmatch(model) else config.rounds
    clients = sampling(config, trainer)(number + 1)
    state, lr = read(folder, model, trainer.layout), config.rate(number)
    return train_cohort(trainer, state, clients, round=number + 1, lr=lr, tick=tick)


def of_models(
    models: Sequence[tuple[Path, str]], *, device: str = "", data_root: str = ""
) -> list[tuple[str, Subject]]:
    """Return models of runs by name: their methods, and their folders where those are the same."""
    found = [
        (name_of(folder, model), of_run(folder, model, device=device, data_root=data_root), folder)
        for folder, model in models
    ]
    names = [name for name, _, _ in found]
    return [
        (name if names.count(name) == 1 else f"{name} ({folder.name})", subject)
        for name, subject, folder in found
    ]


def name_of(folder: Path, model: str) -> str:
    """Return a model's name in a picture: "fedasam + swa", or "fedasam" for what was averaged."""
    config = resolve({}, folder / "config.yaml")
    averaged = config.averaging != "none" and model == "model"
    part = "" if model in ("model", "model-trained") else f" {model}"
    return config.algorithm + (f" + {config.averaging}" if averaged else "") + part


def of_network(
    module: nn.Module,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor] | None = None,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    clients: Sequence[Tensor] = (),
    task: Task | None = None,
    seed: int = 0,
) -> Subject:
    """Return the subject of any network and images, on the network's device.

    Parameters
    ----------
    module : nn.Module
        Copied, so it is not changed.
    train, test : tuple of Tensor
        uint8 (N, C, H, W) images and their targets; without ``test`` the training images serve.
    mean, std : tuple of float
        Of each channel, for pixel values in [0, 1].
    clients : sequence of Tensor
        int64 rows of the training images, for each client; by default one client has all.
    task : Task, optional
        What the output means; by default classification.
    seed : int
        From which everything random in a measure follows.
    """
    network = FlatModule(copy.deepcopy(module))
    layout = network.layout

    def images(pixels: Tensor, targets: Tensor) -> Images:
        return Images(pixels, targets, mean, std, dtype=layout.dtype, device=layout.device)

    held = list(clients) or [torch.arange(len(train[1]))]
    sizes = torch.tensor([0, *map(len, held)])
    return Subject(
        network,
        network.state.clone(),
        images(*train),
        images(*(test or train)),
        task or Classification(),
        Partition(torch.cat(held), sizes.cumsum(0)),
        seed,
    )


def models_of(folder: Path) -> list[str]:
    """Return the models that a run's folder holds: model, model-trained, models/000100, ..."""
    found = [*folder.glob("*.safetensors"), *sorted(folder.glob("models/*.safetensors"))]
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in found)


def along(folder: Path) -> list[str]:
    """Return the models that --save-every kept, by round."""
    return sorted(filter(ALONG.fullmatch, models_of(folder)), key=round_of)


def round_of(model: str) -> int:
    """Return the round after which a model of ``along`` was kept."""
    return int(model.rpartition("/")[2])


def read(folder: Path, model: str, layout: Layout) -> Tensor:
    """Return the state (S,) that a file of a run's folder holds.

    Raises
    ------
    UsageError
        If there is no such file, it is damaged, or it holds another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    have = models_of(folder)
    if model not in have:
        hint = nearest(model, have) or f"; it has {', '.join(have) or 'none'}"
        raise UsageError(f"{folder}: no model {model!r}{hint}")
    path = folder / f"{model}.safetensors"
    try:
        return layout.write(load(path.read_bytes()))
    except (SafetensorError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {one_line(error)}") from error
