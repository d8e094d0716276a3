"""Images that lie in files: what is read is what lay there, however it is asked for."""

import threading
import time
from base64 import b64decode
from dataclasses import replace
from hashlib import sha256
from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from stores import noise

from fedsam.base.errors import UsageError
from fedsam.base.randomness import torch_generator
from fedsam.data.augment import Crop, Cutout, Flip
from fedsam.data.datasets import Dataset, check
from fedsam.data.images import Images, StoredImages
from fedsam.data.packed import Packing
from fedsam.data.plan import Work, make_plan
from fedsam.data.store import Ahead, EncodedStore, RawStore, joined, rows_of
from fedsam.pack.writer import encoded

MANY, HEIGHT, WIDTH = 40, 10, 14  # more than two pieces of a thread
KINDS = [(form, channels) for form in ("raw", "png", "jpeg") for channels in (1, 3)]
kinds = pytest.mark.parametrize(("form", "channels"), KINDS)


def stored(folder, pixels, form):
    """Return a store of pixels (N, H, W, C) in a folder."""
    if form == "raw":
        np.save(folder / "images.npy", pixels)
        return RawStore(folder / "images.npy")
    files = [encoded(image, form) for image in pixels]
    offsets = np.cumsum([0, *map(len, files)])
    (folder / "images.bin").write_bytes(b"".join(files))
    return EncodedStore(folder / "images.bin", offsets, pixels.shape[1:])


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Return each store, and what a naive reader says lies in it."""
    made = {}
    for form, channels in KINDS:
        pixels = noise(MANY, HEIGHT, WIDTH, channels)
        store = stored(tmp_path_factory.mktemp(form), pixels, form)
        if form == "jpeg":
            files = [BytesIO(encoded(image, form)) for image in pixels]
            by_pillow = [np.asarray(Image.open(file)) for file in files]
            far = np.stack(by_pillow).reshape(pixels.shape).astype(int) - pixels
            assert 0 < abs(far).mean() < 6
            pixels = np.stack(by_pillow).reshape(pixels.shape)
        made[form, channels] = store, torch.from_numpy(pixels)
    return made


@kinds
@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.integers(0, MANY - 1), max_size=70))
def test_any_rows_are_read_in_any_order_and_again(stores, form, channels, rows):
    store, memory = stores[form, channels]
    assert store.shape == (MANY, HEIGHT, WIDTH, channels)
    assert len(store) == MANY
    read = store.read(torch.tensor(rows, dtype=torch.int64))
    assert read.dtype == torch.uint8
    assert torch.equal(read, memory[rows])


# a JPEG of 16 x 16 pixels with colours at half the resolution, one of grey levels, and what libjpeg
# makes of them by another way, torchvision's decode_image: SHA-256 of the pixels, those at (3, 5)
KNOWN = {
    3: (
        "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABsSFBcUERsXFhceHBsgKEIrKCUlKFE6PTBCYFVlZF9VXVtqeJmBanGQ"
        "c1tdhbWGkJ6jq62rZ4C8ybqmx5moq6T/2wBDARweHigjKE4rK06kbl1upKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSk"
        "pKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKT/wAARCAAQABADASIAAhEBAxEB/8QAFQABAQAAAAAAAAAAAAAAAAAA"
        "BAX/xAAXEAADAQAAAAAAAAAAAAAAAAAAAwRh/8QAFQEBAQAAAAAAAAAAAAAAAAAAAQT/xAAYEQACAwAAAAAAAAAA"
        "AAAAAAAABAECEv/aAAwDAQACEQMRAD8AkKmwYqXBaZsHplwmi2hWZP/Z",
        "1b7e8d988ccfd52b681bb50f28208555f9e2356da8b6012184b29ba910fe40fe",
        [80, 49, 20],
    ),
    1: (
        "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABsSFBcUERsXFhceHBsgKEIrKCUlKFE6PTBCYFVlZF9VXVtqeJmBanGQ"
        "c1tdhbWGkJ6jq62rZ4C8ybqmx5moq6T/wAALCAAQABABAREA/8QAFgABAQEAAAAAAAAAAAAAAAAABgAF/8QAGRAA"
        "AQUAAAAAAAAAAAAAAAAAABE0YaLR/9oACAEBAAA/AMpnK10TM5Wukzla6GWcrXT/2Q==",
        "04e5e4f245d4dc019b8eda7a65b0c5eca6ef833634cd1260003a3eeb027c80ab",
        [102],
    ),
}


@pytest.mark.parametrize("channels", KNOWN)
def test_a_known_jpeg_has_its_known_pixels(tmp_path, channels):
    content, digest, at_3_5 = KNOWN[channels]
    (tmp_path / "images.bin").write_bytes(b64decode(content))
    offsets = np.array([0, len(b64decode(content))])
    (image,) = EncodedStore(tmp_path / "images.bin", offsets, (16, 16, channels)).read(
        torch.tensor([0])
    )
    assert image[3, 5].tolist() == at_3_5
    assert sha256(image.numpy().tobytes()).hexdigest() == digest


def test_rows_of_stores_are_those_rows_after_each_other(stores):
    (one, ones), (other, others) = stores["png", 3], stores["raw", 3]
    mask = torch.arange(MANY) % 3 == 1
    both = joined(rows_of(one, mask), rows_of(rows_of(other, HELD), torch.tensor([2, 0, 2])))
    whole = joined(ones[mask], others[HELD][[2, 0, 2]])
    assert both.shape == whole.shape
    assert len(both) == len(whole) == 16
    rows = torch.tensor([15, 0, 3, 15, 12, 13])
    assert torch.equal(both.read(rows), whole[rows])
    assert both.read(rows[:0]).shape == (0, HEIGHT, WIDTH, 3)


def test_other_python_runs_while_a_picture_is_decoded(tmp_path):
    store = stored(tmp_path, noise(1, 2500, 2500, 3), "jpeg")
    times = []

    def read():
        times.append(time.monotonic())
        store.read(torch.tensor([0]))
        times.append(time.monotonic())

    thread, ticks = threading.Thread(target=read), []
    store.read(torch.tensor([0]))  # what is loaded the first time
    thread.start()
    while thread.is_alive():
        ticks.append(time.monotonic())
        time.sleep(0.001)
    begin, end = times
    assert sum(begin < tick < end for tick in ticks) >= 3


def damaged(folder, change):
    store = stored(folder, noise(3, 60, 80, 3), "jpeg")
    content = bytearray((folder / "images.bin").read_bytes())
    change(content, store.offsets)
    (folder / "images.bin").write_bytes(content)
    return store


def test_a_damaged_image_is_named(tmp_path):
    def change(content, offsets):
        content[offsets[1] : offsets[1] + 200] = bytes(200)

    store = damaged(tmp_path, change)
    assert store.read(torch.tensor([0, 2])).shape == (2, 60, 80, 3)
    with pytest.raises(UsageError, match=r"images\.bin: image 1 is damaged: no JPEG or PNG$"):
        store.read(torch.tensor([0, 1]))


@pytest.mark.parametrize(("form", "said"), [("jpeg", "truncated"), ("png", "truncated|broken")])
def test_an_image_without_its_end_is_named_with_the_reason(tmp_path, form, said):
    content = encoded(noise(1, 60, 80, 3)[0], form)[:-400]
    (tmp_path / "images.bin").write_bytes(content)
    store = EncodedStore(tmp_path / "images.bin", np.array([0, len(content)]), (60, 80, 3))
    with pytest.raises(UsageError, match=f"image 0 is damaged: .*({said})"):
        store.read(torch.tensor([0]))


def test_an_image_of_another_size_is_named(tmp_path):
    store = stored(tmp_path, noise(2, 6, 8, 3), "png")
    other = EncodedStore(store.path, store.offsets, (8, 6, 3))
    with pytest.raises(UsageError, match=r"image 1 is of \(6, 8, 3\), its set of \(8, 6, 3\)"):
        other.read(torch.tensor([1]))


@pytest.mark.parametrize("form", ["raw", "png"])
def test_a_file_that_is_cut_short_or_gone_is_one_line(tmp_path, form):
    store = stored(tmp_path, noise(4, 6, 8, 3), form)
    content = store.path.read_bytes()
    store.path.write_bytes(content[:-5])  # while a run is under way
    assert store.read(torch.tensor([0, 2])).shape == (2, 6, 8, 3)
    with pytest.raises(UsageError, match=f"{store.path.name}: ends before its image 3"):
        store.read(torch.tensor([3]))
    again = {
        "raw": lambda: RawStore(store.path),
        "png": lambda: EncodedStore(store.path, store.offsets, (6, 8, 3)),
    }[form]
    said = {"raw": "cannot be read", "png": r"has \d+ bytes, its index says \d+"}[form]
    with pytest.raises(UsageError, match=said):
        again()
    store.path.unlink()
    for act in (again, lambda: store.read(torch.tensor([0]))):
        with pytest.raises(UsageError, match=r"cannot be read: .*No such file"):
            act()


@pytest.mark.parametrize(
    "array",
    [np.zeros((2, 3, 4), np.uint8), np.zeros((2, 3, 4, 1)), np.asfortranarray(noise(2, 3, 4, 3))],
)
def test_an_array_of_another_kind_is_refused(tmp_path, array):
    np.save(tmp_path / "images.npy", array)
    with pytest.raises(UsageError, match=r"images\.npy: must be uint8 \(N, H, W, C\) in C order"):
        RawStore(tmp_path / "images.npy")


class Recorded:
    """Reads a row as its number, and remembers what it read, and where."""

    def __init__(self):
        self.read, self.threads = [], []

    def __call__(self, rows):
        if -1 in rows:
            raise UsageError("row -1 is damaged")
        self.read.append(rows.tolist())
        self.threads.append(threading.current_thread().name)
        return rows * 10, rows

    def wait(self, pieces):
        end = time.monotonic() + 20
        while len(self.read) < pieces and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(0.02)  # for more than that
        assert len(self.read) == pieces


def rows(*numbers):
    return torch.tensor(numbers, dtype=torch.int64)


def test_what_is_expected_is_read_once_and_in_order_and_no_more_than_fits():
    read = Recorded()
    ahead = Ahead(read, size=100, most=500)
    ahead.expect([rows(1, 2), rows(3, 4, 5), rows(6), rows(7)])
    read.wait(2)  # 500 bytes wait
    assert read.read == [[1, 2], [3, 4, 5]]
    assert ahead.take(rows(1, 2))[0].tolist() == [10, 20]
    read.wait(4)  # in their place two of 100 each
    assert [ahead.take(rows(n))[0].tolist() for n in (7, 6)] == [[70], [60]]
    assert ahead.take(rows(3, 4, 5))[1].tolist() == [3, 4, 5]
    assert sorted(read.read) == [[1, 2], [3, 4, 5], [6], [7]]
    assert all(name.startswith("fedsam-ahead") for name in read.threads)
    assert ahead.take(rows(3, 4, 5))[0].tolist() == [30, 40, 50]  # again: read here and now
    assert len(read.read) == 5


def test_what_is_expected_in_vain_is_given_up_after_the_next_time():
    read = Recorded()
    ahead = Ahead(read, size=1, most=3)
    ahead.expect([rows(1), rows(2)])
    ahead.expect([rows(3), rows(4)])
    read.wait(3)
    ahead.expect([rows(5)])  # 1 and 2 make room
    read.wait(5)
    assert read.read == [[1], [2], [3], [4], [5]]
    ahead.take(rows(4))
    assert len(read.read) == 5
    ahead.take(rows(1))
    assert read.read[5] == [1]


def test_a_piece_of_two_cohorts_running_is_read_once_for_both():
    read = Recorded()
    ahead = Ahead(read, size=1, most=3)
    ahead.expect([rows(1), rows(2)])
    ahead.expect([rows(3), rows(1)])
    read.wait(3)
    assert [ahead.take(rows(n))[0].tolist() for n in (1, 2, 3, 1)] == [[10], [20], [30], [10]]
    assert read.read == [[1], [2], [3]]
    ahead.expect([rows(4), rows(5), rows(6)])  # for which there is room again
    read.wait(6)
    ahead.take(rows(1))
    assert read.read[6:] == [[1]]


def test_a_piece_that_is_larger_than_the_room_is_read_alone():
    read = Recorded()
    ahead = Ahead(read, size=100, most=150)
    ahead.expect([rows(1, 2, 3), rows(4)])
    read.wait(1)
    assert ahead.take(rows(1, 2, 3))[1].tolist() == [1, 2, 3]
    read.wait(2)


def test_what_cannot_be_read_ahead_is_said_to_who_takes_it():
    read = Recorded()
    ahead = Ahead(read, size=1, most=1)
    ahead.expect([rows(-1), rows(2)])
    with pytest.raises(UsageError, match="row -1 is damaged"):
        ahead.take(rows(-1))
    read.wait(1)
    assert ahead.take(rows(2))[0].tolist() == [20]


def twins(folder, form="png", padding=0):
    """Return the same images and masks in memory, and in a store."""
    pixels = noise(MANY, HEIGHT, WIDTH, 3)
    masks = noise(MANY, HEIGHT, WIDTH, 1, seed=1)
    folder.joinpath("masks").mkdir()
    stores = stored(folder, pixels, form), stored(folder / "masks", masks, "png")
    of = {"padding": padding, "dtype": torch.float64, "classes": torch.arange(MANY) % 3}
    scale = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    memory = Images(
        torch.from_numpy(pixels).permute(0, 3, 1, 2),
        torch.from_numpy(masks)[..., 0],
        *scale,
        outside=9,
        **of,
    )
    return memory, StoredImages(*stores, *scale, outside=9, **of)


WORK = Work(4, 2.0, augmentations=(Crop(2), Flip(), Cutout(4)))
HELD = torch.arange(0, MANY, 3).flip(0)


def same(one, other):
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.targets, other.targets)
    assert one.pixels.outside == other.pixels.outside


@pytest.mark.parametrize("form", ["raw", "png"])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_plan_takes_from_a_store_what_it_takes_from_memory(tmp_path, form, ahead):
    memory, lazy = twins(tmp_path, form, WORK.padding)
    plan = make_plan(HELD, WORK, (HEIGHT, WIDTH), torch_generator(0, "plan"))
    if ahead:
        lazy.expect([plan.indices])
    images, there = lazy.at_hand(plan)
    assert len(images) == len(HELD)
    assert memory.at_hand(plan) == (memory, plan)
    for step in range(len(plan)):
        same(images.batch(there, step), memory.batch(plan, step))
        same(lazy.batch(plan, step), memory.batch(plan, step))


def test_all_else_of_images_is_as_in_memory(tmp_path):
    memory, lazy = twins(tmp_path)
    some = torch.tensor([5, 5, 0, 39])
    same(lazy.rows(some), memory.rows(some))
    assert len(lazy) == len(memory) == MANY
    assert lazy.aligned
    assert lazy.raw.shape[1:] == memory.raw.shape[1:]
    assert lazy.at_a_time(500) == memory.at_a_time(500)
    assert torch.equal(lazy.classes, memory.classes)
    assert torch.equal(lazy.only(some).raw, memory.raw[some])
    assert torch.equal(lazy.only(some).targets, memory.targets[some])
    other = memory.raw[some], memory.targets[some]
    same(lazy.with_raw(*other).rows(torch.arange(4)), memory.with_raw(*other).rows(torch.arange(4)))


def test_a_cohort_has_room_for_all_of_its_images(tmp_path):
    memory, lazy = twins(tmp_path, padding=WORK.padding)
    room, begin, packing = lazy.room(MANY), 0, Packing(WORK)
    assert memory.room(MANY) is memory
    plans = [
        make_plan(held, WORK, (HEIGHT, WIDTH), torch_generator(n, "plan"))
        for n, held in enumerate([HELD, torch.tensor([1, 2]), torch.tensor([4])])
    ]
    moved = []
    for plan in plans:
        images, there = lazy.at_hand(plan)
        room.put(begin, images)
        moved.append(there.at(there.indices + begin))
        begin += len(images)
    steps, width = max(map(len, plans)), max(plan.indices.shape[1] for plan in plans)
    batches = []
    for images, drawn in ((memory, plans), (room, moved)):
        tensor = torch.zeros(packing.planes, 3, steps, width, dtype=torch.int32)
        packing.pack(drawn, tensor)
        batches.append(images.take(packing.choices(tensor[:, :, 0]), WORK.augmentations))
    one, other = batches
    assert torch.equal(one.valid, other.valid)
    assert torch.equal(one.images[one.valid], other.images[one.valid])
    assert torch.equal(one.targets[one.valid], other.targets[one.valid])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"train_classes": None}, "train_labels are masks: give train_classes"),
        ({"train_images": torch.zeros(MANY, 3, HEIGHT, WIDTH).byte()}, "beside images in one"),
        ({"test_labels": torch.zeros(MANY - 1, dtype=torch.int64)}, "40 images, 39 labels"),
        ({"mean": (0.5,)}, "mean must have 3 entries, one a channel"),
    ],
)
def test_a_data_set_of_stores_is_checked_without_reading_it(tmp_path, monkeypatch, change, said):
    (tmp_path / "masks").mkdir()
    images = stored(tmp_path, noise(MANY, HEIGHT, WIDTH, 3), "raw")
    masks = stored(tmp_path / "masks", noise(MANY, HEIGHT, WIDTH, 1), "png")
    classes = torch.zeros(MANY, dtype=torch.int64)
    half = (0.5,) * 3
    whole = Dataset("stored", images, masks, images, masks, 256, half, half, "segmentation")
    given = {"train_classes": classes, "test_classes": classes} | change
    for kind in (RawStore, EncodedStore):
        monkeypatch.setattr(kind, "read", lambda self, rows: pytest.fail("read"))
    if not said:
        assert check(replace(whole, **given)) is None
        return
    with pytest.raises(UsageError, match=f"^--dataset stored: .*{said}"):
        check(replace(whole, **given))
