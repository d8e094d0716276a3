"""Networks: one file a model, made from an image's shape and the number of classes."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def normalisation(norm: str, groups: int) -> Callable[[int], nn.Module]:
    """Return what makes a network's normalisation layers from their number of channels.

    Parameters
    ----------
    norm : str
        "group" (Wu and He, 2018), "batch" or "none".
    groups : int
        Of GroupNorm; must divide the channels of every layer.

    Raises
    ------
    ValueError
        If there is no such norm.
    """
    makers: dict[str, Callable[[int], nn.Module]] = {
        "group": lambda channels: nn.GroupNorm(groups, channels),
        "batch": nn.BatchNorm2d,
        "none": lambda channels: nn.Identity(),
    }
    if norm not in makers:
        raise ValueError(f"norm: must be {', '.join(makers)}, got {norm!r}")
    if groups < 1:
        raise ValueError(f"groups: must be at least 1, got {groups}")
    return makers[norm]


def check_sides(name: str, shape: tuple[int, int, int], least: int) -> None:
    """Raise ValueError if an image has fewer than ``least`` pixels a side."""
    _, height, width = shape
    if min(height, width) < least:
        raise ValueError(
            f"the {name} needs images of {least} x {least} pixels or more, got {height} x {width}"
        )


class PreActivation(nn.Module):
    """A residual block of two 3 x 3 convolutions, each after its norm and ReLU (He et al., 2016b).

    Where the width changes the shortcut is a 1 x 1 convolution, after the first norm and ReLU.

    Parameters
    ----------
    into, width : int
        Channels before and after.
    stride : int
        Of the first convolution and the shortcut.
    layer : callable
        Makes a normalisation layer from its channels.
    """

    def __init__(
        self, into: int, width: int, stride: int, layer: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.norm1 = layer(into)
        self.conv1 = nn.Conv2d(into, width, 3, stride, padding=1, bias=False)
        self.norm2 = layer(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        wider = into != width
        self.shortcut = nn.Conv2d(into, width, 1, stride, bias=False) if wider else None

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, width, H / stride, W / stride) from (B, into, H, W)."""
        h = torch.relu(self.norm1(x))
        residual = x if self.shortcut is None else self.shortcut(h)
        return residual + self.conv2(torch.relu(self.norm2(self.conv1(h))))
