"""The plan of one client's round: every random choice of its local training, drawn up front.

A local step is then a deterministic function of w and a row of the plan, which is what makes
engines agree, resumed runs continue and GPU steps capturable.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fedsam.data.augment import Augmentation, Seen
from fedsam.data.images import INDEX


@dataclass(frozen=True)
class Work:
    """How much a client trains in a round, and what happens to its images.

    Attributes
    ----------
    batch_size : int
        Images a mini-batch; the last one of an epoch may be smaller.
    local_epochs : float
        Passes over the client's images; a fraction is rounded to whole steps, but at least one.
    local_steps : int
        Mini-batches a round, in place of ``local_epochs`` where positive.
    augmentations : tuple of Augmentation
        Drawn and applied in this order.
    least : int
        Images that a mini-batch must hold: a smaller last one joins the one before it.
    drop_last : bool
        Leave a smaller last one out, unless it is the only one.
    """

    batch_size: int
    local_epochs: float = 1.0
    local_steps: int = 0
    augmentations: tuple[Augmentation, ...] = ()
    least: int = 1
    drop_last: bool = False

    @property
    def copies(self) -> int:
        """How often each image is seen in an epoch."""
        return math.prod(augmentation.copies for augmentation in self.augmentations)

    @property
    def padding(self) -> int:
        """Zero pixels that are needed around each image."""
        return max((augmentation.padding for augmentation in self.augmentations), default=0)

    def of(self, client: int) -> "Work":
        """Return the work of one client, whose images may be another's turned, or noisier."""
        if not self.augmentations:
            return self
        return replace(self, augmentations=tuple(a.of(client) for a in self.augmentations))

    def steps(self, examples: int) -> int:
        """Return the number of mini-batches a client with so many examples trains on."""
        if examples * self.copies < self.least:
            return 0
        if self.local_steps:
            return self.local_steps
        if not self.local_epochs:
            return 0
        return max(1, round(self.local_epochs * len(self.cut(examples))))

    def cut(self, examples: int) -> list[int]:
        """Return the images of each mini-batch of an epoch."""
        full, rest = divmod(examples * self.copies, self.batch_size)
        sizes = [self.batch_size] * full
        if not rest or (sizes and self.drop_last):
            return sizes
        if rest >= self.least or not sizes:
            return [*sizes, rest]
        return [*sizes[:-1], sizes[-1] + rest]


@dataclass(frozen=True)
class Plan:
    """What one client sees in one round: S steps of at most B images.

    Attributes
    ----------
    sizes : list of int
        Images in each step's mini-batch.
    choices : dict
        Tensors (S, B, ...) by name. "index", int64, is the images' rows of the training set; the
        unused end of a short mini-batch repeats row 0. The others are the augmentations'.
    augmentations : tuple of Augmentation
        Who drew them.
    """

    sizes: list[int]
    choices: dict[str, Tensor]
    augmentations: tuple[Augmentation, ...] = ()

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def indices(self) -> Tensor:
        """int64 (S, B), rows of the training set."""
        return self.choices[INDEX]

    def first(self, steps: int) -> "Plan":
        """Return the plan without what comes after so many steps."""
        choices = {name: tensor[:steps] for name, tensor in self.choices.items()}
        return replace(self, sizes=self.sizes[:steps], choices=choices)

    def at(self, rows: Tensor) -> "Plan":
        """Return the plan of images that lie at other ``rows``, int64 (S, B)."""
        return replace(self, choices={**self.choices, INDEX: rows})

    def step(self, step: int) -> dict[str, Tensor]:
        """Return the choices of one step, (B, ...)."""
        size = self.sizes[step]
        return {name: tensor[step, :size] for name, tensor in self.choices.items()}

    def to(self, device: torch.device) -> "Plan":
        """Return the plan with its tensors on ``device``."""
        if device.type == "cpu":
            return self
        moved = {name: t.to(device, non_blocking=True) for name, t in self.choices.items()}
        return replace(self, choices=moved)


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
        Each epoch is a fresh permutation of the client's images, or of their copies, cut into
        mini-batches.
    """
    sizes, rows, copies = _mini_batches(images, work, generator)
    choices = {INDEX: rows}
    for augmentation in work.augmentations:
        choices |= augmentation.draw(Seen(sizes, rows.shape[1], shape, copies), generator)
        shape = augmentation.shape(shape)
    return Plan(sizes, choices, work.augmentations)


def _mini_batches(
    images: Tensor, work: Work, generator: torch.Generator
) -> tuple[list[int], Tensor, Tensor]:
    """Cut as many shuffled epochs as are needed into mini-batches; a last one may stay short.

    Returns their sizes, the rows (S, B) of the data set, and which copy of it each is (S, B).
    """
    steps = work.steps(len(images))
    epoch = work.cut(len(images))
    width, each = max(epoch, default=0), sum(epoch)
    epochs = math.ceil(steps / len(epoch)) if steps else 0
    sizes = (epoch * epochs)[:steps]
    orders = [
        torch.randperm(len(images) * work.copies, generator=generator)[:each] for _ in range(epochs)
    ]
    if not orders:
        places = torch.zeros(0, width, dtype=torch.int64)
    elif sizes == [width] * steps:
        places = torch.cat(orders)[: steps * width].view(steps, width)
    else:  # a short mini-batch repeats the first image
        batches = [batch for order in orders for batch in order.split(epoch)][:steps]
        places = pad_sequence(batches, batch_first=True)
    if work.copies == 1 or not steps:
        return sizes, images[places], torch.zeros_like(places)
    copies = places.div(len(images), rounding_mode="floor")
    return sizes, images[places.remainder(len(images))], copies
