"""ResNet-20 for CIFAR (He et al., CVPR 2016, section 4.2), of torchvision's blocks."""

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from fedsam.models import check_sides, normalisation

WIDTHS = (16, 32, 64)  # channels of the three stages, of three blocks each
STRIDE = 4  # of the whole network


class ResNet20(nn.Module):
    """Nineteen 3 x 3 convolutions in nine residual blocks, average pooling, one linear layer.

    Shortcuts hold no parameters (option A): 269,722 for 10 classes of 3 x 32 x 32 images with
    either norm.

    Parameters
    ----------
    shape : tuple of int
        Channels, height and width of an image; at least 4 pixels a side.
    classes : int
        Number of classes.
    norm : str
        "group", "batch" (He et al.) or "none".
    groups : int
        Of GroupNorm; 2 as in Hsieh et al. (ICML 2020) and Reddi et al. (ICLR 2021).
    """

    def __init__(
        self, shape: tuple[int, int, int], classes: int, norm: str = "group", groups: int = 2
    ) -> None:
        super().__init__()
        check_sides("resnet20", shape, STRIDE)
        layer = normalisation(norm, groups)
        self.conv1 = nn.Conv2d(shape[0], WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = layer(WIDTHS[0])
        blocks: list[nn.Module] = []
        into = WIDTHS[0]
        for width in WIDTHS:
            for _ in range(3):
                shortcut = None
                if width > into:  # every second pixel, and channels of zeros behind
                    zeros = nn.ConstantPad3d((0, 0, 0, 0, 0, width - into), 0.0)
                    shortcut = nn.Sequential(nn.AvgPool2d(1, 2), zeros)
                blocks.append(BasicBlock(into, width, width // into, shortcut, norm_layer=layer))
                into = width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(into, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, classes) of images (B, C, H, W)."""
        x = torch.relu(self.bn1(self.conv1(images)))
        return self.fc(self.blocks(x).mean((2, 3)))
