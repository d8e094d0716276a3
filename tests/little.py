"""A subject of random images and a small smooth network: fast to measure, nothing is learnt."""

import torch
from torch import nn

from fedsam.data.images import Images
from fedsam.data.partition import Partition
from fedsam.flatness.subject import Subject
from fedsam.tasks.classification import Classification
from fedsam.training.flat_module import FlatModule


class Net(nn.Module):
    """Convolution, BatchNorm and a linear layer; any size of image."""

    def __init__(self, channels, classes):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(16, classes)

    def forward(self, images):
        features = torch.tanh(self.norm(self.conv(images)))
        return self.fc(nn.functional.adaptive_avg_pool2d(features, 2).flatten(1))


def subject(*, train=60, test=40, side=8, channels=3, classes=5, clients=7, padding=2, seed=3):
    """Return a subject in float64, its clients of uneven sizes."""
    generator = torch.Generator().manual_seed(seed)

    def images(count):
        shape = (count, channels, side, side)
        pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        labels = torch.arange(count) % classes
        scale = (0.4,) * channels, (0.3,) * channels
        return Images(pixels, labels, *scale, padding=padding, dtype=torch.float64)

    network = FlatModule(Net(channels, classes).double())
    state = torch.rand(network.layout.size, generator=generator, dtype=torch.float64)
    state[: network.layout.trainable].sub_(0.5).mul_(2)
    order = torch.randperm(train, generator=generator)
    cuts = torch.randperm(train - 1, generator=generator)[: clients - 1].sort().values + 1
    offsets = torch.cat([torch.tensor([0]), cuts, torch.tensor([train])])
    parts = images(train), images(test), Classification(), Partition(order, offsets)
    return Subject(network, state, *parts, seed)


def module_of(subject):
    """Return a module of its own with the subject's model, in eval mode."""
    entries = subject.network.layout.read(subject.state)
    module = Net(subject.test.raw.shape[-1], entries["fc.bias"].numel()).double()
    module.load_state_dict({name: tensor.clone() for name, tensor in entries.items()})
    return module.eval()


@torch.no_grad()
def right(module, images, row):
    """Return whether one image is classified rightly, and its loss."""
    batch = images.rows(torch.tensor([row]))
    output = module(batch.images)
    loss = nn.functional.cross_entropy(output, batch.targets)
    return bool(output.argmax() == batch.targets), float(loss)


def naive_accuracy(module, images, rows=None):
    rows = range(len(images)) if rows is None else rows
    found = [right(module, images, int(row))[0] for row in rows]
    return sum(found) / len(found)
