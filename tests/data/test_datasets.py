"""Data sets: real files, what is checked, what a failed download says."""

import gzip
import os
import socket
from dataclasses import replace
from http.client import BadStatusLine, IncompleteRead
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from fedsam.base.errors import UsageError
from fedsam.data.datasets import check
from fedsam.data.sources.load import load
from fedsam.data.sources.published import DEBIAN

fashion = pytest.mark.skipif(
    not (DEBIAN / "fashion-mnist").is_dir(),
    reason="Debian's dataset-fashion-mnist is not installed",
)


@pytest.fixture
def offline(monkeypatch):
    """No network, also where there is one."""

    def refuse(*_, **__):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def statistics(dataset):
    pixels = dataset.train_images.double() / 255
    return pixels.mean((0, 2, 3)), pixels.std((0, 2, 3), correction=0)


def test_digits_are_whole_stratified_and_normalised():
    digits = load("digits", Path("unused"))
    assert digits.train_images.shape[1:] == (1, 8, 8)
    assert len(digits.train_images) + len(digits.test_images) == 1797
    train, test = digits.train_labels.bincount(), digits.test_labels.bincount()
    assert ((test / (train + test) - 0.2).abs() < 0.01).all()
    mean, std = statistics(digits)
    assert mean.tolist() == pytest.approx(digits.mean, abs=5e-5)
    assert std.tolist() == pytest.approx(digits.std, abs=5e-5)
    assert int(digits.train_images.max()) == 255


def test_digits_are_those_of_scikit_learn():
    """Every fifth of a class, counted from its fourth, is for testing; grey levels 0 to 16."""
    digits, theirs = load("digits", Path("unused")), load_digits()
    grey = torch.from_numpy(theirs.images).mul(255 / 16).round()
    for digit in range(10):
        of_digit = grey[theirs.target == digit]
        test = torch.arange(len(of_digit)) % 5 == 4
        for images, labels, part in (
            (digits.train_images, digits.train_labels, ~test),
            (digits.test_images, digits.test_labels, test),
        ):
            assert torch.equal(images[labels == digit][:, 0].double(), of_digit[part])


@fashion
@pytest.mark.parametrize("root", ["nowhere", str(DEBIAN)])
def test_fashion_mnist_of_debian(root):
    dataset = load("fashion-mnist", Path(root))
    assert dataset.train_images.shape == (60_000, 1, 28, 28)
    assert dataset.test_images.shape == (10_000, 1, 28, 28)
    assert dataset.train_labels.bincount().tolist() == [6000] * 10
    mean, std = statistics(dataset)
    assert mean.tolist() == pytest.approx(dataset.mean, abs=5e-5)
    assert std.tolist() == pytest.approx(dataset.std, abs=5e-5)


@fashion
def test_fashion_mnist_trains(quick):
    outcome = quick(
        dataset="fashion-mnist", clients=100, rounds=20, eval_every=20, alpha=100, lr=0.1
    )
    assert outcome.summary["parameters"] == 199_210
    assert outcome.summary["last_accuracy"] > 0.6


@pytest.mark.skipif("FEDSAM_DATA_ROOT" not in os.environ, reason="FEDSAM_DATA_ROOT is not set")
def test_cifar10_of_torchvision():
    dataset = load("cifar10", Path(os.environ["FEDSAM_DATA_ROOT"]))
    assert dataset.train_images.shape == (50_000, 3, 32, 32)
    assert dataset.train_labels.bincount().tolist() == [5000] * 10
    mean, std = statistics(dataset)
    assert mean.tolist() == pytest.approx(dataset.mean, abs=1e-4)
    assert std.tolist() == pytest.approx(dataset.std, abs=1e-4)


def write_idx(path: Path, array: torch.Tensor) -> None:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(b"\0\0\x08" + bytes([array.ndim]) + sizes + array.numpy().tobytes())


