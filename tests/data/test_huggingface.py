"""Hugging Face data sets on the disk, made with its package."""

import sys
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from fedsam.base.errors import UsageError
from fedsam.config.schema import resolve
from fedsam.data.sources.load import listing, load
from fedsam.simulate.build.data import load_dataset, split

hf = pytest.importorskip("datasets", reason="needs the extra flwr-datasets")
hf.disable_progress_bars()
WRITERS = ["10", "9", "ann"]


def picture(number):
    pixels = np.full((3, 4, 3), 255, np.uint8)
    pixels[0] = number, 1, 2
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def made(rows, begin=0, contents=None, **columns):
    """A data set of pictures whose red counts from ``begin``, of classes no and yes in turn."""
    numbers = range(begin, begin + rows)
    contents = contents or {}
    values = {
        "img": [{"bytes": contents.get(n, picture(n)), "path": None} for n in numbers],
        "sort": [n % 2 for n in numbers],
        "writer": [WRITERS[n % 3] for n in numbers],
        "number": list(numbers),
    }
    features = {
        "img": hf.Image(),
        "sort": hf.ClassLabel(names=["yes", "no", "never"]),
        "writer": hf.Value("string"),
        "number": hf.Value("int32"),
    }
    for name, (column, feature) in columns.items():
        values[name], features[name] = column, feature
    return hf.Dataset.from_dict(values, features=hf.Features(features))


def reds(images):
    return images[:, 0, 0, 0].tolist()


@pytest.fixture
def both(tmp_path):
    hf.DatasetDict(test=made(4, begin=8), train=made(8)).save_to_disk(tmp_path / "both")
    return tmp_path / "both"


def test_pictures_labels_and_splits_are_found_by_their_features(both):
    data = load(f"hf:{both}", None)
    assert (data.name, data.classes) == ("both", 3)  # "never" is a class without pictures
    assert reds(data.train_images) == list(range(8))
    assert reds(data.test_images) == [8, 9, 10, 11]
    assert data.train_labels.tolist() == [0, 1] * 4  # by ClassLabel's numbers, not by name
    assert data.owners is None


def test_the_owners_are_natural_clients(both):
    options = {"owner": "writer"}
    assert listing("hf", str(both), options).owners == ("9", "10", "ann")
    config = resolve({"dataset": f"hf:{both}", "dataset_options": options, "clients": 3,
                      "partition": "natural", "clients_per_round": 2})  # fmt: skip
    partition = split(config, load_dataset(config))
    assert [partition[k].tolist() for k in range(3)] == [[1, 4, 7], [0, 3, 6], [2, 5]]


def test_other_columns_and_splits(both):
    options = {"label": "number", "train": "test", "test": "train", "domain": "writer"}
    with pytest.raises(UsageError, match=r"no picture for training of class '0', '1', '2', '3', "):
        load(f"hf:{both}", None, options)
    options["label"] = "writer"
    data = load(f"hf:{both}", None, options)
    assert reds(data.train_images) == [8, 9, 10, 11]
    assert data.train_labels.tolist() == [2, 1, 0, 2]
    assert data.train_domains.tolist() == [2, 1, 0, 2]


def test_one_data_set_has_a_fifth_held_out(tmp_path):
    made(20).save_to_disk(tmp_path / "one")
    data = load(f"hf:{tmp_path / 'one'}", None)
    assert data.test_labels.bincount().tolist() == [2, 2]
    assert sorted(reds(data.train_images) + reds(data.test_images)) == list(range(20))


def test_rows_that_were_chosen_and_shuffled_keep_what_belongs_to_them(tmp_path):
    made(30).shuffle(seed=3).select(range(20)).save_to_disk(tmp_path / "some")
    data = load(f"hf:{tmp_path / 'some'}", None, {"owner": "writer"})
    numbers = reds(data.train_images)
    assert data.train_labels.tolist() == [n % 2 for n in numbers]
    assert data.owners.tolist() == [[1, 0, 2][n % 3] for n in numbers]


