"""Classification: cross entropy and accuracy."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsam.base.errors import UsageError


class Classification:
    """Cross entropy and accuracy, for outputs (B, classes) and int64 labels (B,)."""

    headline = "accuracy"

    def check(self, dataset: Any) -> None:
        """Raise UsageError where targets are no labels, one an image."""
        for targets in (dataset.train_labels, dataset.test_labels):
            if len(targets.shape) != 1:
                raise UsageError(
                    f"--task classification: {dataset.name} has masks {tuple(targets.shape)}, not "
                    "one label an image"
                )

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return the cross entropy of each example in nats, (B,)."""
        return F.cross_entropy(output, targets, reduction="none")

    def statistics(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return (examples, right answers, sum of losses)."""
        right = (output.argmax(-1) == targets).sum()
        total = self.loss(output, targets).double().sum()
        return torch.stack([torch.ones_like(total) * len(targets), right.double(), total])

    def metrics(self, total: Tensor) -> dict[str, float]:
        """Return accuracy in [0, 1] and mean loss in nats."""
        examples, right, loss = total.tolist()
        return {"accuracy": right / examples, "loss": loss / examples}
