"""The loss over some images as a function of w: what every measure of flatness looks at."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fedsam.data.images import Batch, Images
from fedsam.engines.threads import on_device
from fedsam.tasks import Task
from fedsam.training.evaluation import statistics
from fedsam.training.flat_module import FlatModule


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Let products be those of the tensors' dtype inside: no TF32, no autocast."""
    with on_device(device, "fp32"), torch.autocast(device.type, enabled=False):
        yield


class Objective:
    """L(w): the mean loss of a model over some images, in eval mode and without augmentation.

    Parameters
    ----------
    network : FlatModule
        The model to compute with; what it held before does not matter. In full precision.
    state : Tensor
        (S,); its values behind w (BatchNorm statistics) are those of L, whatever w.
    task : Task
        What the model's output means.
    images : Images
        The data set.
    rows : Tensor, optional
        int64 (N,), the images that count; by default all.
    chunk : int
        Images computed at a time: bounds the memory, not the result.

    Attributes
    ----------
    w : Tensor
        A copy of the parameters (P,) in ``state``.
    """

    def __init__(
        self,
        network: FlatModule,
        state: Tensor,
        task: Task,
        images: Images,
        rows: Tensor | None = None,
        *,
        chunk: int = 500,
    ) -> None:
        self.network = network
        self.layout = network.layout
        self.task = task
        self.images = images
        every = torch.arange(len(images)) if rows is None else rows
        self.rows = every.to(self.layout.device)
        self.chunk = chunk
        self.w = state[: self.layout.trainable].clone()
        self._state = state.clone()

    def __len__(self) -> int:
        return len(self.rows)

    def on(self, rows: Tensor) -> "Objective":
        """Return the loss of the same model over other rows (N,) of the same images."""
        state = torch.cat([self.w, self._state[self.layout.trainable :]])
        return Objective(self.network, state, self.task, self.images, rows, chunk=self.chunk)

    def loss(self, w: Tensor) -> Tensor:
        """Return L(w), a float64 scalar."""
        return self._mean(w, lambda loss: loss.double())

    def gradient(self, w: Tensor) -> Tensor:
        """Return the gradient (P,) of L at ``w``."""
        return self._mean(w, self.network.gradient_of, graph=True)

    def curvature(self, w: Tensor, v: Tensor) -> Tensor:
        """Return H v (P,), the Hessian of L at ``w`` times ``v`` (P,)."""

        def product(loss: Tensor) -> Tensor:
            slope = self.network.gradient_of(loss, create_graph=True) @ v
            return self.network.gradient_of(slope)

        return self._mean(w, product, graph=True)

    def metrics(self, w: Tensor) -> dict[str, float]:
        """Return the task's metrics at ``w``: accuracy in [0, 1], loss in nats."""
        with full_precision(self.layout.device):
            self._load(w)
            return self.task.metrics(statistics(self.network, self.task, self._chunks()))

    def _mean(self, w: Tensor, of: Callable[[Tensor], Tensor], *, graph: bool = False) -> Tensor:
        """Return the mean over all images of what ``of`` makes of a chunk's mean loss."""
        self._load(w)
        total: Tensor | None = None
        with full_precision(self.layout.device), torch.set_grad_enabled(graph):
            for batch in self._chunks():
                output = self.network.forward(batch.images)
                value = of(self.task.loss(output, batch.targets).mean()).detach()
                part = value * (len(batch.targets) / len(self))
                total = part if total is None else total + part
        if total is None:
            raise ValueError("an objective needs at least one image")
        return total

    def _load(self, w: Tensor) -> None:
        self._state[: self.layout.trainable] = w
        self.network.load(self._state)
        self.network.module.eval()

    def _chunks(self) -> Iterator[Batch]:
        for rows in self.rows.split(self.chunk):
            yield self.images.rows(rows)
