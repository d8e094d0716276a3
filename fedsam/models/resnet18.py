"""torchvision's ResNet-18, with BatchNorm or without any normalisation."""

from torch import Tensor, nn


class ResNet18(nn.Module):
    """The ImageNet network of He et al. (CVPR 2016), as Coldenhoff et al. (2022) train it.

    Its first layers (7 x 7 with stride 2, then pooling) shrink 32 x 32 images to 8 x 8 at once.
    11,181,642 parameters for 10 outputs and three channels.

    Parameters
    ----------
    shape : tuple of int
        Channels, height and width of an image.
    classes : int
        Number of classes.
    norm : str
        "batch", or "none": the identity in its place.
    outputs : int
        Of the last layer; 0: the classes. Coldenhoff et al. keep ImageNet's 1000, of which the
        labels use the first.
    """

    def __init__(
        self, shape: tuple[int, int, int], classes: int, norm: str = "batch", outputs: int = 0
    ) -> None:
        super().__init__()
        from torchvision.models import resnet18

        layers = {"batch": nn.BatchNorm2d, "none": lambda channels: nn.Identity()}
        if norm not in layers:
            raise ValueError(f"norm: must be 'batch' or 'none', got {norm!r}")
        if outputs and outputs < classes:
            raise ValueError(f"outputs: must be at least the classes, {classes}, got {outputs}")
        self.net = resnet18(num_classes=outputs or classes, norm_layer=layers[norm])
        if shape[0] != 3:
            self.net.conv1 = nn.Conv2d(shape[0], 64, 7, stride=2, padding=3, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, outputs) of images (B, C, H, W)."""
        return self.net(images)
