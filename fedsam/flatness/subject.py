"""What is measured: a trained model with its data, and which images of them a measure looks at."""

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedsam.base.errors import UsageError, nearest, one_line
from fedsam.base.randomness import torch_generator
from fedsam.base.vector import Layout
from fedsam.config.schema import Config, resolve
from fedsam.data.images import Images
from fedsam.data.partition import Partition
from fedsam.flatness.objective import NormalizedLogits, Objective
from fedsam.runs import files
from fedsam.runs.files import MODEL
from fedsam.simulate.build.trainer import new_trainer
from fedsam.tasks import Task
from fedsam.tasks.classification import Classification
from fedsam.training.client import Trainer
from fedsam.training.flat_module import FlatModule


@dataclass(frozen=True)
class Subject:
    """A model and its data.

    Attributes
    ----------
    network : FlatModule
        The network to compute with, in full precision.
    state : Tensor
        The trained state (S,).
    train, test : Images
        On the device that is measured on, without augmentation.
    task : Task
        What the model's output means.
    partition : Partition
        Which training images are whose.
    seed : int
        From which everything random in a measure follows.
    """

    network: FlatModule
    state: Tensor
    train: Images
    test: Images
    task: Task
    partition: Partition
    seed: int = 0

    @classmethod
    def of(cls, trainer: Trainer, state: Tensor) -> "Subject":
        """Return the subject of a run's model ``state`` (S,)."""
        network = FlatModule(trainer.new_module())
        data = trainer.train, trainer.test, trainer.task, trainer.partition
        return cls(network, state, *data, trainer.seed)

    @property
    def w(self) -> Tensor:
        """The parameters (P,)."""
        return self.state[: self.network.layout.trainable]

    def with_state(self, state: Tensor) -> "Subject":
        """Return the same with another model."""
        return replace(self, state=state)

    def objective(
        self, on: Literal["train", "test"] = "train", rows: Tensor | None = None
    ) -> Objective:
        """Return the loss over the images of a set, or over some rows of it."""
        images = self.train if on == "train" else self.test
        return Objective(self.network, self.state, self.task, images, rows)

    def sample(self, on: Literal["train", "test"], images: int) -> Tensor:
        """Return rows of a set: at most so many, drawn by the seed without replacement; 0 for all.

        Raises
        ------
        UsageError
            If the number is negative.
        """
        check_images(images)
        size = len(self.train if on == "train" else self.test)
        order = torch.randperm(size, generator=torch_generator(self.seed, "measure", on == "test"))
        return order[: images or size].sort().values


IMAGES = 512  # by default: a product with the Hessian of the paper's CNN takes seconds on a CPU
CHUNK = {"cpu": 128}  # images at a time: on a CPU what lies in the caches is faster; elsewhere 1000
Tick = Callable[[int, int], None]  # told the passes done, and of how many at most


def silent(done: int, of: int) -> None:
    """Tell nobody."""


def objective_on(
    subject: Subject, on: str = "train", images: int = IMAGES, *, normalize_logits: bool = False
) -> Objective:
    """Return the loss over the images that a measure looks at.

    Parameters
    ----------
    subject : Subject
        A model and its data.
    on : str
        "train", "test", or "client:K" for the images of client K.
    images : int
        At most so many of them, a seeded sample without replacement; 0 for all.
    normalize_logits : bool
        The loss of ``NormalizedLogits``.

    Raises
    ------
    UsageError
        If there is no such place or client.
    """
    which: Literal["train", "test"] = "test" if on == "test" else "train"
    if on in ("train", "test"):
        rows = subject.sample(which, images)
        population = len(subject.train if on == "train" else subject.test)
    else:
        rows, population = _rows_of(subject, on, images)
    objective = subject.objective(which, rows)
    objective.population = population
    objective.chunk = CHUNK.get(objective.layout.device.type, 1000)
    if normalize_logits:
        objective.task = NormalizedLogits(objective.task)
    return objective


def check_images(images: int) -> None:
    """Raise UsageError if this is no number of images."""
    if images < 0:
        raise UsageError(f"--images {images}: must be a number of images, or 0 for all")


def batches(objective: Objective, size: int, seed: int) -> list[Objective]:
    """Return the loss over each of disjoint batches of ``size`` images, the last maybe smaller.

    They are drawn by ``seed``; with size 0 one batch holds all.
    """
    count = len(objective)
    order = torch.randperm(count, generator=torch_generator(seed, "measure batches"))
    rows = objective.rows[order.to(objective.rows.device)]
    return [objective.on(part) for part in rows.split(size or count)]


