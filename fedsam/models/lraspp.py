"""LR-ASPP on MobileNetV3-Large, torchvision's, for segmentation."""

from torch import Tensor, nn

from fedsam.models import normalisation


class Lraspp(nn.Module):
    """Torchvision's network with a norm of choice: 3,221,198 parameters for 19 classes.

    Not pretrained. Logits have the images' size, bilinear.

    Parameters
    ----------
    shape : tuple of int
        Channels (3), height and width of an image.
    classes : int
        Number of classes.
    norm : str
        "batch" as published, "group" or "none".
    groups : int
        Of GroupNorm; 8 divides the channels of every layer.

    References
    ----------
    Howard et al., "Searching for MobileNetV3", ICCV 2019.
    """

    def __init__(
        self, shape: tuple[int, int, int], classes: int, norm: str = "batch", groups: int = 8
    ) -> None:
        super().__init__()
        from torchvision.models.segmentation import lraspp_mobilenet_v3_large

        if shape[0] != 3:
            raise ValueError(f"takes images of 3 channels, got {shape[0]}")
        layer = normalisation(norm, groups)
        self.network = lraspp_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=classes
        )
        if norm != "batch":
            for module in list(self.network.modules()):
                for name, child in module.named_children():
                    if isinstance(child, nn.BatchNorm2d):
                        setattr(module, name, layer(child.num_features))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, classes, H, W) of images (B, 3, H, W)."""
        logits: Tensor = self.network(images)["out"]
        return logits
