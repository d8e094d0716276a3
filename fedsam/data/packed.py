"""The plans of a cohort in one tensor: one copy to the device a round."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedsam.data.images import VALID
from fedsam.data.plan import Plan, Work, make_plan


class Field(NamedTuple):
    """Where a choice lies in a packed tensor: in which planes, and what a number of it is."""

    planes: slice
    shape: tuple[int, ...]
    dtype: torch.dtype


class Packing:
    """Where each choice lies in the int32 tensor (F, K, S, B) of a cohort's plans.

    S is the largest number of steps and B the largest mini-batch of any client; what a shorter
    plan leaves empty is image 0, marked as not valid. Floats are float32, kept bit by bit.

    Parameters
    ----------
    work : Work
        What the plans choose.
    """

    def __init__(self, work: Work) -> None:
        one_image = torch.zeros(1, dtype=torch.int64)
        sample = make_plan(one_image, Work(1, 1, 0, work.augmentations), (1, 1), torch.Generator())
        choices = {VALID: torch.ones(1, 1, dtype=torch.bool), **sample.choices}
        self.fields: dict[str, Field] = {}
        self.planes = 0
        for name, tensor in choices.items():
            shape = tensor.shape[2:]
            end = self.planes + math.prod(shape)
            self.fields[name] = Field(slice(self.planes, end), shape, tensor.dtype)
            self.planes = end

    def pack(self, plans: Sequence[Plan], packed: Tensor) -> None:
        """Write K plans into ``packed``, a CPU tensor (F, K, S, B)."""
        packed.zero_()
        for k, plan in enumerate(plans):
            steps, width = plan.indices.shape
            sizes = torch.tensor(plan.sizes, dtype=torch.int32)[:, None]
            for name, values in {VALID: torch.arange(width) < sizes, **plan.choices}.items():
                field = self.fields[name]
                bits = values.view(torch.int32) if field.dtype == torch.float32 else values
                into = packed[field.planes, k, :steps, :width]
                into.copy_(bits.reshape(steps, width, -1).movedim(-1, 0))

    def choices(self, rows: Tensor) -> dict[str, Tensor]:
        """Return one step of all plans, (K, B, ...) by name, and "valid": which images there are.

        Parameters
        ----------
        rows : Tensor
            int32 (F, K, B), one step of a packed tensor.
        """
        return {name: self._read(rows, field) for name, field in self.fields.items()}

    @staticmethod
    def _read(rows: Tensor, field: Field) -> Tensor:
        values = rows[field.planes].movedim(0, -1).reshape(*rows.shape[1:], *field.shape)
        return (
            values.view(torch.float32) if field.dtype == torch.float32 else values.to(field.dtype)
        )
