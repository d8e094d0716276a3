"""A model whose parameters are views of one flat vector: what turns w into a gradient."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from fedsam.base.timers import timed
from fedsam.base.vector import Layout, is_frozen


def precision(device: torch.device, bf16: bool) -> AbstractContextManager[object]:
    """Return what a forward pass runs under: autocast to bfloat16, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Let a module be in eval mode inside, and as it was afterwards."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def replica(module: nn.Module) -> nn.Module:
    """Return a copy of a module that shares what is frozen with it."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters() if is_frozen(p)})


class FlatModule:
    """One copy of the model on one device, driven by state vectors.

    Parameters
    ----------
    module : nn.Module
        Taken over: its parameters and buffers become views of this network's own vector, but for
        the frozen ones.
    bf16 : bool
        Run the forward pass under autocast to bfloat16; w and its gradient stay in w's dtype.
    """

    def __init__(self, module: nn.Module, *, bf16: bool = False) -> None:
        self.module = module
        self.layout = Layout.of(module)
        self.bf16 = bf16
        tensors = module.state_dict(keep_vars=True)
        self.state = self.layout.write({name: t.detach() for name, t in tensors.items()})
        self.w = self.state[: self.layout.trainable]
        self._foreign = []  # buffers of another dtype cannot be views: copied at load and state
        for entry in self.layout.entries:
            tensor = tensors[entry.name]
            if tensor.dtype == self.state.dtype:
                tensor.data = entry.view(self.state)
            else:
                self._foreign.append((entry, tensor))
        self.parameters = [tensors[entry.name] for entry in self.layout.parameters]
        self._modules = list(module.modules())
        self._buffers = [
            (owner._buffers, name, tensor)
            for owner in module.modules()
            for name, tensor in owner._buffers.items()
            if tensor is not None and name not in owner._non_persistent_buffers_set
        ]

    def load(self, state: Tensor) -> None:
        """Set parameters and buffers to those of ``state`` (S,)."""
        for buffers, name, tensor in self._buffers:
            buffers[name] = tensor  # a forward may have put another in its place
        self.state.copy_(state)
        for entry, tensor in self._foreign:
            tensor.copy_(entry.read(self.state))

    def train(self) -> None:
        """Let the module be in training mode, as it says itself what that is."""
        if not all(module.training for module in self._modules):
            self.module.train()

    def carried(self) -> Tensor:
        """Return a copy of the values behind w (S - P,), e.g. the BatchNorm statistics."""
        for buffers, name, tensor in self._buffers:
            held = buffers[name]
            if held is not None and held is not tensor:
                tensor.copy_(held.detach())
                buffers[name] = tensor
        for entry, tensor in self._foreign:
            entry.view(self.state).copy_(tensor)
        return self.state[self.layout.trainable :].clone()

    def forward(self, images: Tensor) -> Tensor:
        """Return the model's output for ``images``, in w's dtype."""
        with precision(self.layout.device, self.bf16):
            output = self.module(images)
        return output.to(self.layout.dtype)

    def evaluating(self) -> AbstractContextManager[None]:
        """Return a context in which the module is in eval mode."""
        return evaluating(self.module)

    @timed("forward and backward")
    def gradient(
        self,
        w: Tensor,
        loss: Callable[["FlatModule"], Tensor],
        *,
        frozen: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return loss and gradient at ``w``.

        Parameters
        ----------
        w : Tensor
            Shape (P,).
        loss : callable
            From this network, set to ``w``, to a scalar.
        frozen : bool
            Leave the values behind w (BatchNorm statistics) as they are.

        Returns
        -------
        loss : Tensor
            Scalar, detached.
        gradient : Tensor
            A new tensor of shape (P,): nothing is accumulated, so nothing can be left over.
        """
        carried = self.carried() if frozen else None
        self.w.copy_(w)
        value = loss(self)
        g = self.gradient_of(value)
        if carried is not None:
            self.load(torch.cat([self.w, carried]))
        return value.detach(), g

    def gradient_of(self, value: Tensor, *, create_graph: bool = False) -> Tensor:
        """Return the gradient (P,) of a scalar that was computed from this network's parameters.

        ``create_graph``: so that it can be differentiated again.
        """
        g = torch.autograd.grad(
            value,
            self.parameters,
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
        return self.layout.concatenate(g)
