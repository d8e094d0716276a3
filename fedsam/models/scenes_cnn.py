"""A small network that says what each pixel is."""

from collections.abc import Sequence

from torch import Tensor, nn

from fedsam.models import normalisation


class ScenesCnn(nn.Module):
    """Some convolutions at half the resolution, and a head that goes back to the full one.

    For images whose classes take two digits to tell: 16 x 16, 58,828 parameters for 11 classes.
    The head is BiSeNetV2's in small: what it says of a place is spread over its pixels.

    Parameters
    ----------
    shape : tuple of int
        Channels, height and width of an image; sides divisible by the stride.
    classes : int
        Number of classes.
    width : int
        Channels of the first convolution, half of the others'.
    stride : int
        Even; the side of what the head says at once, in pixels.
    dilations : sequence of int
        A 3 x 3 convolution each, so far apart are its taps.
    norm : str
        After each convolution: "none", "batch" or "group".
    groups : int
        Of GroupNorm.

    References
    ----------
    Yu et al., "BiSeNet V2", IJCV 2021; Shi et al., "Real-Time Single Image and Video
    Super-Resolution Using an Efficient Sub-Pixel Convolutional Neural Network", CVPR 2016; Yu and
    Koltun, "Multi-Scale Context Aggregation by Dilated Convolutions", ICLR 2016.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        width: int = 32,
        stride: int = 2,
        dilations: Sequence[int] = (1, 1),
        norm: str = "none",
        groups: int = 2,
    ) -> None:
        super().__init__()
        channels, *sides = shape
        if stride < 2 or stride % 2:
            raise ValueError(f"stride must be even, got {stride}")
        if any(side % stride for side in sides):
            raise ValueError(
                f"images of {sides[0]} x {sides[1]}: sides must be divisible by {stride}"
            )
        layer = normalisation(norm, groups)
        stem = nn.Conv2d(channels, width, 2 * stride, stride, padding=stride // 2)
        layers: list[nn.Module] = [stem, layer(width), nn.ReLU()]
        into = width
        for dilation in dilations:
            convolution = nn.Conv2d(into, 2 * width, 3, padding=dilation, dilation=dilation)
            layers += [convolution, layer(2 * width), nn.ReLU()]
            into = 2 * width
        self.features = nn.Sequential(*layers)
        self.head = nn.Conv2d(into, classes * stride**2, 1)
        self.spread = nn.PixelShuffle(stride)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, classes, H, W) of images (B, C, H, W)."""
        logits: Tensor = self.spread(self.head(self.features(images)))
        return logits
