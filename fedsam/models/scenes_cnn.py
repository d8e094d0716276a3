"""A small network that says what each pixel is."""

import torch
from torch import Tensor, nn


class ScenesCnn(nn.Module):
    """Three convolutions at half the resolution, and a head that goes back to the full one.

    For images whose classes take two digits to tell: 16 x 16, 58,828 parameters for 11 classes.
    Without normalisation layers. The head is BiSeNetV2's in small: what it says of a place is
    spread over its 2 x 2 pixels.

    Parameters
    ----------
    shape : tuple of int
        Channels, height and width of an image; sides divisible by 2.
    classes : int
        Number of classes.
    width : int
        Channels of the first convolution, half of the others'.

    References
    ----------
    Yu et al., "BiSeNet V2", IJCV 2021; Shi et al., "Real-Time Single Image and Video
    Super-Resolution Using an Efficient Sub-Pixel Convolutional Neural Network", CVPR 2016.
    """

    def __init__(self, shape: tuple[int, int, int], classes: int, width: int = 32) -> None:
        super().__init__()
        channels, height, width_of_image = shape
        if height % 2 or width_of_image % 2:
            raise ValueError(f"images of {height} x {width_of_image}: sides must be even")
        self.stem = nn.Conv2d(channels, width, 4, stride=2, padding=1)
        self.conv1 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.conv2 = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.head = nn.Conv2d(2 * width, 4 * classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, classes, H, W) of images (B, C, H, W)."""
        x = torch.relu(self.stem(images))
        x = torch.relu(self.conv1(x))
        x = torch.relu(self.conv2(x))
        return nn.functional.pixel_shuffle(self.head(x), 2)
