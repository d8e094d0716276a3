"""Packing: what lies in a packed folder, and what is said of folders that are not whole."""

import json
import os
import re
import shlex
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import quick_config
from PIL import Image
from stores import listing_of, noise, pixels_of

from fedsam.base.errors import StorageError, UsageError
from fedsam.data.sources.listing import Listing, Part
from fedsam.data.sources.load import load
from fedsam.data.sources.packed_folder import verify
from fedsam.pack.__main__ import main
from fedsam.pack.writer import write
from fedsam.simulate.build.trainer import new_trainer

SIDE = 12
NAMES = ("cat", "dog")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Return a folder of pictures of many sizes in two classes."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(24):
        cls = NAMES[number % 2]
        (folder / cls).mkdir(exist_ok=True)
        height, width = 14 + 3 * (number % 5), 13 + 5 * (number % 4)
        pixels = noise(1, height, width, 3, seed=number)[0]
        Image.fromarray(pixels).save(folder / cls / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def packed(pictures, tmp_path_factory):
    """Return folders with these pictures, by format."""
    out = tmp_path_factory.mktemp("out")
    for form in ("png", "raw", "jpeg"):
        words = ["folder", pictures, out / form, "--side", SIDE, "--format", form]
        assert main([*map(str, words)]) == 0
    return {form: out / form for form in ("png", "raw", "jpeg")}


@pytest.fixture
def copy(packed, tmp_path):
    """Return a packed folder that may be damaged."""
    return shutil.copytree(packed["png"], tmp_path / "copy")


def test_what_is_packed_is_what_the_folder_gives(pictures, packed, capsys):
    whole = load(f"folder:{pictures}", pictures, {"side": SIDE})
    for form in ("png", "raw", "jpeg"):
        dataset = load(str(packed[form]), pictures)
        assert dataset.name == pictures.name
        assert (dataset.mean, dataset.std) == (whole.mean, whole.std)
        assert dataset.classes == 2
        for part in ("train", "test"):
            pixels = pixels_of(getattr(dataset, f"{part}_images")).int()
            far = (pixels - getattr(whole, f"{part}_images")).abs().double().mean()
            assert far == 0 if form != "jpeg" else 0 < far < 6
            of_whole = getattr(whole, f"{part}_labels")
            assert torch.equal(getattr(dataset, f"{part}_labels"), of_whole)
    files = sorted(path.name for path in packed["jpeg"].iterdir())
    columns = [f"{part}.{what}" for part in ("test", "train") for what in COLUMNS]
    assert files == ["meta.json", *columns]
    assert sorted(os.listdir(packed["png"].parent)) == ["jpeg", "png", "raw"]


COLUMNS = ("images.bin", "images.index.npy", "targets.npy")


def test_the_middle_is_kept_at_any_proportions(tmp_path):
    """Against torchvision's Resize and CenterCrop, which are the field's."""
    from torchvision.transforms import functional as F

    sizes = [(30, 41), (41, 30), (12, 50), (9, 7), (12, 12), (100, 13)]
    files = []
    for number, (height, width) in enumerate(sizes):
        files.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(noise(1, height, width, 3, seed=number)[0]).save(files[-1])
    part = Part(files, np.zeros(len(files), np.int64))
    write(tmp_path / "out", Listing("six", part, part, ("a",)), side=12, encoding="png")
    pixels = pixels_of(load(str(tmp_path / "out"), tmp_path).train_images)
    for file, ours in zip(files, pixels, strict=True):
        theirs = F.center_crop(F.resize(Image.open(file), 12), [12, 12])
        assert np.array_equal(ours.permute(1, 2, 0).numpy(), np.asarray(theirs))


def test_masks_keep_their_images_proportions_and_mean_what_a_table_says(tmp_path):
    table = np.full(256, 255, np.uint8)
    table[[7, 8, 11]] = 0, 1, 2
    parts = []
    for name in ("train", "test"):
        images, masks = [], []
        for number in range(4):
            halves = np.full((20, 40), 7, np.uint8)
            halves[:, 20:] = (8, 11, 4, 7)[number]
            picture = np.repeat(halves[..., None] * 20, 3, axis=2)
            images.append(str(tmp_path / f"{name}{number}.png"))
            masks.append(str(tmp_path / f"{name}{number}.mask.png"))
            Image.fromarray(picture).save(images[-1])
            mask = Image.fromarray(halves, mode="P" if number % 2 else "L")
            if number % 2:
                mask.putpalette([255, 0, 0] * 256)  # its colours mean nothing
            mask.save(masks[-1])
        parts.append(Part(images, masks, classes=np.arange(4) % 2))
    whole = Listing("halves", *parts, ("a", "b", "c"), task="segmentation", ignore=255)
    write(tmp_path / "out", replace(whole, mask_values=table), side=10, encoding="raw")
    dataset = load(str(tmp_path / "out"), tmp_path)
    assert dataset.shape == (3, 10, 20)
    masks = dataset.train_labels.read(torch.arange(4))[..., 0]
    assert (masks[:, :, :10] == 0).all()
    assert masks[:, :, 10:].flatten(1).unique(dim=1).flatten().tolist() == [1, 2, 255, 0]
    assert dataset.classes_of_train.tolist() == [0, 1, 0, 1]
    assert dataset.ignore == 255
    with pytest.raises(UsageError, match=r"2 of 4 .*holds 8; must be 0\.\.7, or 255\), .*holds 11"):
        write(tmp_path / "o", replace(whole, classes=tuple("abcdefgh")), side=10, encoding="png")


def test_damaged_pictures_are_named_the_first_five_and_how_many(pictures, tmp_path, capsys):
    damaged = shutil.copytree(pictures, tmp_path / "damaged")
    for number in range(0, 16, 2):
        (damaged / "cat" / f"{number:02d}.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    assert main(["folder", str(damaged), str(out), "--side", "8"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.count(".png (no picture)") == 5
    assert "and " in said
    assert sorted(os.listdir(tmp_path)) == ["damaged"]


def test_an_interrupted_packing_leaves_nothing(tmp_path):
    images = listing_of(load("digits", tmp_path), tmp_path)
    seen = []

    def advance():
        seen.append(sorted(os.listdir(tmp_path)))
        if len(seen) == 300:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", images, side=0, channels=1, advance=advance)
    assert seen[-1] == [".out.part"]
    assert os.listdir(tmp_path) == []
    (tmp_path / ".out.part").mkdir()  # as a kill leaves it
    (tmp_path / ".out.part" / "train.owners.npy").write_bytes(b"old")
    write(tmp_path / "out", images, side=0, channels=1, encoding="raw")
    assert os.listdir(tmp_path) == ["out"]
    assert verify(tmp_path / "out") == 4


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    images = listing_of(load("digits", tmp_path), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"out: cannot be written: .*Not a directory"):
        write(tmp_path / "file" / "out", images, side=0, channels=1)


def test_images_of_several_sizes_need_a_side(pictures, tmp_path, capsys):
    assert main(["folder", str(pictures), str(tmp_path / "out"), "--side", "0"]) == 2
    assert "pixels: give a --side" in capsys.readouterr().err


WRONG = {
    "folder PICTURES": "needs KIND SOURCE OUT",
    "fodler PICTURES OUT": r"KIND: no 'fodler' \(did you mean 'folder'\?\)",
    "folder PICTURES OUT --format jpg": r"--format: no 'jpg' \(did you mean 'jpeg'\?\)",
    "folder PICTURES OUT --side -1": "--side -1: must be a number of pixels, or 0",
    "folder PICTURES OUT --channels 2": "--channels 2: must be 3, or 1 for grey",
    "folder PICTURES PICTURES": "exists already; give a folder that does not",
    "folder no-such OUT": "folder:no-such",
    "folder PICTURES OUT --dataset-options '{depth: 1}'": "--dataset-options: .*depth",
    "folder PICTURES OUT --dataset-options [": "--dataset-options.*must be a mapping",
    "folder PICTURES OUT --seed 3": "--seed: no such flag",
    "folder PICTURES OUT --verify PICTURES": "--verify: stands alone",
    "--verify PICTURES": r"meta\.json: cannot be read",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_word_is_one_line(pictures, tmp_path, capsys, words):
    places = {"PICTURES": pictures, "OUT": tmp_path / "out"}
    said = [str(places.get(word, word)) for word in shlex.split(words)]
    assert main(said) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(WRONG[words], error), error
    assert not (tmp_path / "out").exists()


def change_meta(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | changes))


def cut(path, count):
    path.write_bytes(path.read_bytes()[:-count])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "another version": (
        lambda folder: change_meta(folder, format=2),
        r"meta\.json: is of format 2, this version of fedsam reads 1; pack anew",
    ),
    "no JSON": (lambda f: cut(f / "meta.json", 9), r"meta\.json: cannot be read"),
    "no mapping": (lambda f: (f / "meta.json").write_text("[1]"), r"meta\.json: cannot be read"),
    "a key gone": (
        lambda folder: change_meta(folder, shape=[12, 12]),
        r"meta\.json: shape.*: Field required",
    ),
    "short blob": (
        lambda folder: cut(folder / "train.images.bin", 1),
        r"train\.images\.bin: has \d+ bytes, meta\.json says \d+; pack anew",
    ),
    "no blob": (
        lambda folder: (folder / "test.images.bin").unlink(),
        r"test\.images\.bin: cannot be read: .*No such file",
    ),
    "another column": (
        lambda folder: flip(folder / "train.targets.npy"),
        r"train\.targets\.npy: is damaged: meta\.json says another SHA-256; pack anew",
    ),
    "another index": (
        lambda folder: flip(folder / "train.images.index.npy"),
        r"train\.images\.index\.npy: is damaged",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_is_not_whole_is_refused_by_name(copy, damage):
    act, said = DAMAGES[damage]
    assert verify(copy) == 6
    act(copy)
    for read in (verify, lambda folder: load(str(folder), folder)):
        with pytest.raises(UsageError, match=said):
            read(copy)


def test_a_damaged_blob_is_found_by_verify(copy, capsys):
    assert main(["--verify", str(copy)]) == 0
    assert capsys.readouterr().out == f"{copy}: 6 files are as they were written\n"
    flip(copy / "test.images.bin")
    load(str(copy), copy)  # which does not read it
    assert main(["--verify", str(copy)]) == 2
    assert "test.images.bin: is damaged" in capsys.readouterr().err


def test_owners_travel_with_the_images(tmp_path):
    files = listing_of(load("digits", tmp_path), tmp_path)
    owners = np.arange(len(files.train)) % 7
    own = replace(files, train=replace(files.train, owners=owners), owners=tuple("abcdefg"))
    write(tmp_path / "out", own, side=0, channels=1, encoding="raw")
    config = quick_config(
        tmp_path / "run",
        **{"dataset": str(tmp_path / "out"), "partition": "natural", "clients": 7, "model": "mlp"},
    )
    trainer, _ = new_trainer(config)
    assert torch.equal(trainer.partition[3], torch.from_numpy(np.flatnonzero(owners == 3)))


def test_a_path_is_read_as_a_shell_reads_it(packed, monkeypatch):
    monkeypatch.setenv("PACKS", str(packed["png"].parent))
    assert len(load("$PACKS/raw", packed["png"]).train_images) == 20
    with pytest.raises(UsageError, match=r"--dataset: no .*, a packed folder, or package\.module"):
        load("$PACKS", packed["png"])
    with pytest.raises(UsageError, match=r"--dataset-options: .* has no option 'side'"):
        load("$PACKS/raw", packed["png"], {"side": 3})
