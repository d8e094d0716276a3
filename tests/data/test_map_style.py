"""PyTorch's and torchvision's data sets as ours."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset
from torchvision import datasets, transforms

from fedsam.base.errors import UsageError
from fedsam.data.datasets import check
from fedsam.data.map_style import from_torch
from fedsam.data.sources.load import load

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 6, 9, 3), dtype=np.uint8)
LABELS = [n % 3 for n in range(12)]
CHANNELS_FIRST = torch.from_numpy(PIXELS).movedim(-1, 1)


def as_pictures():
    return [(Image.fromarray(pixels), label) for pixels, label in zip(PIXELS, LABELS, strict=True)]


@pytest.mark.parametrize(
    "train",
    [
        as_pictures(),
        list(zip(PIXELS, LABELS, strict=True)),
        TensorDataset(CHANNELS_FIRST, torch.tensor(LABELS)),
        TensorDataset(CHANNELS_FIRST / 255, torch.tensor(LABELS)),
        TensorDataset((CHANNELS_FIRST / 255).double(), torch.tensor(LABELS).to(torch.uint8)),
        list(zip(PIXELS / 255, np.array(LABELS), strict=True)),
    ],
    ids=["pictures", "arrays", "bytes", "floats", "doubles", "float arrays"],
)
def test_a_pair_keeps_every_byte(train):
    data = from_torch(train, as_pictures()[:3])
    check(data)
    assert torch.equal(data.train_images, CHANNELS_FIRST)
    assert torch.equal(data.test_images, CHANNELS_FIRST[:3])
    assert data.train_labels.tolist() == LABELS
    assert data.classes == 3
    assert data.mean == pytest.approx((PIXELS / 255).mean((0, 1, 2)), abs=1e-12)


def test_grey_comes_with_one_channel_or_three():
    grey = [(torch.from_numpy(pixels[..., 0]), 0) for pixels in PIXELS]
    assert torch.equal(from_torch(grey, grey, channels=1).train_images, CHANNELS_FIRST[:, :1])
    three = from_torch([(image[None], label) for image, label in grey], grey).train_images
    assert torch.equal(three, CHANNELS_FIRST[:, :1].expand(-1, 3, -1, -1))
    wide = Image.fromarray(np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16))
    levels = from_torch([(wide, 0)], [(wide, 0)], channels=1).train_images
    assert torch.equal(levels.flatten(), torch.arange(256).byte())


def test_one_alone_has_a_fifth_of_each_class_held_out():
    data = from_torch(as_pictures() * 5, side=4)
    assert data.test_labels.bincount().tolist() == [4, 4, 4]
    assert data.train_images.shape == (48, 3, 4, 4)


def test_torchvisions_folders_are_ours(tmp_path):
    for name, cls in (("cat", 0), ("dog", 1)):
        (tmp_path / name).mkdir()
        for number, pixels in enumerate(PIXELS[6 * cls : 6 * cls + 6]):
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    folder = datasets.ImageFolder(tmp_path)
    ours, theirs = load(f"folder:{tmp_path}", None, {"side": 4}), from_torch(folder, side=4)
    assert torch.equal(ours.train_images, theirs.train_images)
    assert torch.equal(ours.test_images, theirs.test_images)
    tensors = datasets.ImageFolder(tmp_path, transform=transforms.ToTensor())
    assert torch.equal(from_torch(tensors, side=4).train_images, theirs.train_images)


MINE = """
import numpy as np
def pair(root, many=6):
    items = [(np.full((4, 5), 10 * n, np.uint8), n % 2) for n in range(many)]
    return items, items[:3]
def one():
    return pair(None, 20)[0]
def wrong(): return {0: 1}
"""


def test_a_function_of_ones_own_may_return_them(tmp_path, monkeypatch):
    (tmp_path / "mine_torch.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    data = load("mine_torch:pair", tmp_path, {"channels": 1, "many": 4})
    assert data.train_images.shape == (4, 1, 4, 5)
    assert data.train_images[:, 0, 0, 0].tolist() == [0, 10, 20, 30]
    assert len(load("mine_torch:one", tmp_path, {"side": 3}).test_labels) == 4
    with pytest.raises(UsageError, match=r"no option 'sied' .*; it takes: many, side, channels"):
        load("mine_torch:pair", tmp_path, {"sied": 3})
    with pytest.raises(UsageError, match=r"the function must return a fedsam\.data"):
        load("mine_torch:wrong", tmp_path)
    sys.modules.pop("mine_torch")


NORMALISED = [(torch.randn(3, 4, 4), 0)]
FAULTS = [
    ([(PIXELS[0], 1.5)], r"train item 0: a label must be a whole number from 0, got 1\.5$"),
    ([(PIXELS[0], -1)], r"train item 0: a label must be a whole number from 0, got -1$"),
    ([(PIXELS[0], "cat")], r"a label must be a whole number from 0, got 'cat'$"),
    ([PIXELS[0]], r"train item 0: must be \(image, label\), got ndarray$"),
    (NORMALISED, r"of floats in \[0, 1\]: leave out what normalises it$"),
    ([(torch.zeros(5, 4, 4), 0)], r"must be a picture, .*, got uint8 \(4, 4, 5\)$"),
    ([(torch.zeros(7, dtype=torch.long), 0)], r"must be a picture, .*, got int64 \(7,\)$"),
    ([(PIXELS[0], 0), (PIXELS[0, 1:], 0)], r"pictures of 6 x 9 and 5 x 9 pixels; give one size"),
    ([], r"no picture for training"),
]


@pytest.mark.parametrize(("train", "said"), FAULTS, ids=range(len(FAULTS)))
def test_other_items_are_one_line(train, said):
    with pytest.raises(UsageError, match=f"^--dataset mine: .*{said}") as caught:
        from_torch(train, as_pictures()[:1])
    assert "\n" not in str(caught.value)
