"""Extreme but legal values end in one line that names the flag, at once."""

import errno
import time

import pytest
import torch

from fedsam.base.errors import UsageError
from fedsam.config.schema import resolve
from fedsam.data.datasets import Dataset, check
from fedsam.data.partition import Partition
from fedsam.simulate.__main__ import main
from fedsam.simulate.build.trainer import new_trainer
from fedsam.sweep.grid import Sweep, cells_of

SMALL = ["--clients=8", "--clients-per-round=3", "--rounds=1", "--quiet", "--threads=1"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("threads", 1_000_000),
        ("local_steps", 10**12),
        ("local_epochs", 1e18),
        ("local_epochs", 1e308),
        ("clients", 10**12),
        ("out", "x" * 300),
        ("out", "a\0b"),
        ("out", "\ud800"),
        ("data_root", "/x" * 3000),
        ("partition", "x" * 300),
        ("dataset", ":x"),
        ("dataset", "os:__name__"),
        ("dataset", "..x:y"),
    ],
)
def test_it_is_refused_by_name(key, value):
    began = time.process_time()
    with pytest.raises(UsageError, match="^--" + key.replace("_", "-")) as refused:
        new_trainer(resolve({key: value}))
    assert time.process_time() - began < 5
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ({"seed": [0, 0]}, "the cell seed=0 twice"),
        ({"lr": [0.1, "0.1"]}, "the cell lr=0.1 twice"),
        ({"data_root": ["a/b", "a-b"]}, "twice"),
        ({"seed": [0] * 1000, "lr": [0.1] * 1000}, "the grid has 1000000 cells"),
        ({"dataset": ["x" * 300]}, "no folder can be named"),
        ({"dataset": ["a\nb"]}, "no folder can be named"),
    ],
)
def test_a_grid_of_cells_that_cannot_be_is_one_line(tmp_path, grid, said):
    with pytest.raises(UsageError, match=said):
        cells_of(Sweep(grid=grid), tmp_path, {})


def test_images_without_pixels_are_refused():
    images, labels = torch.zeros(4, 1, 0, 0, dtype=torch.uint8), torch.arange(4)
    with pytest.raises(UsageError, match="train_images have no pixels"):
        check(Dataset("x", images, labels, images, labels, 4, (0.5,), (0.5,)))


def test_a_disk_that_is_full_before_round_1_is_one_line(tmp_path, monkeypatch, capsys):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Partition, "save", full)
    assert main([*SMALL, "--out", str(tmp_path / "full")]) == 1
    said = capsys.readouterr().err
    assert said.splitlines() == [
        f"fedsam: training stopped: {tmp_path}/full: No space left on device"
    ]
    assert list(tmp_path.iterdir()) == []


def test_markup_in_out_is_a_name(tmp_path, capsys):
    assert main([*SMALL[:3], "--threads=1", "--out", str(tmp_path / "a[/b]")]) == 0
    assert "a[/b]" in capsys.readouterr().out.replace("\n", "")
    assert (tmp_path / "a[/b]" / "summary.json").exists()