def test_pictures_that_lie_in_files(tmp_path):
    (tmp_path / "7.png").write_bytes(picture(7))
    files = [{"bytes": None, "path": str(tmp_path / "7.png")}] * 10
    made(10).remove_columns("img").add_column(
        "img", files, feature=hf.Features({"img": hf.Image()})["img"]
    ).save_to_disk(tmp_path / "files")
    assert reds(load(f"hf:{tmp_path / 'files'}", None).train_images) == [7] * 8


def test_rows_that_cannot_be_decoded_are_named(tmp_path):
    contents = {3: b"hello", 5: picture(5)[:60], 7: b""}
    hf.DatasetDict(train=made(8, contents=contents), test=made(2)).save_to_disk(tmp_path / "x")
    with pytest.raises(UsageError) as caught:
        load(f"hf:{tmp_path / 'x'}", None)
    said = str(caught.value)
    assert said.startswith(
        f"--dataset hf:{tmp_path}/x: 3 of 8 pictures cannot be read: train row 3"
    )
    assert "train row 5 (" in said
    assert "train row 7 (no picture)" in said


FAULTS = [
    ({"image": "pixels"}, r": has no column 'pixels', but img, sort, writer, number$"),
    ({"owner": "writers"}, r": has no column 'writers' \(did you mean 'writer'\?\), but img"),
    (
        {"train": "trian"},
        r": has no split 'trian' .*, but test, train; choose: .*'\{train: test\}'$",
    ),
    ({"owner": "img"}, r": its column 'img' must hold whole numbers or texts: Image"),
    ({"writer": 3}, r"^--dataset-options: hf has no option 'writer'"),
]


@pytest.mark.parametrize(("options", "said"), FAULTS, ids=[str(o) for o, _ in FAULTS])
def test_wrong_options_are_one_line(both, options, said):
    with pytest.raises(UsageError, match=said) as caught:
        load(f"hf:{both}", None, options)
    assert "\n" not in str(caught.value)


def test_ambiguous_and_missing_columns_are_one_line(tmp_path):
    labels = [0] * 10, hf.ClassLabel(names=["x"])
    made(10, coarse=labels).save_to_disk(tmp_path / "two")
    two = r"has the ClassLabel columns sort, coarse; choose: --dataset-options '\{label: sort\}'$"
    with pytest.raises(UsageError, match=two):
        load(f"hf:{tmp_path / 'two'}", None)
    made(10).remove_columns("sort").save_to_disk(tmp_path / "none")
    none = r"has no ClassLabel column, but img, writer, number; choose: .*'\{label: img\}'$"
    with pytest.raises(UsageError, match=none):
        load(f"hf:{tmp_path / 'none'}", None)
    hidden = [-1] * 7 + [0] * 3, hf.ClassLabel(names=["x"])
    made(10, coarse=hidden).save_to_disk(tmp_path / "hidden")
    rows = r"7 rows have no coarse: train row 0, .*, train row 4 and 2 more$"
    with pytest.raises(UsageError, match=rows):
        load(f"hf:{tmp_path / 'hidden'}", None, {"label": "coarse"})


def test_other_folders_and_damage_are_one_line(tmp_path, both):
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UsageError, match=r"is no data set that save_to_disk wrote: \w+") as no:
            load(f"hf:{folder}", None)
        assert "\n" not in str(no.value)
    (arrow,) = (both / "train").glob("*.arrow")
    for file in (arrow, both / "train" / "state.json", both / "dataset_dict.json"):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(UsageError, match=r"is no data set that save_to_disk wrote: \w+"):
            load(f"hf:{both}", None)
        file.write_bytes(content)


def test_the_missing_package_is_named_with_its_extra(both, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"needs the package datasets; pip .*flwr-datasets\]'$"):
        load(f"hf:{both}", None)
