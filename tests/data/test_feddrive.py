"""FedDrive's splits, from folders of its layout: whose frames, which classes, which groups."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fedsam.base.errors import UsageError
from fedsam.config.schema import resolve
from fedsam.data.sources import feddrive
from fedsam.data.sources.load import listing, load
from fedsam.pack.writer import write
from fedsam.simulate.build.data import split
from fedsam.simulate.run import run

CITIES = {
    "train": {"erfurt0": 4, "erfurt1": 2, "zurich0": 3, "aachen10": 2},
    "test": {"test_user": 3},
}
DOMAINS = {
    "train": {"T01_CN_A": 3, "T02_CS_B": 2},
    "test": {"test_user_same_domain": 2, "test_user_diff_domain": 3},
}
FRAMES = (16, 32)


def picture(path, generator, most):
    """Write a mask of bytes below ``most``, and return a frame whose red is the mask."""
    mask = generator.integers(0, most, FRAMES, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)
    return np.stack([mask, generator.integers(0, 256, FRAMES, dtype=np.uint8), 255 - mask], -1)


def leaf(users):
    counts = [len(data["x"]) for data in users.values()]
    return json.dumps({"users": list(users), "num_samples": counts, "user_data": users})


@pytest.fixture(scope="module")
def cities(tmp_path_factory):
    """Cityscapes in small: names, folders and labelIds as there."""
    root, generator = tmp_path_factory.mktemp("cityscapes"), np.random.default_rng(0)
    for part, users in CITIES.items():
        made = {}
        for user, many in users.items():
            city = user.rstrip("0123456789") if part == "train" else "lindau"
            of = f"{'train' if part == 'train' else 'val'}/{city}"
            names = [f"{of}/{user}_{number:06}_000019" for number in range(many)]
            for name in names:
                frame = picture(root / "gtFine" / f"{name}_gtFine_labelIds.png", generator, 34)
                file = root / "leftImg8bit" / f"{name}_leftImg8bit.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(frame).save(file)
            made[user] = {
                "x": [f"{name}_leftImg8bit.png" for name in names],
                "y": [f"{name}_gtFine_labelIds.png" for name in names],
            }
        folder = root / "heterogeneous" / part
        folder.mkdir(parents=True)
        for number, user in enumerate(made):  # several files, as FedDrive has
            (folder / f"all_data_{number}.json").write_text(leaf({user: made[user]}))
    return root


@pytest.fixture(scope="module")
def domains(tmp_path_factory):
    """IDDA in small."""
    root, generator = tmp_path_factory.mktemp("idda"), np.random.default_rng(1)
    for part, users in DOMAINS.items():
        made = {}
        for user, many in users.items():
            domain = {"test_user_same_domain": "T01_CN_A", "test_user_diff_domain": "T07_CN_A"}
            of = domain.get(user, user)
            names = [f"{part[0]}{number}_{of}" for number in range(many)]
            for name in names:
                mask = root / "IDDAsmall" / of / "Semantic" / f"{name}.png"
                frame = picture(mask, generator, 25)
                file = root / "IDDAsmall" / of / "RGB" / f"{name}.jpg"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(frame).save(file, quality=95)
            made[user] = {
                "x": [f"{of}/RGB/{name}.jpg" for name in names],
                "y": [f"{of}/Semantic/{name}.png" for name in names],
            }
        folder = root / "uniform" / "rainy" / part
        folder.mkdir(parents=True)
        (folder / f"idda_{part}_clients.json").write_text(leaf(made))
    return root


def test_a_user_is_a_client_and_a_label_id_a_class_of_nineteen(cities):
    made = load(f"cityscapes:{cities}", cities)
    assert made.train_images.shape == (11, 3, *FRAMES)
    assert made.test_labels.shape == (3, *FRAMES)
    assert made.classes == 19
    table = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10}
    table |= {24: 11, 25: 12, 26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
    for images, masks in (
        (made.train_images, made.train_labels),
        (made.test_images, made.test_labels),
    ):
        expected = [table.get(value, 255) for value in images[:, 0].flatten().tolist()]
        assert masks.flatten().tolist() == expected
    # in the order of the names: aachen10, erfurt0, erfurt1, zurich0
    assert made.owners.bincount().tolist() == [2, 4, 2, 3]
    assert made.train_classes.bincount().tolist() == [2, 6, 0, 3]  # aachen, erfurt, lindau, zurich
    assert made.test_classes.tolist() == [2, 2, 2]
    assert made.test_groups is None
    config = resolve(
        {"dataset": f"cityscapes:{cities}", "partition": "natural", "clients": 4,
         "clients_per_round": 2}
    )  # fmt: skip
    partition = split(config, made)
    assert [len(partition[client]) for client in range(4)] == [2, 4, 2, 3]


def test_idda_has_sixteen_classes_and_seen_and_unseen_domains(domains, monkeypatch):
    monkeypatch.setattr(feddrive, "IDDA_SIZE", (8, 20))
    options = {"split": "uniform", "setting": "rainy"}
    made = load(f"idda:{domains}", domains, options)
    assert made.train_images.shape == (5, 3, 8, 20)  # pressed, whatever becomes of proportions
    assert made.classes == 16
    first = domains / "IDDAsmall" / "T01_CN_A" / "Semantic" / "t0_T01_CN_A.png"
    pressed = np.array(Image.open(first).resize((20, 8), Image.Resampling.NEAREST))
    remap = [255, 2, 4, 255, 11, 5, 0, 0, 1, 8, 13, 3, 7, 6, 255, 255, 15, 14, 12, 9, 10]
    expected = [remap[v] if v < len(remap) else 255 for v in pressed.flatten().tolist()]
    assert made.train_labels[0].flatten().tolist() == expected
    assert made.owners.tolist() == [0, 0, 0, 1, 1]
    # users in the order of their names: test_user_diff_domain comes first
    groups = {name: rows.tolist() for name, rows in made.test_groups.items()}
    assert groups == {"unseen": [0, 1, 2], "seen": [3, 4]}
    assert made.test_classes[3] == made.train_classes[0]
    assert made.test_classes[0] not in made.train_classes


def test_packed_it_is_the_same_data_set(domains, tmp_path, monkeypatch):
    monkeypatch.setattr(feddrive, "IDDA_SIZE", (8, 20))
    options = {"split": "uniform", "setting": "rainy"}
    write(tmp_path / "out", listing("idda", str(domains), options), side=0, encoding="png")
    packed, made = load(str(tmp_path / "out"), tmp_path), load(f"idda:{domains}", domains, options)
    for part in ("train", "test"):
        rows = torch.arange(len(getattr(made, f"{part}_images")))
        pixels, masks = (
            getattr(packed, f"{part}_{kind}").read(rows) for kind in ("images", "labels")
        )
        assert torch.equal(pixels.permute(0, 3, 1, 2), getattr(made, f"{part}_images"))
        assert torch.equal(masks[..., 0], getattr(made, f"{part}_labels"))
        assert torch.equal(getattr(packed, f"{part}_classes"), getattr(made, f"{part}_classes"))
    assert torch.equal(packed.owners, made.owners)
    assert list(packed.test_groups) == list(made.test_groups) == ["unseen", "seen"]
    assert all(torch.equal(packed.test_groups[n], made.test_groups[n]) for n in made.test_groups)
    assert packed.mean == pytest.approx(made.mean)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.pop("user_data"), "must hold users, num_samples and user_data"),
        (lambda d: d["users"].append("x"), "user 'x' is not in both users and user_data"),
        (lambda d: d["user_data"]["u"].pop("y"), "user 'u' must have lists x and y of names"),
        (lambda d: d["user_data"]["u"]["x"].append("b.png"), "user 'u' has 2 in x and 1 in y"),
        (lambda d: d["user_data"]["u"]["x"].__setitem__(0, 3), "lists x and y of names"),
        (lambda d: d["num_samples"].__setitem__(0, 7), "user 'u' has 1 in x and num_samples 7"),
        (lambda d: d.update(users=[3]), "user '3' is not in both users and user_data"),
        (
            lambda d: d.update(user_data={"u": {"x": [], "y": []}}, num_samples=[0]),
            "user 'u' has 0 in x and num_samples 0",
        ),
    ],
)
def test_a_file_of_another_form_is_one_line(tmp_path, change, said):
    file = tmp_path / "all.json"
    data = {"users": ["u"], "num_samples": [1], "user_data": {"u": {"x": ["a"], "y": ["m"]}}}
    file.write_text(json.dumps(data))
    assert feddrive.users_of(file, "w") == feddrive.users_of(tmp_path, "w") == data["user_data"]
    change(data)
    file.write_text(json.dumps(data))
    with pytest.raises(UsageError, match=said) as caught:
        feddrive.users_of(file, "w")
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_user_in_two_files_no_file_and_no_json_are_one_line(tmp_path):
    with pytest.raises(UsageError, match=r"no \.json file with users"):
        feddrive.users_of(tmp_path, "w")
    text = leaf({"u": {"x": ["a"], "y": ["m"]}})
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=r"b\.json: user 'u' is in another file, too"):
        feddrive.users_of(tmp_path, "w")
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(UsageError, match=r"b\.json: Expecting property name"):
        feddrive.users_of(tmp_path, "w")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"split": "uniform"}, "uniform/train: No such file or directory"),
        ({"split": "uniforn"}, "split must be one of heterogeneous, uniform, class_imbalance"),
        ({"setting": "rainy"}, "cityscapes has no option 'setting'"),
        ({"side": 8}, "side: pictures with masks keep their size here; pack them"),
    ],
)
def test_wrong_options_are_one_line(cities, options, said):
    with pytest.raises(UsageError, match=said) as caught:
        load(f"cityscapes:{cities}", cities, options)
    assert "\n" not in str(caught.value)


def test_a_mask_of_another_size_or_of_colours_and_missing_frames_are_named(cities):
    name = "gtFine/train/zurich/zurich0_000001_000019_gtFine_labelIds.png"
    mask = cities / name
    before = mask.read_bytes()
    try:
        Image.fromarray(np.zeros((16, 31), np.uint8)).save(mask)
        with pytest.raises(UsageError, match=f"{name} .mask and image are of 16 x 31 and 16 x 32"):
            load(f"cityscapes:{cities}", cities)
        Image.fromarray(np.zeros((16, 32, 3), np.uint8)).save(mask)
        with pytest.raises(UsageError, match=f"{name} .must be grey of 8 bits, or have a palette"):
            load(f"cityscapes:{cities}", cities)
        mask.unlink()
        with pytest.raises(UsageError, match=f"1 of 22 images are not there: .*{name}"):
            load(f"cityscapes:{cities}", cities)
    finally:
        mask.write_bytes(before)


SMALL = {
    "rounds": 1,
    "clients_per_round": 2,
    "batch_size": 4,
    "local_steps": 1,
    "precision": "fp32",
}


def test_the_files_of_the_papers_settings_train_on_folders_of_that_layout(
    cities, domains, tmp_path, monkeypatch
):
    monkeypatch.setattr(feddrive, "IDDA_SIZE", (64, 116))
    runs = {
        "cityscapes": {
            "dataset": f"cityscapes:{cities}",
            "clients": 4,
            "augment": "double+scale(0.5,1.5,32,64)+jitter(0.4)",
        },
        "idda-rainy": {
            "dataset": f"idda:{domains}",
            "dataset_options": {"split": "uniform", "setting": "rainy"},
            "clients": 2,
            "augment": "flip+resized_crop(0.5,2,32,58)",
            "model_options": {"heads": 0},
            "bn": "local",
            "update_bn": 4,
        },
    }
    for name, given in runs.items():
        config = resolve(SMALL | given | {"out": tmp_path / name}, f"paper/{name}")
        summary = run(config).summary
        assert 0 <= summary["last_miou"] <= 1
    assert set(summary["groups"]) == {"seen", "unseen"}


def test_the_files_of_the_papers_settings_hold_what_feddrives_say():
    every = {
        "model": "bisenet-v2", "task_options": {"hard": 0.25, "aux": 1.0}, "normalize": "half",
        "clients_per_round": 5, "rounds": 1600, "local_epochs": 2, "batch_size": 16,
        "drop_last": True, "momentum": 0.9, "partition": "natural", "bn": "values", "seed": 42,
    }  # fmt: skip
    own = {
        "cityscapes": (144, 0.05, 5e-4, "double+scale(0.5,1.5,512,1024)+jitter(0.4)", {}),
        "idda-country": (90, 0.1, 0, "flip+resized_crop(0.5,2,512,928)", {"test_scale": 0.5}),
        "idda-rainy": (69, 0.1, 0, "flip+resized_crop(0.5,2,512,928)", {"test_scale": 0.5}),
    }
    for name, (clients, lr, decay, augment, options) in own.items():
        config = resolve({}, f"paper/{name}")
        assert {key: getattr(config, key) for key in every} == every
        assert (config.clients, config.lr, config.weight_decay) == (clients, lr, decay)
        said, meant = (set(text.split("+")) for text in (config.augment, augment))
        assert said == meant
        assert config.model_options == options
    assert resolve({}, "paper/idda-rainy").dataset_options["setting"] == "rainy"
    assert feddrive.IDDA_SIZE == (1024, 1856)