@pytest.fixture
def tiny_mnist(tmp_path):
    """MNIST's four files with 20 + 10 images, in Debian's layout but not compressed."""
    folder = tmp_path / "mnist"
    folder.mkdir()
    for part, n in (("train", 20), ("t10k", 10)):
        images = (torch.arange(n * 28 * 28) % 251).to(torch.uint8).view(n, 28, 28)
        write_idx(folder / f"{part}-images-idx3-ubyte", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte", (torch.arange(n) % 10).to(torch.uint8))
    return tmp_path


def test_idx_files_are_read_plain_and_compressed(tiny_mnist):
    plain = load("mnist", tiny_mnist)
    assert plain.train_images.shape == (20, 1, 28, 28)
    assert plain.train_images.flatten()[:5].tolist() == [0, 1, 2, 3, 4]
    assert plain.test_labels.tolist() == list(range(10))
    for file in list((tiny_mnist / "mnist").iterdir()):
        file.with_name(file.name + ".gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    assert torch.equal(load("mnist", tiny_mnist).train_images, plain.train_images)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content + b"x",
        lambda content: b"",
        lambda content: b"\x01" + content[1:],
        lambda content: content[:3],
        lambda content: content[:6],  # in the middle of a size
        lambda content: b"\0\0\x08\0\5",  # no dimensions, one byte
        lambda content: b"\0\0\x08\xff" + bytes(1020),  # 255 dimensions
        lambda content: content[:4] + b"\xff" * 12,  # sizes whose product is beyond 64 bits
    ],
)
def test_a_damaged_idx_file_is_refused_in_one_line(tiny_mnist, damage):
    file = tiny_mnist / "mnist" / "train-images-idx3-ubyte"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UsageError, match="damaged") as caught:
        load("mnist", tiny_mnist)
    assert "\n" not in str(caught.value)


def test_a_truncated_gz_file_is_refused_in_one_line(tiny_mnist):
    file = tiny_mnist / "mnist" / "train-labels-idx1-ubyte"
    file.with_name(file.name + ".gz").write_bytes(gzip.compress(file.read_bytes())[:-5])
    file.unlink()
    with pytest.raises(UsageError, match="missing or damaged"):
        load("mnist", tiny_mnist)


def test_an_interrupted_download_is_taken_up_again(tiny_mnist, offline):
    # torchvision fetches one file after the other: those that are there are not the data set
    raw = tiny_mnist / "MNIST" / "raw"
    raw.parent.mkdir()
    (tiny_mnist / "mnist").rename(raw)
    assert len(load("mnist", tiny_mnist).test_images) == 10
    (raw / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UsageError, match=r"cannot be downloaded \(.*no network in this test"):
        load("mnist", tiny_mnist)


