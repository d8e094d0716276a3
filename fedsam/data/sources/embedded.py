"""Data sets that need no file of their own: scikit-learn's digits, turned, and in scenes."""

from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedsam.base.randomness import torch_generator
from fedsam.data.augment import rotated
from fedsam.data.datasets import Dataset

ANGLES = (0, 15, 30, 45, 60, 75)  # degrees, counter-clockwise, of rotated-digits' domains


def digits(root: Path) -> Dataset:
    """Scikit-learn's handwritten digits: 1,797 real images of 8 x 8 pixels, bundled with it.

    A fifth of each class is for testing, the same whatever the run's seed.
    """
    images, labels, test = _file()
    parts = images[~test], labels[~test], images[test], labels[test]
    return Dataset("digits", *parts, 10, (0.3052,), (0.3760,))


def _file() -> tuple[Tensor, Tensor, Tensor]:
    """Return the digits (N, 1, 8, 8) as the file has them, their labels, which are for testing."""
    # its file alone: importing scikit-learn takes longer than importing PyTorch
    file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    table = np.loadtxt(str(file), delimiter=",")
    grey = (table[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)).round()
    images = torch.from_numpy(grey.astype(np.uint8))
    labels = torch.from_numpy(table[:, -1].astype(np.int64))
    rank = torch.empty_like(labels)  # of an image within its class, in the order of the file
    for digit in range(10):
        rank[labels == digit] = torch.arange(int((labels == digit).sum()))
    return images, labels, rank % 5 == 4


def rotated_digits(root: Path) -> Dataset:
    """Scikit-learn's digits in six domains: turned by 0, 15, 30, 45, 60 and 75 degrees.

    Image i of the file is in the domain i mod 6 alone, as in DomainBed's RotatedMNIST; bilinear, on
    a canvas of 10 x 10 pixels, as of one of 8 x 8 an eighth of the ink would fall off. A fifth of
    each class is for testing, the same images as of the digits.

    References
    ----------
    Ghifary et al., "Domain Generalization for Object Recognition with Multi-task Autoencoders",
    ICCV 2015 (the angles); Gulrajani and Lopez-Paz, "In Search of Lost Domain Generalization", ICLR
    2021, arXiv 2007.01434 (disjoint domains).
    """
    images, labels, test = _file()
    domains = torch.arange(len(images)) % len(ANGLES)
    canvas = F.pad(images.double(), (1, 1, 1, 1))
    turned = rotated(canvas, torch.tensor(ANGLES)[domains], "bilinear").round().to(torch.uint8)
    parts = turned[~test], labels[~test], turned[test], labels[test]
    return Dataset(
        "rotated-digits",
        *parts,
        10,
        (0.1957,),
        (0.2973,),
        train_domains=domains[~test],
        test_domains=domains[test],
        domain_names=tuple(map(str, ANGLES)),
    )


def digit_scenes(root: Path) -> Dataset:
    """Two of scikit-learn's digits on a canvas of 16 x 16 pixels, and a mask of what lies where.

    2,000 canvases of the digits for training and 500 of those for testing, so that no digit is in
    both; the same whatever the run's seed. A mask says digit + 1 where there is ink (a pixel of 96
    or more), 255, which is nothing, at its rim (32 to 95), and 0 for the background. Splits sort
    canvases by their first digit. In small what M2NIST is.
    """
    whole = digits(root)
    train = _scenes(whole.train_images, whole.train_labels, 2000)
    test = _scenes(whole.test_images, whole.test_labels, 500)
    return Dataset(
        "digit-scenes",
        *train[:2],
        *test[:2],
        11,
        (0.1526,),
        (0.3065,),
        "segmentation",
        train[2],
        test[2],
        ignore=255,
    )


def _scenes(ink: Tensor, labels: Tensor, many: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return canvases (M, 1, 16, 16), their masks, and the labels of their first digits."""
    generator = torch_generator(many, "digit scenes")
    decks = [torch.randperm(len(ink), generator=generator) for _ in range(2 * many // len(ink) + 1)]
    chosen = torch.cat(decks)[: 2 * many].view(2, many)
    # a digit in each half, shifted along the cut, which is upright or level
    shifts = torch.randint(0, 9, (2, many, 1, 1), generator=generator)
    upright = torch.rand(many, 1, 1, generator=generator) < 0.5
    images = torch.zeros(many, 16, 16, dtype=torch.uint8)
    masks = torch.zeros_like(images)
    canvas, pixel = torch.arange(many)[:, None, None], torch.arange(8)
    for half in (0, 1):
        pixels, cls = ink[chosen[half], 0], labels[chosen[half], None, None] + 1
        along, across = shifts[half] + pixel, 8 * half + pixel[:, None]
        rows = torch.where(upright, along.mT, across)
        columns = torch.where(upright, across.mT, along)
        images[canvas, rows, columns] = pixels
        said = torch.where(pixels >= 96, cls, torch.where(pixels >= 32, 255, 0))
        masks[canvas, rows, columns] = said.to(torch.uint8)
    return images[:, None], masks, labels[chosen[0]]
