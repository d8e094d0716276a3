"""The plans of a cohort in one tensor: one copy to the device a round."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsam.data.plan import Choices, Plan, Work


class Packing:
    """Where each choice lies in the int32 tensor (F, K, S, B) of a cohort's plans.

    S is the largest number of steps and B the largest mini-batch of any client; what a shorter
    plan leaves empty is image 0, marked as not valid.

    Parameters
    ----------
    work : Work
        What the plans choose.
    """

    def __init__(self, work: Work) -> None:
        self.cutout = work.cutout
        fields = ["valid", "index"]
        fields += ["row", "column"] if work.crop else []
        fields += ["flip"] if work.flip else []
        fields += ["hole_row", "hole_column"] if work.cutout else []
        fields += ["partner", "lam"] if work.mixup else []
        fields += ["drawn"] if work.keys else []
        self.place = {field: number for number, field in enumerate(fields)}

    def pack(self, plans: Sequence[Plan], packed: Tensor) -> None:
        """Write K plans into ``packed``, a CPU tensor (F, K, S, B)."""
        packed.zero_()
        for k, plan in enumerate(plans):
            steps, width = plan.indices.shape
            into = {name: packed[f, k, :steps, :width] for name, f in self.place.items()}
            sizes = torch.tensor(plan.sizes, dtype=torch.int32)[:, None]
            into["valid"].copy_(torch.arange(width) < sizes)
            into["index"].copy_(plan.indices)
            if plan.corners is not None:
                into["row"].copy_(plan.corners[..., 0])
                into["column"].copy_(plan.corners[..., 1])
            if plan.flips is not None:
                into["flip"].copy_(plan.flips)
            if plan.holes is not None:
                into["hole_row"].copy_(plan.holes[..., 0])
                into["hole_column"].copy_(plan.holes[..., 1])
            if plan.partners is not None and plan.lambdas is not None:
                into["partner"].copy_(plan.partners)
                lambdas = torch.tensor(plan.lambdas, dtype=torch.float32)
                into["lam"].copy_(lambdas.view(torch.int32)[:, None])
            if plan.drawn is not None:
                into["drawn"].copy_(plan.drawn)

    def choices(self, rows: Tensor) -> tuple[Choices, Tensor]:
        """Return one step of all plans, flattened to K x B images, and which of them are valid.

        Parameters
        ----------
        rows : Tensor
            int32 (F, K, B), one step of a packed tensor.
        """
        _, clients, width = rows.shape

        def one(name: str) -> Tensor:
            return rows[self.place[name]].reshape(-1).long()

        def two(first: str, second: str) -> Tensor | None:
            return torch.stack([one(first), one(second)], 1) if first in self.place else None

        partners: Tensor | None = None
        lam: float | Tensor = 1.0
        if "partner" in self.place:
            first = torch.arange(clients, device=rows.device)[:, None] * width
            partners = (rows[self.place["partner"]] + first).reshape(-1)
            lam = rows[self.place["lam"]].reshape(-1).view(torch.float32)
        chosen = Choices(
            one("index"),
            two("row", "column"),
            one("flip").bool() if "flip" in self.place else None,
            two("hole_row", "hole_column"),
            partners,
            lam,
            self.cutout,
            one("drawn") if "drawn" in self.place else None,
        )
        return chosen, rows[self.place["valid"]].bool()
