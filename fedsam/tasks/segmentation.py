"""Segmentation: a class for each pixel, the mean intersection over union of the classes."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsam.base.errors import UsageError


class Segmentation:
    """Cross entropy of pixels, for outputs (B, C, H, W) and masks (B, H, W).

    Of an image with the n pixels i, valid where the mask is not ``ignore``, and the cross entropies
    l_i, 0 where it is::

        loss = sum l_i / number of valid pixels                 hard = 0
        loss = mean of the hard n largest l_i of all n          hard > 0 (at least one pixel)

    and 0 where no pixel is valid. A network with auxiliary heads returns (B, heads, C, H, W), the
    main head first: ``loss = main + aux (sum of the others)``, and the main one answers.

    FedDrive (Fantauzzo et al., IROS 2022, arXiv 2202.13670) is ``hard=0.25, aux=1``. Without hard
    pixels its code divides by the valid pixels of the mini-batch, here each image counts the same.

    Parameters
    ----------
    classes : int
        C.
    ignore : int
        Value of a mask where a pixel is of no class.
    hard : float
        Share of the pixels that count, those of the largest loss; 0: all.
    aux : float
        Weight of each auxiliary head.
    """

    headline = "miou"

    def __init__(
        self, classes: int, ignore: int = 255, hard: float = 0.0, aux: float = 1.0
    ) -> None:
        if not 0 <= hard <= 1:
            raise ValueError(f"hard: must be a share of the pixels in [0, 1], got {hard}")
        if not (math.isfinite(aux) and aux >= 0):
            raise ValueError(f"aux: must be a weight, at least 0, got {aux}")
        self.classes = classes
        self.ignore = ignore
        self.hard = hard
        self.aux = aux

    def check(self, dataset: Any) -> None:
        """Raise UsageError where targets are no masks, or hold what is no class."""
        for part in ("train", "test"):
            masks = getattr(dataset, f"{part}_labels")
            if len(masks.shape) < 3:
                raise UsageError(f"--task segmentation: {dataset.name} has labels, not masks")
            if not isinstance(masks, Tensor):  # in files, and looked through when those were made
                continue
            values = [int(value) for value in masks.unique() if value != self.ignore]
            if not values:
                raise UsageError(
                    f"--task segmentation: all pixels of {dataset.name} for {part}ing are "
                    f"{self.ignore}, which is ignored"
                )
            if values[-1] >= self.classes:
                raise UsageError(
                    f"--task segmentation: a mask of {dataset.name} holds {values[-1]}; the "
                    f"classes are 0..{self.classes - 1}, {self.ignore} is ignored"
                )

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each image in nats, (B,)."""
        if output.dim() == 4:
            return self._of_head(output, targets)
        main, *others = (self._of_head(head, targets) for head in output.unbind(1))
        return main + self.aux * sum(others, torch.zeros_like(main))

    def _of_head(self, output: Tensor, targets: Tensor) -> Tensor:
        labels = targets.long()
        pixels = F.cross_entropy(output, labels, ignore_index=self.ignore, reduction="none")
        losses = pixels.flatten(1)
        if self.hard:
            count = max(1, int(self.hard * losses.shape[1]))
            return losses.topk(count, dim=1).values.mean(1)
        valid = (labels != self.ignore).flatten(1).sum(1)
        return losses.sum(1) / valid.clamp(min=1)

    def answer(self, output: Tensor) -> Tensor:
        """Return the class of each pixel, int64 (B, H, W)."""
        main = output if output.dim() == 4 else output[:, 0]
        return main.argmax(1)

    def statistics(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return (images, sum of losses, C^2 pixels by true class and answer), float64."""
        losses = self.loss(output, targets).double()
        labels, answers = targets.long().flatten(), self.answer(output).flatten()
        valid = labels != self.ignore
        cell = torch.where(valid, labels * self.classes + answers, 0)
        pixels = torch.zeros(self.classes**2, dtype=torch.float64, device=output.device)
        # counted like this and not by bincount, whose size would depend on values: it can be mapped
        confusion = pixels.scatter_add(0, cell, valid.double())
        images = torch.ones_like(losses).sum()
        return torch.cat([torch.stack([images, losses.sum()]), confusion])

    def metrics(self, total: Tensor) -> dict[str, Any]:
        """Return what a confusion matrix says, and the mean loss of an image in nats.

        ``miou``, over the classes that the masks hold; ``accuracy``, of pixels; ``class_accuracy``,
        the mean over those classes; ``iou``, of each class, NaN where the masks do not hold it.
        """
        images, losses = total[:2].tolist()
        confusion = total[2:].view(self.classes, self.classes)
        right, true, answered = confusion.diag(), confusion.sum(1), confusion.sum(0)
        held = true > 0
        iou = torch.where(held, right / (true + answered - right), torch.nan)
        return {
            "miou": iou[held].mean().item(),
            "accuracy": (right.sum() / true.sum()).item(),
            "class_accuracy": (right / true)[held].mean().item(),
            "loss": losses / images,
            "iou": iou.tolist(),
        }
