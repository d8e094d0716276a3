"""The loss over some images as a function of w: what every measure of flatness looks at."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fedsam.data.images import Batch, Images
from fedsam.engines.threads import on_device
from fedsam.flatness.sampling import parts_of
from fedsam.tasks import Task, headline_of
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
    population : int, optional
        How many images ``rows`` were drawn from; by default those are no sample.
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
        population: int = 0,
        chunk: int = 500,
    ) -> None:
        self.network = network
        self.layout = network.layout
        self.task = task
        self.images = images
        every = torch.arange(len(images)) if rows is None else rows
        self.rows = every.to(self.layout.device)
        self.population = population or len(self.rows)
        self.chunk = chunk
        self.w = state[: self.layout.trainable].clone()
        self._state = state.clone()

    def __len__(self) -> int:
        return len(self.rows)

    def on(self, rows: Tensor) -> "Objective":
        """Return the loss of the same model over other rows (N,) of the same images."""
        state = torch.cat([self.w, self._state[self.layout.trainable :]])
        return Objective(self.network, state, self.task, self.images, rows, chunk=self.chunk)

    def parts(self, seed: int) -> list["Objective"]:
        """Return the loss over disjoint parts of a sample's images; of all images: itself."""
        parts = parts_of(self.rows, self.population, seed)
        return [self] if len(parts) == 1 else [self.on(part) for part in parts]

    def loss(self, w: Tensor) -> Tensor:
        """Return L(w), a float64 scalar."""
        (loss,) = self._means(w, lambda loss: (loss.double(),), graph=False)
        return loss

    def gradient(self, w: Tensor) -> Tensor:
        """Return the gradient (P,) of L at ``w``."""
        return self.loss_and_gradient(w)[1]

    def loss_and_gradient(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return L(w), a float64 scalar, and its gradient (P,), from one pass."""
        loss, gradient = self._means(
            w, lambda loss: (loss.double(), self.network.gradient_of(loss))
        )
        return loss, gradient

    def curvature(self, w: Tensor, v: Tensor) -> Tensor:
        """Return H v (P,), the Hessian of L at ``w`` times ``v`` (P,)."""

        def product(loss: Tensor) -> tuple[Tensor]:
            slope = self.network.gradient_of(loss, create_graph=True) @ v
            return (self.network.gradient_of(slope),)

        return self._means(w, product)[0]

    def metrics(self, w: Tensor) -> dict[str, float]:
        """Return the task's metrics at ``w``: its headline in [0, 1], loss in nats."""
        return self.task.metrics(self.statistics(w))

    def statistics(self, w: Tensor) -> Tensor:
        """Return the task's statistics at ``w``, float64 (D,), which add up over images."""
        with full_precision(self.layout.device):
            self._load(w)
            return statistics(self.network, self.task, self._chunks())

    def _means(
        self, w: Tensor, of: Callable[[Tensor], tuple[Tensor, ...]], *, graph: bool = True
    ) -> list[Tensor]:
        """Return the means over all images of what ``of`` makes of a chunk's mean loss."""
        self._load(w)
        means: list[Tensor] = []
        with full_precision(self.layout.device), torch.set_grad_enabled(graph):
            for batch in self._chunks():
                output = self.network.forward(batch.images)
                values = of(self.task.loss(output, batch.targets).mean())
                share = len(batch.targets) / len(self)
                parts = [value.detach() * share for value in values]
                means = [a + b for a, b in zip(means, parts, strict=True)] if means else parts
        if not means:
            raise ValueError("an objective needs at least one image")
        return means

    def _load(self, w: Tensor) -> None:
        self._state[: self.layout.trainable] = w
        self.network.load(self._state)
        self.network.module.eval()

    def _chunks(self) -> Iterator[Batch]:
        for rows in self.rows.split(self.images.at_a_time(self.chunk)):
            yield self.images.rows(rows)


class NormalizedLogits:
    """A task with each example's outputs less their mean, and divided by their l2 norm.

    So that what only scales the logits, and changes no answer, changes no loss either
    (Andriushchenko et al., ICML 2023, section 3; at least 1e-10 is divided by, as in their code).

    Parameters
    ----------
    task : Task
        Reads outputs (B, classes).
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.headline = headline_of(task)

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each example, (B,)."""
        return self.task.loss(self._normalized(output), targets)

    def statistics(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return the task's statistics of a batch."""
        return self.task.statistics(self._normalized(output), targets)

    def metrics(self, total: Tensor) -> dict[str, float]:
        """Return the task's metrics."""
        return self.task.metrics(total)

    def _normalized(self, output: Tensor) -> Tensor:
        centred = output - output.mean(-1, keepdim=True)
        return centred / centred.norm(dim=-1, keepdim=True).clamp(min=1e-10)
