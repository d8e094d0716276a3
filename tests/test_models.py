"""Networks and what their output means."""

import math

import pytest
import torch
from torch import nn

from fedsam.models.cnn import CNN
from fedsam.models.digits_cnn import DigitsCNN
from fedsam.models.mlp import MLP
from fedsam.models.resnet18 import ResNet18
from fedsam.tasks.classification import Classification
from fedsam.vector import Layout


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_published_sizes():
    assert parameters(CNN((3, 32, 32), 10)) == 797_962
    assert parameters(CNN((3, 32, 32), 100)) == 815_332
    assert parameters(MLP((1, 28, 28), 10)) == 199_210
    assert parameters(DigitsCNN((1, 8, 8), 10)) == 18_510
    assert Layout.of(CNN((3, 32, 32), 10)).trainable == 797_962


def test_the_cnn_is_the_papers_layer_by_layer():
    model = CNN((3, 32, 32), 10)
    x = torch.randn(5, 3, 32, 32)
    relu, pool = nn.ReLU(), nn.MaxPool2d(2)
    h = pool(relu(nn.functional.conv2d(x, model.conv1.weight, model.conv1.bias)))
    assert h.shape == (5, 64, 14, 14)
    h = pool(relu(nn.functional.conv2d(h, model.conv2.weight, model.conv2.bias)))
    assert h.shape == (5, 64, 5, 5)
    h = relu(nn.functional.linear(h.reshape(5, 1600), model.fc1.weight, model.fc1.bias))
    h = relu(nn.functional.linear(h, model.fc2.weight, model.fc2.bias))
    expected = nn.functional.linear(h, model.fc3.weight, model.fc3.bias)
    torch.testing.assert_close(model(x), expected)
    strided = model(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(strided, expected, rtol=1e-4, atol=1e-5)


def test_the_cnn_fits_mnist_and_says_what_is_too_small():
    assert CNN((1, 28, 28), 10)(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    with pytest.raises(ValueError, match="16 x 16 pixels or more, got 8 x 8"):
        CNN((1, 8, 8), 10)


def test_classification_counts_and_sums():
    task = Classification()
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 0.0]])
    labels = torch.tensor([0, 1, 1, 0])
    losses = [
        math.log1p(math.exp(-2)),
        math.log1p(math.exp(-1)),
        3 + math.log1p(math.exp(-3)),
        math.log(2),
    ]
    assert task.loss(logits, labels).tolist() == pytest.approx(losses, rel=1e-6)
    whole = task.statistics(logits, labels)
    parts = task.statistics(logits[:1], labels[:1]) + task.statistics(logits[1:], labels[1:])
    torch.testing.assert_close(whole, parts)
    metrics = task.metrics(whole)
    assert metrics["accuracy"] == 0.75  # a tie goes to the first class
    assert metrics["loss"] == pytest.approx(sum(losses) / 4, rel=1e-6)


def test_resnet18_has_its_published_size_and_can_go_without_normalisation():
    assert Layout.of(ResNet18((3, 32, 32), 10, outputs=1000)).trainable == 11_689_512
    plain = ResNet18((3, 32, 32), 10, norm="none")
    kinds = {type(layer) for layer in plain.modules()}
    assert nn.BatchNorm2d not in kinds
    scales_and_shifts = 2 * (5 * 64 + 5 * 128 + 5 * 256 + 5 * 512)
    with_batch_norm = Layout.of(ResNet18((3, 32, 32), 10)).trainable
    assert with_batch_norm - Layout.of(plain).trainable == scales_and_shifts
    assert ResNet18((1, 28, 28), 10)(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    with pytest.raises(ValueError, match="outputs: must be at least the classes, 10, got 3"):
        ResNet18((3, 32, 32), 10, outputs=3)
    with pytest.raises(ValueError, match="norm: must be 'batch' or 'none', got 'group'"):
        ResNet18((3, 32, 32), 10, norm="group")
