"""The convolutional network of the FedSAM paper."""

import torch
from torch import Tensor, nn

from fedsam.base.fourier import FourierConv2d


def _pooled(side: int) -> int:
    """Return the side of a square after a 5 x 5 convolution and a pooling by 2."""
    return (side - 4) // 2


class CNN(nn.Module):
    """The LeNet-like network of Caldarola et al. (ECCV 2022) and Hsu et al. (ECCV 2020).

    Two 5 x 5 convolutions of 64 channels, each with ReLU and 2 x 2 max pooling, then 384 and 192
    hidden units. No normalisation, no dropout: 797,962 parameters for 10 classes of 3 x 32 x 32
    images, 815,332 for 100.

    Parameters
    ----------
    shape : tuple of int
        Channels, height and width of an image; at least 16 pixels a side.
    classes : int
        Number of classes.
    """

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        if min(height, width) < 16:
            raise ValueError(
                f"the cnn needs images of 16 x 16 pixels or more, got {height} x {width}"
            )
        features = 64 * _pooled(_pooled(height)) * _pooled(_pooled(width))
        self.conv1 = nn.Conv2d(channels, 64, 5)
        self.conv2 = FourierConv2d(64, 64, 5)
        self.fc1 = nn.Linear(features, 384)
        self.fc2 = nn.Linear(384, 192)
        self.fc3 = nn.Linear(192, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, classes) of images (B, C, H, W)."""
        # pooling before ReLU is the same function and leaves ReLU a quarter of the work
        x = torch.relu(nn.functional.max_pool2d(self.conv1(images), 2))
        x = torch.relu(nn.functional.max_pool2d(self.conv2(x), 2))
        x = torch.relu(self.fc1(x.flatten(1)))
        x = torch.relu(self.fc2(x))
        return self.fc3(x)
