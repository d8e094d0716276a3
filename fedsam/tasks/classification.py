"""Classification: cross entropy and accuracy."""

import torch
from torch import Tensor
from torch.nn import functional as F


class Classification:
    """Cross entropy and accuracy, for outputs (B, classes) and int64 labels (B,)."""

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
