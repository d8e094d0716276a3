"""A multi-layer perceptron: McMahan's 200-200 network, for any image."""

import math

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """Two hidden layers of 200 units with ReLU ("2NN" of McMahan et al., AISTATS 2017).

    199,210 parameters for 10 classes of 1 x 28 x 28 images.

    Parameters
    ----------
    shape : tuple of int
        Channels, height and width of an image.
    classes : int
        Number of classes.
    hidden : int
        Units of each hidden layer.
    """

    def __init__(self, shape: tuple[int, int, int], classes: int, hidden: int = 200) -> None:
        super().__init__()
        self.fc1 = nn.Linear(math.prod(shape), hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, classes) of images (B, C, H, W)."""
        x = torch.relu(self.fc1(images.flatten(1)))
        return self.fc3(torch.relu(self.fc2(x)))
