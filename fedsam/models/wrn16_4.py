"""WRN-16-4: the wide residual network of Zagoruyko and Komodakis (BMVC 2016)."""

import torch
from torch import Tensor, nn

from fedsam.models import PreActivation, check_sides, normalisation

WIDTHS = (64, 128, 256)  # channels of the three stages, of two blocks each
STRIDE = 4  # of the whole network


class WRN164(nn.Module):
    """Depth 16, width 4, no dropout: 2,748,890 parameters for 10 classes of 3 x 32 x 32 images.

    Parameters
    ----------
    shape : tuple of int
        Channels, height and width of an image; at least 4 pixels a side.
    classes : int
        Number of classes.
    norm : str
        "group", "batch" (the paper's) or "none".
    groups : int
        Of GroupNorm.
    """

    def __init__(
        self, shape: tuple[int, int, int], classes: int, norm: str = "group", groups: int = 2
    ) -> None:
        super().__init__()
        check_sides("wrn16_4", shape, STRIDE)
        layer = normalisation(norm, groups)
        self.conv = nn.Conv2d(shape[0], 16, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        into = 16
        for stage, width in enumerate(WIDTHS):
            first = PreActivation(into, width, 2 if stage else 1, layer)
            blocks += [first, PreActivation(width, width, 1, layer)]
            into = width
        self.blocks = nn.Sequential(*blocks)
        self.norm = layer(into)
        self.fc = nn.Linear(into, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, classes) of images (B, C, H, W)."""
        x = torch.relu(self.norm(self.blocks(self.conv(images))))
        return self.fc(x.mean((2, 3)))
