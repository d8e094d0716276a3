"""A small convolutional network for 8 x 8 digits."""

import torch
from torch import Tensor, nn


class DigitsCNN(nn.Module):
    """A small network for scikit-learn's digits: 1 x 8 x 8, 18,510 parameters for 10 classes.

    Parameters
    ----------
    shape : tuple of int
        Channels, height and width of an image; sides divisible by 2.
    classes : int
        Number of classes.
    """

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.fc1 = nn.Linear(16 * (height // 2) * (width // 2), 60)
        self.fc2 = nn.Linear(60, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, classes) of images (B, C, H, W)."""
        x = torch.relu(self.conv1(images))
        x = torch.relu(nn.functional.max_pool2d(self.conv2(x), 2))
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))
