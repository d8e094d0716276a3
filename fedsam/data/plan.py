"""The plan of one client's round: every random choice of its local training, drawn up front.

A local step is then a deterministic function of w and a row of the plan, which is what makes
engines agree, resumed runs continue and GPU steps capturable.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Work:
    """How much a client trains in a round, and what happens to its images.

    Attributes
    ----------
    batch_size : int
        Images a mini-batch; the last one of an epoch may be smaller and is kept.
    local_epochs : float
        Passes over the client's images; a fraction is rounded to whole steps, but at least one.
    local_steps : int
        Mini-batches a round, in place of ``local_epochs`` where positive.
    crop : int
        Random crop after zero padding by this many pixels; 0 for none.
    flip : bool
        Mirror each image with probability one half.
    cutout : int
        Side of the square that is set to the mean, in pixels; 0 for none.
    mixup : float
        Parameter a of lambda ~ Beta(a, a), one lambda a mini-batch; 0 for none.
    keys : bool
        Draw a key for each image, for a loss that is random.
    """

    batch_size: int
    local_epochs: float = 1.0
    local_steps: int = 0
    crop: int = 0
    flip: bool = False
    cutout: int = 0
    mixup: float = 0.0
    keys: bool = False

    def steps(self, examples: int) -> int:
        """Return the number of mini-batches a client with so many examples trains on."""
        if not examples:
            return 0
        if self.local_steps:
            return self.local_steps
        if not self.local_epochs:
            return 0
        return max(1, round(self.local_epochs * math.ceil(examples / self.batch_size)))


@dataclass(frozen=True)
class Choices:
    """What is chosen for n images: a row of a plan, or the rows of a whole cohort's plans.

    Attributes
    ----------
    indices : Tensor
        int64 (n,), rows of the training set.
    corners, flips, holes : Tensor or None
        (n, 2), (n,) and (n, 2), as in the plan.
    partners : Tensor or None
        int64 (n,), which of the n images is mixed into each.
    lam : float or Tensor
        Mixup's weight of the image itself; a tensor is (n,).
    cutout : int
        Side of the cutout, in pixels.
    drawn : Tensor or None
        int64 (n,), each image's key.
    """

    indices: Tensor
    corners: Tensor | None = None
    flips: Tensor | None = None
    holes: Tensor | None = None
    partners: Tensor | None = None
    lam: float | Tensor = 1.0
    cutout: int = 0
    drawn: Tensor | None = None


@dataclass(frozen=True)
class Plan:
    """What one client sees in one round: S steps of at most B images.

    Attributes
    ----------
    sizes : list of int
        Images in each step's mini-batch.
    indices : Tensor
        int64 (S, B), rows of the training set; the unused end of a short mini-batch repeats row 0.
    corners : Tensor or None
        int64 (S, B, 2), upper left corner of the crop in the padded image.
    flips : Tensor or None
        bool (S, B).
    holes : Tensor or None
        int64 (S, B, 2), centre of the cutout (row, column).
    partners : Tensor or None
        int64 (S, B), mixup's permutation within each mini-batch.
    lambdas : list of float or None
        Mixup's weight of the image itself, one a step.
    cutout : int
        Side of the cutout, in pixels.
    drawn : Tensor or None
        int64 (S, B) in [0, 2**31), each image's key.
    """

    sizes: list[int]
    indices: Tensor
    corners: Tensor | None = None
    flips: Tensor | None = None
    holes: Tensor | None = None
    partners: Tensor | None = None
    lambdas: list[float] | None = None
    cutout: int = 0
    drawn: Tensor | None = None

    def __len__(self) -> int:
        return len(self.sizes)

    def step(self, step: int) -> "Choices":
        """Return the choices of one step."""
        size = self.sizes[step]

        def row(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[step, :size]

        return Choices(
            self.indices[step, :size],
            row(self.corners),
            row(self.flips),
            row(self.holes),
            row(self.partners),
            1.0 if self.lambdas is None else self.lambdas[step],
            self.cutout,
            row(self.drawn),
        )

    def to(self, device: torch.device) -> "Plan":
        """Return the plan with its tensors on ``device``."""
        if device.type == "cpu":
            return self

        def there(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return replace(
            self,
            indices=self.indices.to(device, non_blocking=True),
            corners=there(self.corners),
            flips=there(self.flips),
            holes=there(self.holes),
            partners=there(self.partners),
            drawn=there(self.drawn),
        )


def make_plan(
    images: Tensor, work: Work, shape: tuple[int, int], generator: torch.Generator
) -> Plan:
    """Draw the plan of one client's round.

    Parameters
    ----------
    images : Tensor
        int64 (n,), the client's rows of the training set.
    work : Work
        How much is trained and how images are augmented.
    shape : tuple of int
        Height and width of an image, in pixels.
    generator : torch.Generator
        The key's own CPU generator.

    Returns
    -------
    Plan
        Each epoch is a fresh permutation of the client's images, cut into mini-batches.
    """
    sizes, rows = _mini_batches(images, work, generator)
    steps, batch = rows.shape
    height, width = shape
    corners = flips = holes = partners = lambdas = drawn = None
    if work.crop:
        corners = torch.randint(0, 2 * work.crop + 1, (steps, batch, 2), generator=generator)
    if work.flip:
        flips = torch.rand(steps, batch, generator=generator) < 0.5
    if work.cutout:
        limits = torch.tensor([height, width])
        holes = (torch.rand(steps, batch, 2, generator=generator) * limits).long()
    if work.mixup:
        partners = torch.zeros(steps, batch, dtype=torch.int64)
        for step, size in enumerate(sizes):
            partners[step, :size] = torch.randperm(size, generator=generator)
        lambdas = _beta(work.mixup, steps, generator)
    if work.keys:  # last: the rest of the plan is the same with and without them
        drawn = torch.randint(0, 2**31, (steps, batch), generator=generator)
    return Plan(sizes, rows, corners, flips, holes, partners, lambdas, work.cutout, drawn)


def _mini_batches(
    images: Tensor, work: Work, generator: torch.Generator
) -> tuple[list[int], Tensor]:
    """Cut as many shuffled epochs as are needed into mini-batches; the last one stays short."""
    steps = work.steps(len(images))
    width = min(work.batch_size, len(images))
    batches: list[Tensor] = []
    while len(batches) < steps:
        order = torch.randperm(len(images), generator=generator)
        batches.extend(images[order].split(work.batch_size))
    batches = batches[:steps]
    rows = images[:1].expand(steps, width).clone()
    for step, batch in enumerate(batches):
        rows[step, : len(batch)] = batch
    return [len(batch) for batch in batches], rows


def _beta(a: float, draws: int, generator: torch.Generator) -> list[float]:
    """Draw from Beta(a, a) by two gamma variates; values that float32 holds exactly."""
    concentration = torch.full((2, draws), a, dtype=torch.float64)
    x, y = torch._standard_gamma(concentration, generator=generator)
    return (x / (x + y)).float().tolist()
