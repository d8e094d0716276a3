"""FedAvg in pfl-research on what benchmarks/engines.py hands over; needs pfl.

Cohorts, mini-batches and augmentation come from fedsam's own functions, which need only PyTorch,
so both train on the same tensors in the same order.
"""

import json
import time
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn

from fedsam.base.randomness import sample_clients, torch_generator
from fedsam.data import augment
from fedsam.data.images import Images
from fedsam.data.plan import Plan, Work, make_plan

Batches = list[Tensor]


class ForPFL(nn.Module):
    """What pfl asks of a module, mixed into one of fedsam's models."""

    bf16 = False

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        self.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            output = self(images)
        return nn.functional.cross_entropy(output.float(), labels)

    def metrics(self, *batch: Tensor) -> dict:
        return {}  # nothing is evaluated


class User(Dataset):
    """One client's images of one round, gathered and augmented batch by batch."""

    def __init__(self, images: Images, plan: Plan, examples: int) -> None:
        super().__init__([images.targets[:0]])
        self.images, self.plan, self.examples = images, plan, examples

    def __len__(self) -> int:
        return self.examples

    def iter(self, batch_size: int | None) -> Iterator[Batches]:
        for step in range(len(self.plan)):
            batch = self.images.batch(self.plan, step)
            yield [batch.images, batch.targets]


class Rounds:
    """Central iterations of pfl's FederatedAveraging on what FOLDER holds."""

    def __init__(self, folder: Path) -> None:
        given = json.loads((folder / "settings.json").read_text())
        with np.load(folder / "data.npz", allow_pickle=False) as archive:
            data = {key: torch.from_numpy(archive[key]) for key in archive.files}
        augmentations = tuple(
            getattr(augment, name)(**values) for name, values in given["augmentations"]
        )
        self.given, self.work, self.number = (
            given,
            Work(**given["work"], augmentations=augmentations),
            0,
        )
        self.images = Images(
            data["images"], data["labels"], given["mean"], given["std"], padding=self.work.padding
        )
        self.rows = data["indices"].tensor_split(data["offsets"][1:-1])
        module, name = given["model"]
        cls = type("Net", (ForPFL, getattr(import_module(module), name)), {"bf16": given["bf16"]})
        net = cls(tuple(data["images"].shape[1:]), given["classes"])
        initial = {k.removeprefix("w:"): v for k, v in data.items() if k.startswith("w:")}
        net.load_state_dict(initial)
        net = net.to(memory_format=torch.channels_last)

        def new_optimiser(parameters: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
            return torch.optim.SGD(parameters, lr=lr, weight_decay=given["weight_decay"])

        central = torch.optim.SGD(net.parameters(), lr=1.0)
        self.model = PyTorchModel(net, new_optimiser, central)
        users = self.users()
        federation = FederatedDataset(self.user, lambda: next(users))
        self.backend = SimulatedBackend(federation, federation, [WeightByDatapoints()])
        self.algorithm = FederatedAveraging()

    def users(self) -> Iterator[tuple[int, int]]:
        """Yield round and client of each user in turn."""
        number = 0
        while True:
            number += 1
            for client in sample_clients(
                self.given["seed"], number, len(self.rows), self.given["cohort"]
            ):
                yield number, client

    def user(self, who: tuple[int, int]) -> User:
        number, client = who
        rows = self.rows[client]
        generator = torch_generator(self.given["seed"], "plan", number, client)
        shape = self.images.height, self.images.width
        return User(self.images, make_plan(rows, self.work, shape, generator), len(rows))

    def play(self) -> float:
        """Play one more central iteration and return its seconds."""
        begin = time.perf_counter()
        self.number += 1
        self.algorithm.run(
            NNAlgorithmParams(
                central_num_iterations=self.number,
                evaluation_frequency=10**9,
                train_cohort_size=self.given["cohort"],
                val_cohort_size=0,
            ),
            self.backend,
            self.model,
            NNTrainHyperParams(
                local_num_epochs=1,
                local_learning_rate=self.given["lr"],
                local_batch_size=self.work.batch_size,
            ),
            NNEvalHyperParams(local_batch_size=None),
            send_metrics_to_platform=False,
        )
        return time.perf_counter() - begin

    def save(self, path: str) -> None:
        """Write the model under its ``state_dict`` names."""
        named = self.model.pytorch_model.state_dict().items()
        np.savez(path, **{name: tensor.numpy() for name, tensor in named})
