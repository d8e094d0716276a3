"""Segmentation: cross entropy a pixel, and the mean intersection over union."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsam.base.errors import UsageError


class Segmentation:
    """What each pixel is, for outputs (B, classes, H, W) and masks (B, H, W).

    The loss of an image is the mean over its pixels that say something, or, with ``hard``, over
    the part of all its pixels whose losses are the largest (a pixel that says nothing has none).
    A batch's loss is the mean of its images', so an image counts the same however much of it is
    ignored. Outputs (B, heads, classes, H, W), as of a network with auxiliary heads in training:
    the first head is the answer, and each further one adds its loss.

    Parameters
    ----------
    classes : int
        C, how many there are.
    ignore : int
        The mask's value that says nothing.
    hard : float
        Part of an image's pixels, in (0, 1], or 0 for all that say something. FedDrive: 0.25.
    aux : float
        Weight of each auxiliary head's loss.

    References
    ----------
    Fantauzzo et al., "FedDrive: Generalizing Federated Learning to Semantic Segmentation in
    Autonomous Driving", IROS 2022: ``hard`` and the mean over classes that occur in the truth.
    """

    headline = "miou"

    def __init__(
        self, classes: int, ignore: int = 255, hard: float = 0.0, aux: float = 1.0
    ) -> None:
        if not 0 <= hard <= 1:
            raise ValueError(f"hard must be a part of the pixels, in [0, 1], got {hard}")
        self.classes = classes
        self.ignore = ignore
        self.hard = hard
        self.aux = aux

    def check(self, dataset: Any) -> None:
        """Raise UsageError where targets are no masks, one an image."""
        for targets in (dataset.train_labels, dataset.test_labels):
            if targets.dim() != 3:
                raise UsageError(
                    f"--task segmentation: {dataset.name} has labels {tuple(targets.shape)}, not "
                    "one mask an image"
                )

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each image in nats a pixel, (B,)."""
        if output.dim() == 4:
            return self._of_head(output, targets)
        first, *others = (self._of_head(head, targets) for head in output.unbind(1))
        return first + self.aux * torch.stack(others).sum(0) if others else first

    def _of_head(self, output: Tensor, targets: Tensor) -> Tensor:
        pixels = F.cross_entropy(
            output, targets.long(), ignore_index=self.ignore, reduction="none"
        ).flatten(1)
        if self.hard:
            worst = max(1, int(self.hard * pixels.shape[1]))
            return pixels.topk(worst, dim=1).values.mean(1)
        said = (targets != self.ignore).flatten(1).sum(1)
        return pixels.sum(1) / said.clamp(min=1)

    def answer(self, output: Tensor) -> Tensor:
        """Return the class of each pixel, int64 (B, H, W)."""
        first = output if output.dim() == 4 else output[:, 0]
        return first.argmax(1)

    def statistics(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return images, the sum of their losses, and the C x C pixels by truth and answer."""
        answer = self.answer(output)
        truth = targets.long()
        cells = self.classes**2  # and one behind them, for pixels that say nothing
        cell = torch.where(truth == self.ignore, cells, truth * self.classes + answer).flatten()
        ones = torch.ones_like(cell, dtype=torch.float64)
        confusion = torch.zeros(cells + 1, dtype=torch.float64, device=cell.device)
        confusion = confusion.scatter_add(0, cell, ones)[:cells]
        total = self.loss(output, targets).double().sum()
        return torch.cat([torch.stack([torch.ones_like(total) * len(targets), total]), confusion])

    def metrics(self, total: Tensor) -> dict[str, float]:
        """Return mIoU and its kin in [0, 1], and the mean loss.

        With n_ij the pixels of class i that are said to be j, over the classes that occur::

            iou_i           n_ii / (sum_j n_ij + sum_j n_ji - n_ii)
            miou            mean_i iou_i
            accuracy        sum_i n_ii / sum_ij n_ij
            class_accuracy  mean_i n_ii / sum_j n_ij
        """
        images, loss = total[:2].tolist()
        n = total[2:].view(self.classes, self.classes)
        right, truth, said = n.diagonal(), n.sum(1), n.sum(0)
        occurs = truth > 0
        iou = right[occurs] / (truth + said - right)[occurs]
        return {
            "miou": float(iou.mean()),
            "accuracy": float(right.sum() / n.sum()),
            "class_accuracy": float((right / truth)[occurs].mean()),
            "loss": loss / images,
        }