def objective_settings(objective: Objective, on: str) -> dict[str, Any]:
    """Return what every measure says about what it looked at."""
    normalized = isinstance(objective.task, NormalizedLogits)
    return {
        "on": on,
        "images": len(objective),
        "mode": "eval, no augmentation",
        **({"logits": "normalized"} if normalized else {}),
    }


def _rows_of(subject: Subject, on: str, images: int) -> tuple[Tensor, int]:
    """Return rows of one client's images, at most so many, and how many it has."""
    match = re.fullmatch(r"client:(\d+)", on)
    if match is None:
        raise UsageError(f"--on {on}: must be train, test, client:K, clients or clients:N")
    client, clients = int(match[1]), len(subject.partition)
    if client >= clients:
        raise UsageError(f"--on {on}: the run has clients 0 to {clients - 1}")
    check_images(images)
    rows = subject.partition[client]
    generator = torch_generator(subject.seed, "measure client", client)
    order = torch.randperm(len(rows), generator=generator)[: images or len(rows)]
    return rows[order].sort().values, len(rows)


def subject_of_run(
    folder: Path, model: str = MODEL, *, device: str = "", data_root: str = ""
) -> Subject:
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
    return Subject.of(trainer, read_model(folder, model, trainer.layout))


def opened(folder: Path, *, device: str = "", data_root: str = "") -> tuple[Config, Trainer]:
    """Return a run's config, in full precision, and what its clients need."""
    options = {"device": device, "data_root": data_root}
    overrides = {key: value for key, value in options.items() if value}
    if not files.is_run(folder):
        raise UsageError(f"{folder}: there is no run: it has no {files.CONFIG}")
    config = resolve({}, folder / files.CONFIG)
    config = resolve(config.model_dump() | {"precision": "fp32"} | overrides)
    split = {"partition": str(folder / files.PARTITION), "partition_options": {}}
    trainer, _ = new_trainer(config.model_copy(update=split), saved=True)
    return config, trainer


def subjects_of_models(
    models: Sequence[tuple[Path, str]], *, device: str = "", data_root: str = ""
) -> list[tuple[str, Subject]]:
    """Return models of runs by name: their methods, and their folders where those are the same."""
    subjects = [
        (
            name_of(folder, model),
            subject_of_run(folder, model, device=device, data_root=data_root),
            folder,
        )
        for folder, model in models
    ]
    names = [name for name, _, _ in subjects]
    return [
        (name if names.count(name) == 1 else f"{name} ({folder.name})", subject)
        for name, subject, folder in subjects
    ]


def name_of(folder: Path, model: str) -> str:
    """Return a model's name in a picture: "fedasam + swa", or "fedasam" for what was averaged."""
    config = resolve({}, folder / files.CONFIG)
    averaged = config.averaging != "none" and model == MODEL
    part = "" if model in (MODEL, files.TRAINED) else f" {model}"
    return config.algorithm + (f" + {config.averaging}" if averaged else "") + part


def subject_of_network(
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

    Raises
    ------
    UsageError
        If a client holds no images.
    """
    network = FlatModule(copy.deepcopy(module))
    layout = network.layout

    def images(pixels: Tensor, targets: Tensor) -> Images:
        return Images(pixels, targets, mean, std, dtype=layout.dtype, device=layout.device)

    held = list(clients) or [torch.arange(len(train[1]))]
    if empty := [client for client, rows in enumerate(held) if not len(rows)]:
        raise UsageError(f"clients: client {empty[0]} holds no images")
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


def read_model(folder: Path, model: str, layout: Layout) -> Tensor:
    """Return the state (S,) that a file of a run's folder holds.

    What is frozen is the same in all of them, and goes to the layout's own.

    Raises
    ------
    UsageError
        If there is no such file, it is damaged, or it holds another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    have = files.models_of(folder)
    if model not in have:
        hint = nearest(model, have) or f"; it has {', '.join(have) or 'none'}"
        raise UsageError(f"{folder}: no model {model!r}{hint}")
    path = files.weights(folder, model)
    try:
        tensors = load(path.read_bytes())
        for name, tensor in layout.frozen.items():
            if name not in tensors or tensors[name].shape != tensor.shape:
                raise ValueError(f"{name!r} is missing, or has another shape than the model's")
            tensor.copy_(tensors[name])
        return layout.write(tensors)
    except (SafetensorError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {one_line(error)}") from error
