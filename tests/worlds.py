"""Subjects whose loss is known: a formula of w, and tiny networks in float64."""

import torch
from torch import nn

from fedsam.data.images import Images
from fedsam.data.partition import Partition
from fedsam.flatness.subject import Subject
from fedsam.tasks.classification import Classification
from fedsam.training.flat_module import FlatModule


class Point(nn.Module):
    """Its output is w itself, for every image."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, images):
        return self.weight.expand(len(images), -1)


class Formula:
    """A task whose loss is a function of the output's last dimension; its accuracy is 1 / 4."""

    def __init__(self, f):
        self.f = f

    def loss(self, output, targets):
        return self.f(output)

    def statistics(self, output, targets):
        return torch.tensor([len(targets), float(self.f(output).sum())], dtype=torch.float64)

    def metrics(self, total):
        return {"accuracy": 0.25, "loss": float(total[1] / total[0])}


def pictures(count=24, side=4):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 1, side, side), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 3, (count,), generator=generator)
    return Images(pixels, labels, (0.4,), (0.3,), dtype=torch.float64)


def subject(module, state, task=None):
    """Return the subject of a module in float64."""
    halves = Partition(torch.arange(24), torch.tensor([0, 12, 24]))
    of = task or Classification()
    return Subject(FlatModule(module.double()), state, pictures(), pictures(18), of, halves, 7)


def formula(f, *points):
    """Return a subject a point, of the loss L(w) = f(w)."""
    states = [torch.tensor(point, dtype=torch.float64) for point in points]
    return [subject(Point(len(state)), state, Formula(f)) for state in states]


class Net(nn.Module):
    """A convolution with BatchNorm and ReLU, and a linear layer."""

    def __init__(self, norm=True):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2) if norm else nn.Identity()
        self.fc = nn.Linear(8, 3)

    def forward(self, images):
        return self.fc(torch.relu(self.norm(self.conv(images))).flatten(1))


def network(seed=0, norm=True):
    """Return the subject of a Net with random values; its statistics are positive."""
    made = subject(Net(norm), torch.empty(0))
    generator = torch.Generator().manual_seed(seed)
    state = torch.randn(made.network.layout.size, generator=generator, dtype=torch.float64)
    trainable = made.network.layout.trainable
    state[trainable:] = state[trainable:].abs()
    return made.with_state(state)


def by_hand(made, state, on="train", rows=None):
    """Return loss and error of a Net's state by plain PyTorch, all images at once."""
    images = made.train if on == "train" else made.test
    layout, module = made.network.layout, type(made.network.module)
    net = module(norm=layout.size > layout.trainable).double()
    net.load_state_dict(layout.read(state))
    every = torch.arange(len(images)) if rows is None else rows
    batch = images.rows(every)
    with torch.no_grad():
        output = net.eval()(batch.images)
    loss = nn.functional.cross_entropy(output, batch.targets).item()
    return loss, (output.argmax(1) != batch.targets).double().mean().item()
