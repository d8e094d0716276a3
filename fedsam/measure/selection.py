"""Which images a measure looks at, and how it tells how far it is."""

import re
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from fedsam.base.errors import UsageError
from fedsam.base.randomness import torch_generator
from fedsam.measure.objective import Objective
from fedsam.measure.subject import Subject

IMAGES = 512  # by default: a product with the Hessian of the paper's CNN takes seconds on a CPU
CHUNK = {"cpu": 128}  # images at a time: on a CPU what lies in the caches is faster; elsewhere 1000
Tick = Callable[[int, int], None]  # told the passes done, and of how many at most


def silent(done: int, of: int) -> None:
    """Tell nobody."""


def look(subject: Subject, on: str = "train", images: int = IMAGES) -> Objective:
    """Return the loss over the images that a measure looks at.

    Parameters
    ----------
    subject : Subject
        A model and its data.
    on : str
        "train", "test", or "client:K" for the images of client K.
    images : int
        At most so many of them, a seeded sample without replacement; 0 for all.

    Raises
    ------
    UsageError
        If there is no such place or client.
    """
    if images < 0:
        raise UsageError(f"--images {images}: must be a number of images, or 0 for all")
    which: Literal["train", "test"] = "test" if on == "test" else "train"
    if on in ("train", "test"):
        count = images or len(subject.train if on == "train" else subject.test)
        rows = subject.sample(which, count)
    else:
        rows = _rows_of(subject, on, images)
    objective = subject.objective(which, rows)
    objective.chunk = CHUNK.get(objective.layout.device.type, 1000)
    return objective


def batches(objective: Objective, size: int, seed: int) -> list[Objective]:
    """Return the loss over each of disjoint batches of ``size`` images, the last maybe smaller.

    They are drawn by ``seed``; with size 0 one batch holds all.
    """
    count = len(objective)
    order = torch.randperm(count, generator=torch_generator(seed, "measure batches"))
    rows = objective.rows[order.to(objective.rows.device)]
    return [objective.on(part) for part in rows.split(size or count)]


def settings(objective: Objective, on: str) -> dict[str, Any]:
    """Return what every measure says about what it looked at."""
    return {"on": on, "images": len(objective), "mode": "eval, no augmentation"}


def _rows_of(subject: Subject, on: str, images: int) -> Tensor:
    """Return rows of one client's images."""
    found = re.fullmatch(r"client:(\d+)", on)
    if found is None:
        raise UsageError(f"--on {on}: must be train, test, client:K, clients or clients:N")
    client, clients = int(found[1]), len(subject.partition)
    if client >= clients:
        raise UsageError(f"--on {on}: the run has clients 0 to {clients - 1}")
    rows = subject.partition[client]
    generator = torch_generator(subject.seed, "measure client", client)
    order = torch.randperm(len(rows), generator=generator)[: images or len(rows)]
    return rows[order].sort().values
