"""What a model's output means: its loss and its metrics, behind a seam the engine never opens."""

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Task(Protocol):
    """A loss an example, and statistics that add up over examples."""

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each example, (B,)."""
        ...

    def statistics(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return float64 statistics of a batch that may be summed over batches."""
        ...

    def metrics(self, total: Tensor) -> dict[str, float]:
        """Return named metrics from summed statistics; must hold "loss" and "accuracy"."""
        ...
