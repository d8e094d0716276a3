"""Landmarks-User-160k's files and folders, made small."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fedsam.base.errors import UsageError
from fedsam.config.schema import resolve
from fedsam.data.sources.load import listing, load
from fedsam.pack.__main__ import main as pack
from fedsam.simulate.build.data import load_dataset, split
from fedsam.simulate.run import run

# (user, image, class); of the image's id the last two characters are its red
TRAIN = [("12", 3), ("9", 0), ("12", 1), ("9", 1), ("100", 3), ("12", 0), ("9", 3)]
TEST = [1, 3]
IDS = [f"{7 * n % 16:x}{n % 16:x}{(n + 5) % 16:x}00000000000{n:02}" for n in range(9)]


def lines(header, rows):
    return "\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n"


def made(root, place, train="federated_train.csv", test="test.csv"):
    """Write the CSV files, and nine images where ``place`` says."""
    for number, name in enumerate(IDS):
        file = root / place(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((16, 24, 3), 255, np.uint8)
        pixels[:8] = number * 20
        Image.fromarray(pixels).save(file, quality=100)
    rows = [(user, name, cls) for (user, cls), name in zip(TRAIN, IDS, strict=False)]
    (root / train).write_text(lines("user_id,image_id,class", rows))
    (root / test).write_text(lines("image_id,class", zip(IDS[7:], TEST, strict=True)))
    return root


def in_tree(name):
    return f"train/{name[0]}/{name[1]}/{name[2]}/{name}.jpg"


def flat(name):
    return f"images/{name}.jpg"


@pytest.fixture
def small(tmp_path):
    return made(tmp_path / "landmarks", flat)


@pytest.mark.parametrize("place", [in_tree, flat, "{}.jpg".format])
@pytest.mark.parametrize(
    "names", [(), ("mini_gld_train_split.csv", "mini_gld_test.csv"), ("federated_train_geo.csv",)]
)
def test_users_images_and_classes(tmp_path, place, names):
    root = made(tmp_path, place, *names)
    data = load(f"landmarks:{root}", None, {"side": 16})
    assert data.classes == 4  # 2 is of no image
    assert data.train_images.shape == (7, 3, 16, 16)
    assert (data.train_images[:, 0, 2, 2] // 20).tolist() == list(range(7))
    assert (data.test_images[:, 0, 2, 2] // 20).tolist() == [7, 8]
    assert data.train_labels.tolist() == [cls for _, cls in TRAIN]
    assert data.test_labels.tolist() == TEST
    assert data.owners.tolist() == [1, 0, 1, 0, 2, 1, 0]  # users 9, 12, 100


def test_users_are_clients_in_the_order_of_their_numbers(small):
    assert listing("landmarks", str(small)).owners == ("9", "12", "100")
    config = resolve({"dataset": f"landmarks:{small}", "partition": "natural", "clients": 3,
                      "dataset_options": {"side": 8}, "clients_per_round": 2})  # fmt: skip
    partition = split(config, load_dataset(config))
    assert [partition[k].tolist() for k in range(3)] == [[1, 3, 6], [0, 2, 5], [4]]


def test_images_and_files_elsewhere(tmp_path):
    made(tmp_path / "images", "{}.jpg".format, "a.csv", "b.csv")
    options = {"images": "images", "train": "images/a.csv", "test": "images/b.csv", "side": 8}
    elsewhere = load(f"landmarks:{tmp_path}", None, options)
    here = load(f"landmarks:{tmp_path / 'images'}", None, {"train": "a.csv", "test": "b.csv"})
    assert torch.equal(elsewhere.train_labels, here.train_labels)
    assert elsewhere.train_images.shape[-1] == 8


def test_a_number_of_classes_may_be_given(small):
    assert load(f"landmarks:{small}", None, {"classes": 2028}).classes == 2028


def change(file, old, new):
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))


FAULTS = {
    "no file": (lambda root: (root / "federated_train.csv").unlink(),
                r"federated_train\.csv: No such file or directory$"),
    "no test": (lambda root: (root / "test.csv").unlink(), r"test\.csv: No such file or dir"),
    "column": (lambda root: change(root / "test.csv", "image_id", "image"),
               r"test\.csv: its header has no column 'image_id' \(did you mean 'image'\?\)$"),
    "twice": (lambda root: change(root / "federated_train.csv", IDS[1], IDS[0]),
              rf"1 images stand there more than once: {IDS[0]}$"),
    "in both": (lambda root: change(root / "test.csv", IDS[7], IDS[0]),
                rf"1 images stand there more than once: {IDS[0]}$"),
    "unknown": (lambda root: change(root / "federated_train.csv", IDS[4], "fedcba9876543210"),
                r"1 of 9 images are not there: \S+images/fedcba9876543210\.jpg$"),
    "images": (lambda root: [file.unlink() for file in (root / "images").iterdir()],
               r"9 of 9 images are not there: .* and 4 more$"),
    "no number": (lambda root: change(root / "federated_train.csv", ",3\n", ",x\n"),
                  r"federated_train\.csv: 1 classes are no numbers of 6 digits .*: 'x' in row 2$"),
    "negative": (lambda root: change(root / "test.csv", ",3\n", ",-3\n"),
                 r"test\.csv: 1 classes are no numbers .*: '-3' in row 3$"),
    "vast": (lambda root: change(root / "test.csv", ",3\n", ",3000000\n"),
             r"test\.csv: 1 classes are no numbers .*: '3000000' in row 3$"),
    "beyond": (lambda root: change(root / "test.csv", ",3\n", ",4\n"),
               r"test\.csv: 1 classes lie beyond 0\.\.3: 4 in row 3$"),
    "new": (lambda root: change(root / "test.csv", ",3\n", ",2\n"),
            r"no picture for training of class '2', only for testing$"),
    "no user": (lambda root: change(root / "federated_train.csv", "\n100,", "\n,"),
                r"federated_train\.csv: row 6 has an empty user_id$"),
    "two files": (lambda root: (root / "federated_train_b.csv").write_text(""),
                  r"has federated_train\.csv, federated_train_b\.csv; choose: .*_train\.csv\}'$"),
    "damaged": (lambda root: (root / flat(IDS[2])).write_bytes(b"no"),
                rf"1 of 7 pictures cannot be read: \S+{IDS[2]}\.jpg \(no picture\)$"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_one_line(small, fault):
    spoil, said = FAULTS[fault]
    spoil(small)
    with pytest.raises(UsageError, match=f"^--dataset landmarks:{small}: .*{said}|{said}") as no:
        load(f"landmarks:{small}", None)
    assert str(no.value).startswith(f"--dataset landmarks:{small}: ")
    assert "\n" not in str(no.value)


def test_classes_beyond_the_range_are_counted(small):
    with pytest.raises(UsageError, match=r"3 classes lie beyond 0\.\.2: 3 in row 2, 3 in row 6, "):
        load(f"landmarks:{small}", None, {"classes": 3})
    for wrong in (-1, 2.5, "many", True):
        with pytest.raises(UsageError, match=r"^--dataset-options: classes must be their number"):
            load(f"landmarks:{small}", None, {"classes": wrong})


def test_the_papers_config_trains_on_what_was_packed(small, tmp_path):
    packed = tmp_path / "packed"
    assert pack(["landmarks", str(small), str(packed), "--side", "32"]) == 0
    few = {"clients": 3, "clients_per_round": 2, "rounds": 1, "device": "cpu"}
    config = resolve({"dataset": packed, "out": tmp_path / "run"} | few, "paper/landmarks")
    assert config.model_options == {"strides": "imagenet", "norm": "group"}
    *_, line = (run(config).folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["loss"] == pytest.approx(np.log(4), abs=0.5)
