"""What benchmarks/engines.py hands to other frameworks' Pythons; needs PyTorch and fedsam's files.

Cohorts, mini-batches and augmentation come from fedsam's own functions, so everybody trains on the
same tensors in the same order.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fedsam.base.randomness import sample_clients, torch_generator
from fedsam.data import augment
from fedsam.data.images import Batch, Images
from fedsam.data.plan import Work, make_plan


def loss_of(net: nn.Module, images: Tensor, labels: Tensor, *, bf16: bool) -> Tensor:
    """Return the mean cross-entropy of a mini-batch, its forward pass in bf16 where told."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = net(images)
    return nn.functional.cross_entropy(output.float(), labels)


def with_plain_convolutions(net: nn.Module) -> nn.Module:
    """Let a network's convolutions be PyTorch's own, where fedsam's model has others."""
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            layer.__class__ = nn.Conv2d
    return net


class Handed:
    """Images, split, first weights and settings, as a folder holds them.

    Parameters
    ----------
    folder : Path
        Holds settings.json and data.npz.
    """

    def __init__(self, folder: Path) -> None:
        given = json.loads((folder / "settings.json").read_text())
        with np.load(folder / "data.npz", allow_pickle=False) as archive:
            data = {key: torch.from_numpy(archive[key]) for key in archive.files}
        self.seed, self.cohort_size = given["seed"], given["cohort"]
        self.lr, self.weight_decay, self.bf16 = given["lr"], given["weight_decay"], given["bf16"]
        augmentations = tuple(
            getattr(augment, name)(**values) for name, values in given["augmentations"]
        )
        self.work = Work(**given["work"], augmentations=augmentations)
        self.images = Images(
            data["images"], data["labels"], given["mean"], given["std"], padding=self.work.padding
        )
        self.rows = data["indices"].tensor_split(data["offsets"][1:-1])
        self.weights = {k.removeprefix("w:"): v for k, v in data.items() if k.startswith("w:")}
        self.shape, self.classes = tuple(data["images"].shape[1:]), given["classes"]
        module, name = given["model"]
        self.network: type[nn.Module] = getattr(import_module(module), name)

    def new_network(self, *mixins: type[nn.Module]) -> nn.Module:
        """Return the network with the first weights, a subclass of ``mixins`` too."""
        net: nn.Module = type("Net", (*mixins, self.network), {})(self.shape, self.classes)
        net.load_state_dict(self.weights)
        return with_plain_convolutions(net)

    def cohort(self, number: int) -> list[int]:
        """Return the clients of round ``number``, from 1."""
        return sample_clients(self.seed, number, len(self.rows), self.cohort_size)

    def client(self, number: int, client: int) -> "Client":
        """Return what ``client`` trains on in round ``number``."""
        return Client(self, number, client)


@dataclass(frozen=True)
class Client:
    """The mini-batches of one client in one round; its length is that of the client's images."""

    handed: Handed
    number: int
    client: int

    def __len__(self) -> int:
        return len(self.handed.rows[self.client])

    def __iter__(self) -> Iterator[Batch]:
        handed, images = self.handed, self.handed.images
        generator = torch_generator(handed.seed, "plan", self.number, self.client)
        shape = images.height, images.width
        plan = make_plan(handed.rows[self.client], handed.work, shape, generator)
        for step in range(len(plan)):
            yield images.batch(plan, step)
