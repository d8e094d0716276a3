"""MobileNetV2 (Sandler et al., CVPR 2018), torchvision's, at strides for small images, too."""

from torch import Tensor, nn
from torchvision.models import mobilenetv2

from fedsam.models import check_sides, normalisation

STRIDES = {"small": 8, "imagenet": 32}  # of the whole network
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
    feature map of 32 x 32 pixels has 4 x 4, unless ``strides`` says otherwise. No dropout.
    2,236,682 parameters for 10 classes of 3 channels, with either norm and any strides.

    Parameters
    ----------
    shape : tuple of int
        Channels, height and width of an image; at least 8 pixels a side, or 32.
    classes : int
        Number of classes.
    norm : str
        "group", "batch" (Sandler et al.) or "none".
    groups : int
        Of GroupNorm: 1, 2, 4 or 8.
    strides : str
        "small", or "imagenet" for torchvision's own, made for 224 x 224 pixels.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        norm: str = "group",
        groups: int = 2,
        strides: str = "small",
    ) -> None:
        super().__init__()
        if strides not in STRIDES:
            raise ValueError(f"strides: must be {' or '.join(STRIDES)}, got {strides!r}")
        check_sides("mobilenet_v2", shape, STRIDES[strides])
        net = mobilenetv2.MobileNetV2(
            classes,
            inverted_residual_setting=STAGES if strides == "small" else None,
            norm_layer=normalisation(norm, groups),
            dropout=0.0,
        )
        stride = 1 if strides == "small" else 2
        net.features[0][0] = nn.Conv2d(shape[0], 32, 3, stride, padding=1, bias=False)
        nn.init.kaiming_normal_(net.features[0][0].weight, mode="fan_out")
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, classes) of images (B, C, H, W)."""
        return self.net(images)
