"""Pictures in folders: what is found, numbered, held out, left out and refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedsam.base.errors import UsageError
from fedsam.config.schema import resolve
from fedsam.data.sources.listing import held_out
from fedsam.data.sources.load import listing, load
from fedsam.simulate.__main__ import main
from fedsam.simulate.build.data import load_dataset, split


def fill(folder, many, red=0, size=(4, 4)):
    """Write pictures of one red; green says which of them it is."""
    folder.mkdir(parents=True)
    pixels = np.zeros((*reversed(size), 3), np.uint8)
    pixels[0, :2] = 9
    for number in range(many):
        pixels[1:] = red, number, 7
        pixels[0, 2:] = 255
        Image.fromarray(pixels).save(folder / f"{number:03}.png")


@pytest.fixture(scope="module")
def animals(tmp_path_factory):
    """Ten cats and twenty dogs, whose red is 10 and 20."""
    root = tmp_path_factory.mktemp("animals")
    fill(root / "dog", 20, red=20)
    fill(root / "cat", 10, red=10)
    return root


@pytest.fixture(scope="module")
def pacs(tmp_path_factory):
    """Domains whose red is 100 and 200, with classes of one and two more."""
    root = tmp_path_factory.mktemp("pacs")
    for domain, red in (("sketch", 200), ("photo", 100)):
        for number, (cls, many) in enumerate({"cat": 15, "dog": 25}.items(), 1):
            fill(root / domain / cls, many, red=red + number)
    return root


def test_a_folder_a_class_a_fifth_of_each_held_out(animals):
    data = load(f"folder:{animals}", None)
    assert data.name == animals.name
    assert data.classes == 2
    assert data.train_images.shape == (24, 3, 4, 4)
    assert data.train_labels.bincount().tolist() == [8, 16]
    assert data.test_labels.bincount().tolist() == [2, 4]
    for images, labels in (
        (data.train_images, data.train_labels),
        (data.test_images, data.test_labels),
    ):
        assert torch.equal(images[:, 0, 1, 0].long(), 10 * (labels + 1))  # cat, then dog
    numbers = torch.cat([data.train_images, data.test_images])[:, :2, 1, 0]
    assert len(numbers.unique(dim=0)) == 30  # each once
    pixels = data.train_images.double() / 255
    assert data.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert data.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-12)
    again = load(f"folder:{animals}", None)
    assert torch.equal(data.test_images, again.test_images)


def test_train_and_test_folders(tmp_path):
    for part, many in (("train", 3), ("val", 2), ("spare", 4)):
        for cls in ("a", "b"):
            fill(tmp_path / part / cls, many)
    data = load(f"folder:{tmp_path}", None)
    assert data.train_labels.bincount().tolist() == [3, 3]
    assert data.test_labels.bincount().tolist() == [2, 2]
    for cls in ("a", "b"):
        fill(tmp_path / "test" / cls, 1)
    assert len(load(f"folder:{tmp_path}", None).test_labels) == 2  # test goes before val


def test_train_alone_holds_a_fifth_out(tmp_path):
    fill(tmp_path / "train" / "a", 5)
    fill(tmp_path / "train" / "b", 11)
    data = load(f"folder:{tmp_path}", None)
    assert data.test_labels.bincount().tolist() == [1, 2]


def test_domains_hold_classes(pacs):
    data = load(f"folder:{pacs}", None)
    assert data.domain_names == ("photo", "sketch")
    for images, labels, domains in (
        (data.train_images, data.train_labels, data.train_domains),
        (data.test_images, data.test_labels, data.test_domains),
    ):
        assert torch.equal(images[:, 0, 1, 0].long(), 100 * (domains + 1) + labels + 1)
    # of each class in each domain a fifth
    assert (2 * data.test_domains + data.test_labels).bincount().tolist() == [3, 5, 3, 5]
    assert data.owners is None


def test_clients_hold_classes_if_told(tmp_path):
    for client, many in (("10", 7), ("9", 3), ("ann", 5)):
        fill(tmp_path / client / "cat", many, red=many)
        fill(tmp_path / client / "dog", 5, red=many)
    options = {"layout": "client/class"}
    data = load(f"folder:{tmp_path}", None, options)
    assert data.train_domains is None
    assert listing("folder", str(tmp_path), options).owners == ("9", "10", "ann")  # by value
    assert torch.equal(data.train_images[:, 0, 1, 0], torch.tensor([3, 7, 5])[data.owners].byte())
    config = resolve({"dataset": f"folder:{tmp_path}", "dataset_options": options,
                      "partition": "natural", "clients": 3, "clients_per_round": 2})  # fmt: skip
    partition = split(config, load_dataset(config))
    assert [len(partition[k]) for k in range(3)] == data.owners.bincount().tolist()


def test_chosen_classes_in_their_order(animals):
    data = load(f"folder:{animals}", None, {"classes": ["dog"]})
    assert (data.classes, len(data.train_labels)) == (1, 16)
    data = load(f"folder:{animals}", None, {"classes": ["dog", "cat"]})
    assert torch.equal(data.train_images[:, 0, 1, 0].long(), 20 - 10 * data.train_labels)


def test_what_is_no_picture_is_counted(tmp_path, caplog):
    fill(tmp_path / "a", 5)
    fill(tmp_path / "b", 5)
    (tmp_path / "labels.csv").write_text("")
    (tmp_path / "a" / "notes.txt").write_text("")
    (tmp_path / "a" / ".hidden.png").write_text("")
    (tmp_path / "b" / "more").mkdir()
    (tmp_path / ".cache").mkdir()
    data = load(f"folder:{tmp_path}", None)
    assert (len(data.train_images), data.classes) == (8, 2)
    (said,) = caplog.messages
    assert said.startswith(f"--dataset folder:{tmp_path}: 5 entries left out: {tmp_path}/.cache, ")
    assert f"{tmp_path}/labels.csv" in said


def test_side_and_channels(tmp_path):
    fill(tmp_path / "a", 5, size=(9, 6))
    fill(tmp_path / "b", 5, size=(6, 9))
    data = load(f"folder:{tmp_path}", None, {"side": 4, "channels": 1})
    assert data.train_images.shape == (8, 1, 4, 4)
    assert len(data.mean) == 1
    with pytest.raises(UsageError, match=r"pictures of 6 x 9 and 9 x 6 pixels.*'\{side: 64\}'$"):
        load(f"folder:{tmp_path}", None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"sied": 64},
            "--dataset-options: folder has no option 'sied' .did you mean 'side'.*takes: layout",
        ),
        ({"side": 0.5}, "--dataset-options: side must be a number of pixels, got 0.5"),
        ({"side": -1}, "--dataset-options: side must be a number of pixels, got -1"),
        ({"side": True}, "--dataset-options: side must be a number of pixels, got True"),
        ({"channels": 4}, "--dataset-options: channels must be 3, or 1 for grey, got 4"),
        ({"crop": "no"}, "--dataset-options: crop must be true or false, got 'no'"),
        ({"layout": "x"}, "--dataset-options: layout must be class, domain/class, client/class, g"),
        ({"classes": ["cta"]}, "--dataset folder:.*: no class 'cta' .did you mean 'cat'."),
        ({"classes": "cat"}, "--dataset-options: classes must be a list, such as .cat., got 'cat'"),
        ({"side": 20000}, "30 pictures of 20000 x 20000 pixels take 33.5 GiB.*fedsam.pack"),
    ],
)
def test_wrong_options_are_one_line(animals, options, said):
    with pytest.raises(UsageError, match=said) as caught:
        load(f"folder:{animals}", None, options)
    assert "\n" not in str(caught.value)


def test_other_data_sets_take_no_options():
    with pytest.raises(
        UsageError, match=r"^--dataset-options: digits has no option 'side'; .* none"
    ):
        load("digits", None, {"side": 3})


def test_wrong_folders_are_one_line(tmp_path):
    def said(folder):
        with pytest.raises(UsageError) as caught:
            load(f"folder:{folder}", None)
        assert "\n" not in str(caught.value)
        return str(caught.value).removeprefix(f"--dataset folder:{folder}: ")

    assert said(tmp_path / "nowhere") == f"{tmp_path}/nowhere: No such file or directory"
    assert said("") == "--dataset folder: needs a path, such as folder:data/mine"
    assert said("$NOWHERE_AT_ALL").endswith(": the environment has no variable NOWHERE_AT_ALL")
    assert said(tmp_path) == "no picture in a folder of its class, such as cat/1.jpg"
    (tmp_path / "a.png").write_bytes(b"")
    assert said(tmp_path) == "no picture in a folder of its class, such as cat/1.jpg"
    fill(tmp_path / "a", 5)
    for cls in "bcdefgh":
        (tmp_path / cls).mkdir()
    empty = "no picture in the folder of class b, c, d, e, f and 2 more"
    assert said(tmp_path) == empty
    for cls in "bcdefgh":
        (tmp_path / cls).rmdir()
    (tmp_path / "a" / "000.png").unlink()
    few = "no picture for testing; a class needs 5 for one to be held out"
    assert said(tmp_path) == few
    fill(tmp_path / "train" / "a", 1)
    fill(tmp_path / "test" / "a", 1)
    fill(tmp_path / "test" / "b", 1)
    assert said(tmp_path) == "no picture for training of class 'b', only for testing"


def test_damaged_pictures_are_named(tmp_path):
    for cls in ("a", "b"):
        fill(tmp_path / cls, 10, size=(40, 40))
    for number in range(6):
        file = tmp_path / "a" / f"{number:03}.png"
        file.write_bytes(file.read_bytes()[:50] if number else b"hello")
    with pytest.raises(UsageError) as caught:
        load(f"folder:{tmp_path}", None)
    said = str(caught.value)
    assert "\n" not in said
    assert "pictures cannot be read: " in said
    assert f"{tmp_path}/a/00" in said


@settings(max_examples=60, deadline=None)
@given(
    cells=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=200),
)
def test_a_fifth_of_each_class_evenly_over_domains(cells):
    targets, domains = np.array(cells, dtype=np.int64).T
    test = held_out(targets, domains)
    for cls in np.unique(targets):
        of_class = targets == cls
        assert (test & of_class).sum() == of_class.sum() // 5
        for domain in np.unique(domains[of_class]):
            cell = of_class & (domains == domain)
            assert abs((test & cell).sum() - cell.sum() / 5) < 1
    assert np.array_equal(test, held_out(targets, None, domains))


def test_a_run_on_a_folder_is_named_by_it_and_goes_on(animals, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--dataset", f"folder:{animals}/", "--dataset-options", "{side: 12, channels: 1}",
             "--model", "mlp", "--clients", "3", "--clients-per-round", "2", "--rounds", "2",
             "--quiet"]  # fmt: skip
    assert main(words) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith(f"{animals.name}-fedavg-alpha")
    config = resolve({}, run / "config.yaml")
    assert config.dataset_options == {"side": 12, "channels": 1}
    assert main(["--resume", str(run), "--rounds", "3", "--quiet"]) == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4
