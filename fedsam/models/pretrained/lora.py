"""LoRA: a frozen weight and a trained product of low rank beside it::

    W = W0 + (alpha / r) B A        A (r, n) random, B (m, r) zero, W (m, n)

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022 (arXiv 2106.09685); A as
in the authors' code, uniform in +-1 / sqrt(n). W is what W0 is: for a linear layer (out, in), for
a convolution (out, in height width), for attention's ``in_proj_weight`` (3 width, width).

The mean of the clients' products is not the product of their means, so FedAvg of A and B is not
that of W. It is where A is the same for all, and fixed: FFA-LoRA (Sun et al., "Improving LoRA in
Privacy-preserving Federated Learning", ICLR 2024, arXiv 2403.12313)::

    mean_k(B_k A) = mean_k(B_k) A
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList

from fedsam.base.errors import UsageError
from fedsam.models.pretrained.trainable import freeze_norms, names_of, train_only

OF_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class LoraOptions:
    """What may be said of LoRA beside its rank and targets.

    Attributes
    ----------
    alpha : float, optional
        The product counts alpha / r; by default 1.
    freeze : str
        "a" fixes A where it began (FFA-LoRA), "" trains it.

    Raises
    ------
    ValueError
        If alpha is not above 0, or freeze is something else.
    """

    alpha: float | None = None
    freeze: str = ""

    def __post_init__(self) -> None:
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"alpha: must be above 0, got {self.alpha}")
        if self.freeze not in ("", "a"):
            raise ValueError(f"freeze: must be a, or left out, got {self.freeze!r}")


@dataclass(frozen=True)
class Lora:
    """Which weights get products, and of which rank.

    Attributes
    ----------
    rank : int
        Of the products; 0: there are none.
    pattern : str
        Finds the names of the weights; "": those of linear layers and of attention.
    options : LoraOptions
        What else there is to say.
    """

    rank: int
    pattern: str = ""
    options: LoraOptions = field(default_factory=LoraOptions)

    @property
    def scale(self) -> float:
        """Alpha / r."""
        return 1.0 if self.options.alpha is None else self.options.alpha / self.rank


class LowRank(nn.Module):
    """The parametrization of one weight.

    Parameters
    ----------
    weight : Tensor
        W0, two dimensions or more; not changed.
    lora : Lora
        The rank, alpha, and whether A is fixed.
    generator : torch.Generator
        Draws A.
    """

    def __init__(self, weight: Tensor, lora: Lora, generator: torch.Generator) -> None:
        super().__init__()
        m, n, r = len(weight), weight[0].numel(), lora.rank
        bound = 1 / math.sqrt(n)
        A = torch.empty(r, n, dtype=weight.dtype).uniform_(-bound, bound, generator=generator)
        self.A = nn.Parameter(A, requires_grad=not lora.options.freeze)
        self.B = nn.Parameter(torch.zeros(m, r, dtype=weight.dtype))
        self.scale = lora.scale

    def forward(self, weight: Tensor) -> Tensor:
        """Return W of W0."""
        return adapted(weight, self.A, self.B, self.scale)


def adapted(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return W0 + scale B A in the shape of W0."""
    return weight + scale * (B @ A).reshape(weight.shape)


class Target(NamedTuple):
    """A weight that may get a product: its name, the layer that holds it, what that calls it."""

    name: str
    layer: nn.Module
    attribute: str

    @property
    def weight(self) -> nn.Parameter:
        """W0."""
        return self.layer.get_parameter(self.attribute)


def targets(module: nn.Module, lora: Lora) -> list[Target]:
    """Return the weights of a network that get products, of those that do not train as a whole.

    Raises
    ------
    UsageError
        If there are none, one is too small for the rank, or belongs to two layers.
    """
    rank, pattern = lora.rank, lora.pattern
    chosen = [t for t in _weights(module, pattern) if not t.weight.requires_grad]
    where = f"--lora-targets {pattern}" if pattern else f"--lora {rank}"
    if not chosen:
        raise UsageError(
            f"{where}: no weight of two dimensions or more, which --train leaves frozen, "
            f"{'is called so' if pattern else 'is that of a linear layer or of attention'}; "
            f"{names_of(module)}"
        )
    uses = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    for target in chosen:
        most = min(len(target.weight), target.weight[0].numel())
        if rank > most:
            raise UsageError(
                f"--lora {rank}: {target.name} has rank {most} at most; train it as a whole "
                "(--train), or leave it out of --lora-targets"
            )
        if uses[id(target.weight)] > 1:
            raise UsageError(f"{where}: {target.name} belongs to two layers, which LoRA would part")
    return chosen


def train_partly(
    module: nn.Module, train: str, lora: Lora, generator: torch.Generator, *, saved: bool = False
) -> None:
    """Let a part of a network train, in place; the products begin at zero.

    Parameters
    ----------
    module : nn.Module
        Changed in place.
    train : str
        Finds the names of the parameters that train as a whole; "": none.
    lora : Lora
        Which weights get products.
    generator : torch.Generator
        Draws their A.
    saved : bool
        Let the weights themselves train that would get products: those of a file have them added.
    """
    train_only(module, train)
    for target in targets(module, lora) if lora.rank else []:
        if saved:
            target.weight.requires_grad_(True)
        else:
            product = LowRank(target.weight, lora, generator)
            parametrize.register_parametrization(target.layer, target.attribute, product)
    freeze_norms(module)


def merged(tensors: Mapping[str, Tensor], lora: Lora) -> dict[str, Tensor]:
    """Return the ``state_dict`` of the network without products, with W where it had W0.

    Parameters
    ----------
    tensors : mapping
        The ``state_dict`` of a network with products.
    lora : Lora
        What they were made by.
    """
    out = {}
    for name, tensor in tensors.items():
        prefix, found, rest = name.rpartition("parametrizations.")
        attribute, _, part = rest.partition(".")
        if not found:
            out[name] = tensor
        elif part == "original":
            A, B = (tensors[f"{prefix}parametrizations.{attribute}.0.{n}"] for n in "AB")
            out[prefix + attribute] = adapted(tensor, A, B, lora.scale)
    return out


def _weights(module: nn.Module, pattern: str) -> Iterator[Target]:
    for prefix, layer in module.named_modules():
        if isinstance(layer, ParametrizationList):
            continue
        for attribute, parameter in layer.named_parameters(recurse=False):
            name = f"{prefix}.{attribute}" if prefix else attribute
            usual = (isinstance(layer, nn.Linear) and attribute == "weight") or (
                isinstance(layer, nn.MultiheadAttention) and attribute in OF_ATTENTION
            )
            if parameter.dim() > 1 and (re.search(pattern, name) if pattern else usual):
                yield Target(name, layer, attribute)
