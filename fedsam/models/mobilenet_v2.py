"""MobileNetV2 (Sandler et al., CVPR 2018) for small images: torchvision's, with other strides."""

from torch import Tensor, nn
from torchvision.models import mobilenetv2

from fedsam.models import check_sides, normalisation

STRIDE = 8  # of the whole network
# expansion, channels, blocks, stride of the first: Table 2 but for the 24 channels' stride of 2
STAGES = [
    [1, 16, 1, 1],
    [6, 24, 2, 1],
    [6, 32, 3, 2],
    [6, 64, 4, 2],
    [6, 96, 3, 1],
    [6, 160, 3, 2],
    [6, 320, 1, 1],
]


class MobileNetV2(nn.Module):
    """torchvision's MobileNetV2 at strides for 32 x 32 pixels.

    The first convolution and the stage of 24 channels have stride 1 in place of 2, so the last
    feature map has 4 x 4 pixels. No dropout. 2,236,682 parameters for 10 classes of 3 channels,
    with either norm.

    Parameters
    ----------
    shape : tuple of int
        Channels, height and width of an image; at least 8 pixels a side.
    classes : int
        Number of classes.
    norm : str
        "group", "batch" (Sandler et al.) or "none".
    groups : int
        Of GroupNorm: 1, 2, 4 or 8.
    """

    def __init__(
        self, shape: tuple[int, int, int], classes: int, norm: str = "group", groups: int = 2
    ) -> None:
        super().__init__()
        check_sides("mobilenet_v2", shape, STRIDE)
        net = mobilenetv2.MobileNetV2(
            classes,
            inverted_residual_setting=STAGES,
            norm_layer=normalisation(norm, groups),
            dropout=0.0,
        )
        net.features[0][0] = nn.Conv2d(shape[0], 32, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(net.features[0][0].weight, mode="fan_out")
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, classes) of images (B, C, H, W)."""
        return self.net(images)
