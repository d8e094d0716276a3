"""FedAvg in pfl-research on what benchmarks/engines.py hands over; needs pfl.

Under torchrun the cohort is shared out over the processes.
"""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pfl.internal.ops.selector
import torch
from contest import serve
from handed import Client, Handed, loss_of
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn


class ForPFL(nn.Module):
    """What pfl asks of a module, mixed into one of fedsam's models."""

    bf16 = False

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        self.train()
        return loss_of(self, images, labels, bf16=self.bf16)

    def metrics(self, *batch: Tensor) -> dict:
        return {}  # nothing is evaluated


class User(Dataset):
    """One client's images of one round, gathered and augmented batch by batch."""

    def __init__(self, client: Client) -> None:
        super().__init__([client.handed.images.targets[:0]])
        self.client = client

    def __len__(self) -> int:
        return len(self.client)

    def iter(self, batch_size: int | None) -> Iterator[list[Tensor]]:
        for batch in self.client:
            yield [batch.images, batch.targets]


class Rounds:
    """Central iterations of pfl's FederatedAveraging."""

    def __init__(self, handed: Handed) -> None:
        self.handed, self.number = handed, 0
        net = handed.new_network(ForPFL).to(memory_format=torch.channels_last)
        net.bf16 = handed.bf16

        def new_optimiser(parameters: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
            return torch.optim.SGD(parameters, lr=lr, weight_decay=handed.weight_decay)

        central = torch.optim.SGD(net.parameters(), lr=1.0)
        self.model = PyTorchModel(net, new_optimiser, central)
        users = self.users()
        federation = FederatedDataset(lambda who: User(handed.client(*who)), lambda: next(users))
        self.backend = SimulatedBackend(federation, federation, [WeightByDatapoints()])
        self.algorithm = FederatedAveraging()

    def users(self) -> Iterator[tuple[int, int]]:
        """Yield round and client of each user in turn."""
        number = 0
        while True:
            number += 1
            for client in self.handed.cohort(number):
                yield number, client

    def play(self) -> float:
        """Play one more central iteration and return its seconds."""
        begin = time.perf_counter()
        self.number += 1
        self.algorithm.run(
            NNAlgorithmParams(
                central_num_iterations=self.number,
                evaluation_frequency=10**9,
                train_cohort_size=self.handed.cohort_size,
                val_cohort_size=0,
            ),
            self.backend,
            self.model,
            NNTrainHyperParams(
                local_num_epochs=1,
                local_learning_rate=self.handed.lr,
                local_batch_size=self.handed.work.batch_size,
            ),
            NNEvalHyperParams(local_batch_size=None),
            send_metrics_to_platform=False,
        )
        return time.perf_counter() - begin

    def save(self, path: str) -> None:
        """Write the model under its ``state_dict`` names."""
        named = self.model.pytorch_model.state_dict().items()
        np.savez(path, allow_pickle=False, **{name: tensor.numpy() for name, tensor in named})


def compete(folder: Path, way: str, workers: int) -> None:
    """Serve rounds: in one process of some compute threads, or as one of torchrun's processes."""
    torch.set_num_threads(workers if way == "threads" else 1)
    rounds = Rounds(Handed(folder))
    processes = pfl.internal.ops.selector.get_framework_module().distributed
    turn = torch.zeros(1)

    def play() -> float:
        if processes.world_size > 1:  # the others wait until the first one is told
            torch.distributed.broadcast(turn.fill_(1), 0)
        return rounds.play()

    if processes.global_rank == 0:
        serve(play, rounds.save)
        if processes.world_size > 1:
            torch.distributed.broadcast(turn.fill_(0), 0)
        return
    while True:
        torch.distributed.broadcast(turn, 0)
        if not turn:
            return
        rounds.play()