def torchvisions_cifar10(root: Path) -> Path:
    """Make CIFAR-10 in torchvision's layout, of files whose checksums are wrong."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch", "batches.meta"]:
        (folder / name).write_bytes(b"not what it should be")
    return root


def test_a_damaged_cifar10_is_refused_in_one_line(tmp_path, offline):
    with pytest.raises(UsageError, match="cifar10 is missing there, or damaged") as caught:
        load("cifar10", torchvisions_cifar10(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fault",
    [TimeoutError(), OSError("a\nb"), BadStatusLine("<html>"), IncompleteRead(b"")],
    ids=repr,
)
@pytest.mark.parametrize("name", ["mnist", "cifar10", "svhn"])
def test_whatever_a_bad_network_does_is_told_in_one_line(tmp_path, monkeypatch, name, fault):
    def fail(*_, **__):
        raise fault

    monkeypatch.setattr("urllib.request.urlopen", fail)
    with pytest.raises(UsageError, match="cannot be downloaded") as caught:
        load(name, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100", "svhn"])
def test_a_failed_download_says_what_to_put_where(tmp_path, offline, name):
    with pytest.raises(UsageError, match="--data-root") as caught:
        load(name, tmp_path)
    assert "cannot be downloaded" in str(caught.value)
    assert "put " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_is_told_the_nearest():
    with pytest.raises(UsageError, match=r"--dataset: no 'cifar-10' \(did you mean 'cifar10'\?\)"):
        load("cifar-10", Path("unused"))


def masks(side):
    return torch.zeros(355, side, side, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"train_images": torch.zeros(1437, 1, 8, 8)},
            r"train_images must be a uint8 tensor .*got torch\.float32",
        ),
        (
            {"train_images": torch.zeros(3, 8, 8, dtype=torch.uint8)},
            r"tensor \(N, C, H, W\), got .* \(3, 8, 8\)",
        ),
        ({"train_images": None}, "train_images must be a uint8 tensor .* type NoneType"),
        ({"test_images": np.zeros((355, 1, 8, 8), np.uint8)}, "test_images .* type ndarray"),
        ({"test_labels": torch.zeros(355, 1, dtype=torch.int64)}, r"test_labels .*\(355, 1\)"),
        (
            {"test_labels": torch.zeros(355, dtype=torch.int32)},
            "test_labels must be an int64 tensor",
        ),
        ({"test_labels": torch.zeros(5, dtype=torch.int64)}, "355 images, 5 labels"),
        ({"test_labels": torch.full((355,), 10)}, r"test_labels must lie in 0\.\.9"),
        (
            {"test_images": torch.zeros(355, 3, 8, 8, dtype=torch.uint8)},
            "images of 1 channels for training and 3 for testing",
        ),
        ({"test_labels": masks(8)}, "test_labels are masks: give test_classes, what splits sort"),
        ({"mean": (0.1, 0.2)}, "mean must have 1 entries"),
        ({"mean": 0.1}, "mean must have 1 entries"),
        ({"mean": (float("nan"),)}, "mean must be finite"),
        ({"std": (0.0,)}, "std must be positive"),
        ({"test_labels": masks(9)}, r"test_labels are of \(9, 9\) for images of \(8, 8\)"),
        ({"test_labels": masks(8).float()}, r"or uint8 \(N, H, W\), got torch.float32"),
        ({"test_labels": masks(8) + 10, "ignore": 255}, r"must lie in 0\.\.9, or be 255"),
        ({"test_labels": masks(8) + 255, "ignore": 255}, "test_labels are all 255, which is"),
        ({"ignore": 3, "test_labels": torch.full((355,), 3)}, "test_labels are all 3, which is"),
        ({"test_groups": {"a": torch.tensor([355])}}, "digits: test_groups: 'a' holds rows"),
    ],
)
def test_a_users_data_set_is_checked(change, says):
    with pytest.raises(UsageError, match=says):
        check(replace(load("digits", Path("unused")), **change))


def test_masks_of_the_images_size_and_groups_are_taken():
    held = masks(8)
    held[0] = 255
    groups = {"first": torch.arange(9), "all": torch.arange(355)}
    digits = load("digits", Path("unused"))
    whole = replace(digits, test_labels=held, test_classes=torch.zeros(355, dtype=torch.int64))
    check(replace(whole, ignore=255, test_groups=groups))
    with pytest.raises(UsageError, match=r"test_labels must lie in 0\.\.9"):
        check(replace(digits, test_labels=held, test_groups=groups))


def test_what_is_no_data_set_is_refused():
    with pytest.raises(UsageError, match="must return a fedsam"):
        check(3)


OPTIONS = """
from fedsam.data.sources.load import load
def only(first=3, *, last=7):
    return load("digits", None) if (first, last) == (3, 9) else [first, last]
def rooted(root, *, last):
    return [root, last]
def open_ended(**more):
    return load("digits", more.pop("root", None))
"""


def test_options_are_arguments_of_a_function_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mine_options.py").write_text(OPTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))

    def said(name, **options):
        with pytest.raises(UsageError) as caught:
            load(f"mine_options:{name}", tmp_path, options)
        return str(caught.value)

    assert load("mine_options:only", tmp_path, {"last": 9}).name == "digits"
    assert load("mine_options:open_ended", tmp_path, {"root": None}).name == "digits"
    told = "--dataset-options: mine_options:only has no option 'lats' (did you mean 'last'?); "
    assert said("only", lats=9) == f"{told}it takes: first, last"
    assert said("rooted", last=1).startswith(f"--dataset [{tmp_path!r}, 1]: the function must ret")
    assert "it takes: last" in said("rooted", root=1)  # which is --data-root
    with pytest.raises(TypeError, match="last"):  # the function's own complaint
        load("mine_options:rooted", tmp_path)
