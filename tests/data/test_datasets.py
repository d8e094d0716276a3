"""Data sets: real files, what is checked, what a failed download says."""

import gzip
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedsam.data.datasets import DEBIAN, check, load
from fedsam.errors import UsageError

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


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"train_images": torch.zeros(1437, 1, 8, 8)}, "train_images must be uint8"),
        ({"train_images": torch.zeros(3, 8, 8, dtype=torch.uint8)}, r"must be \(N, C, H, W\)"),
        ({"test_labels": torch.zeros(355, dtype=torch.int32)}, "test_labels must be int64"),
        ({"test_labels": torch.zeros(5, dtype=torch.int64)}, "355 images, 5 labels"),
        ({"test_labels": torch.full((355,), 10)}, r"test_labels must lie in 0\.\.9"),
        ({"test_images": torch.zeros(355, 1, 9, 9, dtype=torch.uint8)}, "images of"),
        ({"mean": (0.1, 0.2)}, "mean must have 1 entries"),
        ({"std": (0.0,)}, "std must be positive"),
    ],
)
def test_a_users_data_set_is_checked(change, says):
    with pytest.raises(UsageError, match=says):
        check(replace(load("digits", Path("unused")), **change))


def test_what_is_no_data_set_is_refused():
    with pytest.raises(UsageError, match="must return a fedsam"):
        check(3)
