"""Pictures that a CSV file lists."""

import numpy as np
import pytest
from PIL import Image

from fedsam.base.errors import UsageError
from fedsam.data.sources.load import listing, load


@pytest.fixture
def pictures(tmp_path):
    """Twelve pictures in a folder, whose red is their number."""
    (tmp_path / "img").mkdir()
    for number in range(12):
        pixels = np.zeros((2, 3, 3), np.uint8)
        pixels[0], pixels[1] = (number, 1, 2), 255
        Image.fromarray(pixels).save(tmp_path / "img" / f"{number}.png")
    return tmp_path


def write(folder, header, *lines):
    (folder / "mine.csv").write_text("\n".join([header, *lines]) + "\n")
    return f"csv:{folder / 'mine.csv'}"


def reds(images):
    return images[:, 0, 0, 0].tolist()


def test_paths_labels_users_domains_and_parts(pictures):
    users = ["10", "9", "ann"]
    lines = [
        f"img/{n}.png, {n % 2}, {users[n % 3]}, {'ab'[n // 6]}, {'train' if n < 8 else 'test'}"
        for n in range(12)
    ]
    name = write(pictures, "\ufeffpath, label, user, domain, split", *lines)
    data = load(name, None)
    assert data.name == "mine"
    assert reds(data.train_images) == list(range(8))
    assert reds(data.test_images) == list(range(8, 12))
    assert data.train_labels.tolist() == [n % 2 for n in range(8)]
    assert data.owners.tolist() == [[1, 0, 2][n % 3] for n in range(8)]  # 9, 10, ann
    assert data.domain_names == ("a", "b")
    assert data.train_domains.tolist() == [n // 6 for n in range(8)]
    assert data.test_domains.tolist() == [1] * 4


def test_other_names_of_columns_and_a_fifth_held_out(pictures):
    lines = [f"who,{'cat' if n < 6 else 'dog'},img/{n}.png" for n in range(12)]
    name = write(pictures, "client_id,species,file", *lines)
    with pytest.raises(UsageError, match=r"no column 'path'; .* '\{image: client_id\}'$"):
        load(name, None)
    named = {"image": "file", "label": "species", "owner": "client_id"}
    data = load(name, None, named)
    assert data.train_labels.bincount().tolist() == [5, 5]
    assert data.owners.tolist() == [0] * 10
    assert sorted(reds(data.train_images) + reds(data.test_images)) == list(range(12))
    only = load(name, None, named | {"classes": ["dog"]})
    assert set(reds(only.train_images) + reds(only.test_images)) == set(range(6, 12))


def test_validation_is_for_testing_where_no_test_is(pictures):
    parts = ["train"] * 6 + ["val"] * 4 + ["test"] * 2
    lines = [f"img/{n}.png,x,{part}" for n, part in enumerate(parts)]
    assert reds(load(write(pictures, "path,label,split", *lines), None).test_images) == [10, 11]
    without = load(write(pictures, "path,label,split", *lines[:10]), None)
    assert reds(without.test_images) == [6, 7, 8, 9]
    assert reds(without.train_images) == list(range(6))


def test_owners_without_a_picture_for_training_are_left_out(pictures):
    lines = [f"img/{n}.png,x,{'c' if n % 2 else 'bda'[n // 4]},{'train' if n < 6 else 'test'}"
             for n in range(12)]  # fmt: skip
    of = listing("csv", write(pictures, "path,label,user,split", *lines).removeprefix("csv:"))
    assert of.owners == ("b", "c", "d")
    assert of.train.owners.tolist() == [0, 1, 0, 1, 2, 1]


FAULTS = {
    "nowhere": (None, r"No such file or directory$"),
    "empty": ("", r"has no line after its header$"),
    "header alone": ("path,label", r"has no line after its header$"),
    "twice in the header": ("path,path,label\na,b,c", r"has the column 'path' twice$"),
    "short line": ("path,label\nimg/0.png,x\nimg/1.png", r"row 3 has 1 fields, its header 2$"),
    "empty label": ("path,label\nimg/0.png,x\nimg/1.png,", r"row 3 has an empty label$"),
    "no column": ("path,lable\nimg/0.png,x", r"no column 'label' \(did you mean 'lable'\?\); n"),
    "twice": (
        "path,label\n" + "img/0.png,x\nimg/0.png,x\nimg/3.png,x\n" * 2,
        r"2 images stand there more than once: img/0\.png, img/3\.png$",
    ),
    "missing": (
        "path,label\n" + "".join(f"img/{n}.png,x\n" for n in range(5, 20)),
        r"8 of 15 images are not there: \S+img/12\.png, .*/16\.png and 3 more$",
    ),
    "part": ("path,label,split\nimg/0.png,x,dev", r"a part must be one of train, .*, got dev$"),
    "bytes": (b"path,label\nimg/0.png,\xff\n", r"mine\.csv: 'utf-8' codec can't decode"),
    "quote": ('path,label\n"img/0.png,x\n', r"mine\.csv: unexpected end of data$"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_file_is_one_line(pictures, fault):
    content, said = FAULTS[fault]
    file = pictures / "mine.csv"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=f"^--dataset csv:{file}: .*{said}") as caught:
        load(f"csv:{file}", None)
    assert "\n" not in str(caught.value)


def test_damaged_pictures_of_it_are_named(pictures):
    (pictures / "img" / "3.png").write_bytes(b"no")
    name = write(pictures, "path,label", *(f"img/{n}.png,x" for n in range(12)))
    with pytest.raises(UsageError, match=r"1 of \d+ pictures cannot be read: \S+img/3\.png \(no "):
        load(name, None)
