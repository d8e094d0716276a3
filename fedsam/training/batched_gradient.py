"""The gradients of K models on K mini-batches: one backward pass each, or one for all."""

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from fedsam.base.timers import timed
from fedsam.base.vector import Layout
from fedsam.data.images import Batch
from fedsam.training.client import Trainer
from fedsam.training.flat_module import FlatModule, evaluating, precision
from fedsam.training.method import Loss


class Slots:
    """One ordinary backward pass a client; on a GPU each on its own stream.

    Parameters
    ----------
    trainer : Trainer
        Model and task.
    clients : int
        K.
    """

    def __init__(self, trainer: Trainer, clients: int) -> None:
        self.task = trainer.task
        self.networks = [trainer.new_network() for _ in range(clients)]
        for network in self.networks:
            network.module.train()
        on_gpu = trainer.layout.device.type == "cuda"
        self.streams = [torch.cuda.Stream() for _ in range(clients)] if on_gpu else []

    def load(self, states: Tensor) -> None:
        """Set the models to ``states`` (K, S)."""
        for network, state in zip(self.networks, states, strict=True):
            network.load(state)

    @timed("forward and backward")
    def __call__(
        self, w: Tensor, batch: Batch, loss: Loss, frozen: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return losses (K,) and gradients (K, P) at ``w`` (K, P)."""
        done = []
        here = torch.cuda.current_stream() if self.streams else None
        for k, network in enumerate(self.networks):
            of_client = client_of(batch, k)

            def value(model: FlatModule, of_client: Batch = of_client) -> Tensor:
                return loss.value(model, of_client, self.task)

            if here is None:
                done.append(network.gradient(w[k], value, frozen=frozen))
                continue
            self.streams[k].wait_stream(here)
            with torch.cuda.stream(self.streams[k]):
                done.append(network.gradient(w[k], value, frozen=frozen))
        for stream in self.streams:
            torch.cuda.current_stream().wait_stream(stream)
        losses, gradients = zip(*done, strict=True)
        return torch.stack(losses), torch.stack(gradients)


class Vmapped:
    """One backward pass for all clients: vmap turns it into batched matrix products.

    Parameters
    ----------
    trainer : Trainer
        Model and task.
    clients : int
        K.
    """

    def __init__(self, trainer: Trainer, clients: int) -> None:
        self.task = trainer.task
        self.layout = trainer.layout
        self.bf16 = trainer.bf16
        self.module = trainer.new_module().train()
        self.carried: dict[str, Tensor] = {}

    def load(self, states: Tensor) -> None:
        """Set the values that are carried to those of ``states`` (K, S)."""
        trainable = {entry.name for entry in self.layout.parameters}
        shared = {entry.offset for entry in self.layout.parameters}
        self.carried = {
            entry.name: entry.read(states)
            for entry in self.layout.entries
            if entry.name not in trainable and entry.offset not in shared
        }

    @timed("forward and backward")
    def __call__(
        self, w: Tensor, batch: Batch, loss: Loss, frozen: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return losses (K,) and gradients (K, P) at ``w`` (K, P)."""
        parameters = {entry.name: entry.view(w) for entry in self.layout.parameters}
        tensors = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}

        def value(
            parameters: dict[str, Tensor], carried: dict[str, Tensor], tensors: dict[str, Any]
        ) -> Tensor:
            model = Functional(self.module, parameters | carried, self.layout, self.bf16)
            return loss.value(model, replace(batch, **tensors), self.task)

        by_name, losses = vmap(grad_and_value(value))(parameters, self.carried, tensors)
        flats = [entry.flat(by_name[entry.name]) for entry in self.layout.parameters]
        return losses, torch.cat(flats, -1)


class Functional(NamedTuple):
    """A module with the values of one client in place of its own."""

    module: nn.Module
    values: dict[str, Tensor]
    layout: Layout
    bf16: bool

    def forward(self, images: Tensor) -> Tensor:
        """Return the output for ``images``, in w's dtype."""
        with precision(self.layout.device, self.bf16):
            output = functional_call(self.module, self.values, (images,))
        return output.to(self.layout.dtype)

    def evaluating(self) -> AbstractContextManager[None]:
        """Return a context in which the module is in eval mode."""
        return evaluating(self.module)


def client_of(batch: Batch, k: int) -> Batch:
    """Return the mini-batch of client ``k`` of a cohort's."""
    return batch.map(lambda tensor: tensor[k])
