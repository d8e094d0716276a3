"""ResNet-18 (He et al., CVPR 2016) for small images: torchvision's, with another first layer."""

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from fedsam.models import check_sides, normalisation

STRIDE = 8  # of the whole network


class ResNet18(nn.Module):
    """torchvision's ResNet-18 that begins with a 3 x 3 convolution and no pooling.

    11,173,962 parameters for 10 classes of 3 x 32 x 32 images, with either norm.

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
    """

    def __init__(
        self, shape: tuple[int, int, int], classes: int, norm: str = "group", groups: int = 2
    ) -> None:
        super().__init__()
        check_sides("resnet18", shape, STRIDE)
        net = ResNet(
            BasicBlock, [2, 2, 2, 2], num_classes=classes, norm_layer=normalisation(norm, groups)
        )
        net.conv1 = nn.Conv2d(shape[0], 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, classes) of images (B, C, H, W)."""
        return self.net(images)
