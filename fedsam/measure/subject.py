"""What is measured: a trained model, and the data it was trained and is tested on."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedsam.base.randomness import torch_generator
from fedsam.data.images import Images
from fedsam.data.partition import Partition
from fedsam.measure.objective import Objective
from fedsam.tasks import Task
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

    def sample(self, on: Literal["train", "test"], count: int) -> Tensor:
        """Return ``count`` rows of a set, drawn without replacement; all where it has no more."""
        size = len(self.train if on == "train" else self.test)
        order = torch.randperm(size, generator=torch_generator(self.seed, "measure", on == "test"))
        return order[:count].sort().values
