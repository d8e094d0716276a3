"""CamVid from a folder of its layout, and the split by owners."""

import numpy as np
import pytest
import torch
from PIL import Image
from stores import in_memory

from fedsam.base.errors import UsageError
from fedsam.config.schema import resolve
from fedsam.data.sources.load import load
from fedsam.pack.__main__ import main
from fedsam.simulate.build.data import split

FRAMES = {"train": {"0001TP": 36, "0006R0": 20}, "test": {"0001TP": 3, "Seq05VD": 2}}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Frames whose red is ten times their mask, 12 x 16 pixels."""
    folder = tmp_path_factory.mktemp("root")
    generator = np.random.default_rng(0)
    for part, sequences in FRAMES.items():
        for name in (part, f"{part}annot"):
            (folder / "camvid" / name).mkdir(parents=True)
        for sequence, many in sequences.items():
            for number in range(many):
                mask = generator.integers(0, 12, (12, 16), dtype=np.uint8)
                frame = np.stack([10 * mask, mask, 0 * mask + number], -1)
                file = f"{sequence}_{number:05d}.png"
                Image.fromarray(frame).save(folder / "camvid" / part / file)
                Image.fromarray(mask).save(folder / "camvid" / f"{part}annot" / file)
    return folder


def test_frames_masks_sequences_and_owners(root):
    camvid = load("camvid", root)
    assert camvid.train_images.shape == (56, 3, 12, 16)
    assert camvid.test_labels.shape == (5, 12, 16)
    for images, masks in (
        (camvid.train_images, camvid.train_labels),
        (camvid.test_images, camvid.test_labels),
    ):
        void = masks == 255
        assert torch.equal(images[:, 0] == 110, void)
        assert torch.equal(images[:, 0][~void], 10 * masks[~void])
    assert camvid.train_classes.bincount().tolist() == [36, 20]
    assert camvid.test_classes.bincount().tolist() == [3, 0, 2]
    # frames in a row of one sequence, each as many as the others give or take one
    assert camvid.owners.bincount().tolist() == [18, 18, 20]
    assert torch.equal(camvid.owners, camvid.owners.sort().values)
    pixels = camvid.train_images.double() / 255
    assert camvid.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-6)
    assert camvid.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-6)


def test_camvid_is_the_same_by_its_path_and_packed(root, tmp_path):
    camvid = load("camvid", root)
    words = ["camvid", f"{root}/camvid", str(tmp_path / "out"), "--format", "png", "--side", "12"]
    assert main(words) == 0
    by_path, packed = load(f"camvid:{root}/camvid", root), in_memory(tmp_path / "out")
    for other in (by_path, packed):
        for name, value in vars(camvid).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, getattr(other, name)), name
        assert {n: r.tolist() for n, r in other.test_groups.items()} == {
            "0001TP": [0, 1, 2],
            "Seq05VD": [3, 4],
        }
        assert (other.mean, other.ignore, other.classes) == (camvid.mean, 255, 11)


def test_natural_clients_are_the_owners(root):
    config = resolve(
        {"dataset": "camvid", "data_root": root, "partition": "natural", "clients": 3,
         "clients_per_round": 2}
    )  # fmt: skip
    camvid = load("camvid", root)
    partition = split(config, camvid)
    assert [partition[k].tolist() for k in range(3)] == [
        list(range(18)), list(range(18, 36)), list(range(36, 56))
    ]  # fmt: skip
    wrong = config.model_copy(update={"clients": 4})
    with pytest.raises(UsageError, match=r"^--clients 4: the data have 3 owners; give .* 3$"):
        split(wrong, camvid)
    digits = config.model_copy(update={"dataset": "digits"})
    with pytest.raises(UsageError, match=r"^--partition natural: this data set does not say whose"):
        split(digits, load("digits", root))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("missing", "0001TP_00003 is in one of them only"),
        ("cut", r"1 of 3 pictures cannot be read: .*0001TP_00003\.png"),
        ("size", r"0001TP_00003\.png \(mask and image are of 12 x 16 and 12 x 15 pixels\)"),
        ("empty", "and hold none"),
    ],
)
def test_damaged_frames_are_named(root, tmp_path, damage, said):
    for part in ("train", "trainannot", "test", "testannot"):
        (tmp_path / "camvid" / part).mkdir(parents=True)
        for number in (1, 2, 3):
            file = f"0001TP_0000{number}.png"
            (tmp_path / "camvid" / part / file).write_bytes(
                (root / "camvid" / part.replace("test", "train") / file).read_bytes()
            )
    last = tmp_path / "camvid" / "train" / "0001TP_00003.png"
    if damage == "missing":
        last.unlink()
    elif damage == "cut":
        last.write_bytes(last.read_bytes()[:60])
    elif damage == "size":
        Image.fromarray(np.zeros((12, 15, 3), np.uint8)).save(last)
    else:
        for file in (tmp_path / "camvid").glob("*/*.png"):
            file.unlink()
    with pytest.raises(UsageError, match=f"^--(data-root|dataset camvid): .*{said}") as caught:
        load("camvid", tmp_path)
    assert "\n" not in str(caught.value)
