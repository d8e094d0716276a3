"""Data sets of the benchmarks, by import path: of known shape, with few images to test on.

Training is what is timed, so 100 images for testing are enough for engines that evaluate.
"""

from dataclasses import replace
from pathlib import Path

import torch

from fedsam.data.datasets import Dataset
from fedsam.data.sources.load import load

TESTS = 100
STATISTICS = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # CIFAR-10's


def cifar10(root: Path) -> Dataset:
    """Return CIFAR-10 where it lies under ``root``, else random images in its shape."""
    if (root / "cifar-10-batches-py").is_dir():
        return _few_tests(load("cifar10", root))
    return _random(50_000)


def one_client() -> Dataset:
    """Return 500 random images in CIFAR-10's shape."""
    return _random(500)


def a_few() -> Dataset:
    """Return 40 random images in CIFAR-10's shape."""
    return _random(40)


def thousand() -> Dataset:
    """Return 1,000 random images in CIFAR-10's shape."""
    return _random(1000)


def fashion_mnist(root: Path) -> Dataset:
    """Return Fashion-MNIST."""
    return _few_tests(load("fashion-mnist", root))


def hundred() -> Dataset:
    """Return an image for each of 100 clients."""
    return _one_each(100)


def ten_thousand() -> Dataset:
    """Return an image for each of 10,000 clients."""
    return _one_each(10_000)


def million() -> Dataset:
    """Return an image for each of 1,000,000 clients."""
    return _one_each(1_000_000)


def imagenet() -> Dataset:
    """Return 16 random images of 224 x 224."""
    return _random(16, 224, tests=2)


def _random(images: int, side: int = 32, tests: int = TESTS) -> Dataset:
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (images + tests, 3, side, side), dtype=torch.uint8, generator=g)
    y = torch.arange(images + tests) % 10
    return Dataset("random", x[:images], y[:images], x[images:], y[images:], 10, *STATISTICS)


def _one_each(clients: int) -> Dataset:
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (clients, 1, 8, 8), dtype=torch.uint8, generator=g)
    y = torch.arange(clients) % 10
    return Dataset("random", x, y, x[:TESTS].clone(), y[:TESTS].clone(), 10, (0.5,), (0.29,))


def _few_tests(full: Dataset) -> Dataset:
    images, labels = full.test_images[:TESTS].clone(), full.test_labels[:TESTS].clone()
    return replace(full, test_images=images, test_labels=labels)
