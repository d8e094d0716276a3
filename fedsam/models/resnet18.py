"""ResNet-18 (He et al., CVPR 2016) for small images: torchvision's, with another first layer."""

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from fedsam.models import check_sides, normalisation

STRIDE = 8  # of the whole network


class ResNet18(nn.Module):
    """torchvision's ResNet-18 that begins with a 3 x 3 convolution and no pooling.

    11,173,962 parameters for 10 classes of 3 x 32 x 32 images, with either norm. ImageNet's first
    layers (``first: imagenet``: 7 x 7 with stride 2, pooling) shrink 32 x 32 pixels to 8 x 8 at
    once: 11,181,642 parameters.

    Parameters
    ----------
    shape : tuple of int
        Channels, height and width of an image; at least 8 pixels a side.
    classes : int
        Number of classes.
    norm : str
        "group", "batch" (He et al.) or "none".
    groups : int
        Of GroupNorm; 2 as in Reddi et al. (ICLR 2021).
    first : str
        The first layers: "small", for small images, or "imagenet".
    outputs : int
        Of the last layer, at least the classes, which are the first of them; 0: the classes.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        norm: str = "group",
        groups: int = 2,
        first: str = "small",
        outputs: int = 0,
    ) -> None:
        super().__init__()
        check_sides("resnet18", shape, STRIDE)
        if first not in ("small", "imagenet"):
            raise ValueError(f"first: must be small or imagenet, got {first!r}")
        if outputs and outputs < classes:
            raise ValueError(f"outputs: must be at least the classes, {classes}, got {outputs}")
        layer = normalisation(norm, groups)
        net = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=outputs or classes, norm_layer=layer)
        if first == "small":
            net.conv1 = nn.Conv2d(shape[0], 64, 3, padding=1, bias=False)
            net.maxpool = nn.Identity()
        else:
            net.conv1 = nn.Conv2d(shape[0], 64, 7, 2, padding=3, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, classes) of images (B, C, H, W)."""
        return self.net(images)
