"""Domains: digits turned, clients of one domain each, and what clients never train on."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.functional import InterpolationMode, rotate

from fedsam.base.errors import UsageError
from fedsam.base.randomness import numpy_generator
from fedsam.config.schema import resolve
from fedsam.data.datasets import Dataset, check
from fedsam.data.partitions.csv import csv
from fedsam.data.partitions.held_out import hold_out
from fedsam.data.partitions.saved import saved
from fedsam.data.partitions.splits import domains, natural
from fedsam.data.sources.load import load
from fedsam.data.store import RawStore, SelectedStore, Store
from fedsam.simulate.build.data import split

PARTITIONS = ("iid", "dirichlet", "dirichlet-per-class", "shards", "quantity", "natural", "domains")


def generator(seed=0):
    return numpy_generator(seed, "partition")


def numbered(of_train, of_test, *, classes=3, names=None):
    """A data set whose pixels say which image it is: training images from 0, test images after."""
    many, more = len(of_train), len(of_test)
    rows = torch.arange(many + more)
    images = torch.stack([rows % 251, rows // 251], 1)[:, None, None].to(torch.uint8)
    labels = rows % classes
    return Dataset(
        "numbered",
        images[:many],
        labels[:many],
        images[many:],
        labels[many:],
        classes,
        (0.5,),
        (0.5,),
        train_domains=torch.tensor(of_train),
        test_domains=torch.tensor(of_test, dtype=torch.int64),
        domain_names=names or tuple("abcdefgh"[: max(of_train) + 1]),
    )


def said(images):
    """Which images of ``numbered`` these are."""
    pixels = images.flatten(1).long()
    return set((pixels[:, 0] + 251 * pixels[:, 1]).tolist())


@st.composite
def data_sets(draw):
    """Any sizes of two to four domains, in any order, some without a test image."""
    sizes = draw(st.lists(st.integers(30, 60), min_size=2, max_size=4))
    tests = [1 + draw(st.integers(0, 4)), *(draw(st.integers(0, 5)) for _ in sizes[1:])]
    order = draw(st.randoms(use_true_random=False))
    parts = [[n for n, size in enumerate(many) for _ in range(size)] for many in (sizes, tests)]
    for part in parts:
        order.shuffle(part)
    made = numbered(*parts)
    check(made)
    return made


def test_rotated_digits_are_the_digits_turned_one_angle_each():
    """Image i of scikit-learn's file by 15 (i mod 6) degrees, as torchvision turns it."""
    from sklearn.datasets import load_digits

    turned, theirs = load("rotated-digits", Path("unused")), load_digits()
    grey = torch.from_numpy(theirs.images).mul(255 / 16).round()
    canvas = torch.nn.functional.pad(grey[:, None], (1, 1, 1, 1)).float()
    test, seen = torch.zeros(1797, dtype=torch.bool), [0] * 10
    for row, digit in enumerate(theirs.target):
        test[row] = seen[digit] % 5 == 4
        seen[digit] += 1
    assert turned.domain_names == ("0", "15", "30", "45", "60", "75")
    assert turned.train_images.shape[1:] == (1, 10, 10)
    for part, rows in (("train", ~test), ("test", test)):
        images, labels = getattr(turned, f"{part}_images"), getattr(turned, f"{part}_labels")
        of_part, whose = rows.nonzero()[:, 0], getattr(turned, f"{part}_domains")
        assert torch.equal(whose, of_part % 6)
        assert torch.equal(labels, torch.from_numpy(theirs.target)[of_part])
        for domain in range(6):
            mine = whose == domain
            angle = 15 * domain
            naive = rotate(canvas[of_part[mine]], angle, InterpolationMode.BILINEAR)
            assert (images[mine].float() - naive).abs().max() <= 0.501
    pixels = turned.train_images.double() / 255
    assert pixels.mean().item() == pytest.approx(turned.mean[0], abs=5e-5)
    assert pixels.std(correction=0).item() == pytest.approx(turned.std[0], abs=5e-5)


def test_no_ink_of_a_digit_falls_off_its_canvas():
    whole, turned = load("digits", Path()), load("rotated-digits", Path())
    for part in ("train_images", "test_images"):
        before, after = (getattr(d, part).double().sum((1, 2, 3)) for d in (whole, turned))
        assert (after / before).min() > 0.97


@settings(max_examples=40, deadline=None)
@given(data_sets(), st.data(), st.integers(0, 9), st.sampled_from(["iid", "dirichlet"]))
def test_by_domains_each_client_holds_one_and_all_is_held_once(dataset, data, seed, within):
    whose = dataset.train_domains
    clients = data.draw(st.integers(len(dataset.domain_names), 20))
    made = domains(
        dataset.train_labels, clients, generator(seed), domains=whose, alpha=0.5, within=within
    )
    assert torch.equal(made.indices.sort().values, torch.arange(len(whose)))
    assert int(made.sizes.min()) >= 1
    held = [whose[made[client]].unique().tolist() for client in range(clients)]
    assert all(len(of_client) == 1 for of_client in held)
    many = torch.tensor([of_client[0] for of_client in held]).bincount()
    quota = clients * whose.bincount() / len(whose)
    if int(quota.min()) >= 1:
        assert ((many - quota).abs() < 1).all()
        nearest = sorted(quota - quota.floor(), reverse=True)[: clients - int(quota.floor().sum())]
        up = (many > quota.floor()).nonzero()[:, 0]
        assert len(up) == len(nearest)
        assert sum((quota - quota.floor())[up]) == pytest.approx(float(sum(nearest)), abs=1e-5)


def test_the_clients_of_a_domain_go_by_its_size():
    whose = torch.tensor([0] * 70 + [1] * 25 + [2] * 5)
    for clients, many in ((3, [1, 1, 1]), (10, [7, 2, 1]), (12, [8, 3, 1]), (20, [14, 5, 1])):
        made = domains(whose % 2, clients, generator(), domains=whose, alpha=0.0)
        held = torch.tensor([int(whose[made[client]][0]) for client in range(clients)])
        assert torch.equal(held, torch.arange(3).repeat_interleave(torch.tensor(many)))
    labels = torch.arange(100) % 2
    made = domains(labels, 40, generator(), domains=whose, alpha=0.0, within="dirichlet")
    assert ((made.counts(labels, 2) == 0).sum(1) == 1).all()  # one class a client
    with pytest.raises(
        UsageError, match=r"^--partition domains: 1 clients of domain 2: --clients 1"
    ):
        domains(labels, 20, generator(), domains=whose, alpha=0.0, within="dirichlet")


@settings(max_examples=40, deadline=None)
@given(
    data_sets(),
    st.data(),
    st.sampled_from(PARTITIONS),
    st.floats(0.0, 0.3),
    st.integers(0, 99),
)
def test_nobody_trains_on_what_is_held_out(dataset, data, partition, validation, seed):
    """Over seeds and partitions: by the pixels, which say which image of the whole set it is."""
    names = dataset.domain_names
    name = data.draw(st.sampled_from(["", *names]))
    owners = torch.arange(len(dataset.train_labels)) // 10
    held = hold_out(replace(dataset, owners=owners), name, validation)
    left, many = held.dataset, len(dataset.train_labels)
    clients = 6 if partition != "natural" else len(left.owners.unique())
    options = {"dirichlet-per-class": {"min_size": 1}}.get(partition, {})
    config = resolve(
        {"partition": partition, "partition_options": options, "seed": seed, "alpha": 1.0}
        | {"clients": clients, "clients_per_round": 1}
    )
    made = split(config, left, held.places)
    trained = said(left.train_images[made.indices])
    assert len(trained) == len(made.indices)
    tested = said(left.test_images)
    beside = held.beside.images if held.beside else left.test_images[:0]
    validated, seen = (said(beside[rows]) for rows in (held.validation, held.seen))
    together = [trained, tested, validated, seen]
    assert sum(map(len, together)) == len(set.union(*together))  # no two share an image
    whose = torch.cat([dataset.train_domains, dataset.test_domains])
    target = names.index(name) if name else -1
    of_source = {row for row in range(len(whose)) if int(whose[row]) != target}
    if name:
        assert tested == set(range(len(whose))) - of_source
        assert trained | validated | seen == of_source
        assert seen == {row for row in of_source if row >= many}
        by_name = {n: said(beside[rows]) for n, rows in held.domains.items()}
        assert set.union(set(), *by_name.values()) == seen
        assert all({int(whose[row]) for row in v} == {names.index(n)} for n, v in by_name.items())
    else:
        assert trained | validated == set(range(many))
    for domain in range(len(names)):
        count = int((dataset.train_domains == domain).sum())
        drawn = sum(int(whose[row]) == domain for row in validated)
        wanted = max(1, round(validation * count)) if validation and domain != target else 0
        assert drawn == wanted
    assert (
        torch.equal(left.train_labels, dataset.train_labels[held.places >= 0])
        if (held.places is not None)
        else len(left.train_labels) == many
    )


def test_a_data_set_without_test_images_holds_a_tenth_of_each_domain_out():
    whole = numbered([0] * 40 + [1] * 30 + [2] * 20, [])
    check(whole)
    every = hold_out(whole)
    whose = torch.tensor([0] * 40 + [1] * 30 + [2] * 20)
    tested = said(every.dataset.test_images)
    assert whose[sorted(tested)].bincount().tolist() == [4, 3, 2]
    assert said(every.dataset.train_images) == set(range(90)) - tested
    one = hold_out(whole, "b", 0.25)
    assert said(one.dataset.test_images) == set(range(40, 70))
    seen = said(one.beside.images[one.seen])
    assert seen == {row for row in tested if whose[row] != 1}  # the same images
    validated = said(one.beside.images[one.validation])
    assert whose[sorted(validated)].bincount(minlength=3).tolist() == [9, 0, 4]  # of 36 and 18
    assert said(one.dataset.train_images) == set(range(90)) - seen - validated - set(range(40, 70))


def test_files_of_splits_speak_of_the_whole_training_set(tmp_path):
    whole = numbered([0, 1, 1, 0, 2, 2, 0, 1], [0, 1, 2])
    held = hold_out(whole, "b")
    labels = held.dataset.train_labels
    owners = {"x": [0, 1, 3], "y": [2, 7], "z": [6, 4]}
    file = tmp_path / "split.json"
    file.write_text(json.dumps(owners))
    table = tmp_path / "split.csv"
    lines = [f"{user},{row},{row % 3}" for user, rows in owners.items() for row in rows]
    table.write_text("\n".join(["user_id,image_id,class", *lines]))
    for made in (
        saved(labels, 2, file, held.places),
        csv(labels, 2, generator(), path=str(table), places=held.places),
    ):
        images = held.dataset.train_images
        assert [said(images[made[client]]) for client in (0, 1)] == [{0, 3}, {4, 6}]  # y is none
    file.write_text('{"y": [1, 2, 7]}')
    with pytest.raises(UsageError, match="all its rows are held out"):
        saved(labels, 1, file, held.places)
    file.write_text('{"y": [0, 8]}')
    with pytest.raises(UsageError, match=r"images must lie in 0\.\.7"):
        saved(labels, 1, file, held.places)
    table.write_text("user_id,image_id,class\nx,8,0\n")
    with pytest.raises(UsageError, match=r"must lie in 0\.\.7, got '8'"):
        csv(labels, 1, generator(), path=str(table), places=held.places)


def test_owners_that_hold_the_left_out_domain_alone_are_none():
    whole = replace(
        numbered([0, 1, 1, 0, 2, 2], [0, 1, 2]), owners=torch.tensor([3, 0, 1, 2, 2, 3])
    )
    left = hold_out(whole, "b").dataset
    made = natural(left.train_labels, 2, generator(), owners=left.owners)
    assert [said(left.train_images[made[client]]) for client in (0, 1)] == [{3, 4}, {0, 5}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_domains": None}, "test_domains must be int64, one an image, got an object"),
        ({"train_domains": torch.zeros(5)}, "train_domains must be int64, one an image"),
        ({"train_domains": torch.zeros(4, dtype=torch.int64)}, "train_domains must be int64, one"),
        ({"domain_names": ("a", "b")}, r"train_domains must be places in domain_names, 0\.\.1"),
        ({"domain_names": ("a", "b", "c", "d")}, "domain_names: 'd' has no training image"),
        ({"domain_names": ("a", "b", "a")}, "domain_names must differ"),
        ({"domain_names": ["a", "b", "c"]}, "domain_names must be a tuple of texts"),
        ({"domain_names": (0, 1, 2)}, "domain_names must be a tuple of texts"),
        ({"domain_names": ()}, "train_domains must be places in domain_names"),
    ],
)
def test_domains_that_cannot_be_are_named(change, message):
    whole = numbered([0, 1, 1, 0, 2], [0, 1, 2])
    check(whole)
    with pytest.raises(UsageError, match=f"^--dataset numbered: {message}"):
        check(replace(whole, **change))


def test_only_a_data_set_with_domains_may_have_no_test_images():
    whole = numbered([0, 1, 1, 0, 2], [])
    check(whole)
    plain = replace(whole, train_domains=None, test_domains=None, domain_names=())
    with pytest.raises(UsageError, match=r"^--dataset numbered: test has 0 images, 0 labels"):
        check(plain)


def test_what_cannot_be_left_out_is_one_line():
    whole = numbered([0, 1, 1, 0, 2], [0, 1, 2], names=("art", "photo", "sketch"))
    wrong = (
        r"^--leave-out scetch: numbered has no such domain \(did you mean 'sketch'\?\); have art"
    )
    with pytest.raises(UsageError, match=wrong):
        hold_out(whole, "scetch")
    with pytest.raises(UsageError, match=r"^--leave-out 0: digits does not say of which domain"):
        hold_out(load("digits", Path()), "0")
    larger = replace(whole, test_images=torch.zeros(3, 1, 2, 4, dtype=torch.uint8))
    with pytest.raises(UsageError, match=r"^--leave-out art: needs images of one size, .*\(1, 2\)"):
        hold_out(larger, "art")
    only = numbered([0, 0, 0], [0])
    with pytest.raises(UsageError, match=r"^--leave-out a: it is the only domain of numbered"):
        hold_out(only, "a")
    with pytest.raises(UsageError, match=r"^--validation: 0\.9 of the 2 images of art leaves"):
        hold_out(whole, "", 0.9)


def test_what_no_split_by_domains_can_be_is_one_line():
    whose = torch.tensor([0, 1, 1, 0, 2])
    labels = torch.zeros_like(whose)
    with pytest.raises(UsageError, match=r"^--partition domains: this data set does not say"):
        domains(labels, 3, generator(), domains=None, alpha=1.0)
    with pytest.raises(UsageError, match=r"^--clients 2: --partition domains needs one at least"):
        domains(labels, 2, generator(), domains=whose, alpha=1.0)
    with pytest.raises(UsageError, match=r"^--partition-options: within must be iid or dirichlet"):
        domains(labels, 3, generator(), domains=whose, alpha=1.0, within="shards")


def test_images_chosen_of_stores_are_those_of_memory(tmp_path):
    pixels = torch.arange(12 * 2 * 3 * 1).view(12, 2, 3, 1).to(torch.uint8)
    stores = []
    for number, part in enumerate(pixels.split([7, 5])):
        np.save(tmp_path / f"{number}.npy", part.numpy())
        stores.append(RawStore(tmp_path / f"{number}.npy"))
    parts = [torch.tensor([6, 0, 3]), torch.tensor([4]), torch.tensor([3, 1])]
    chosen = SelectedStore([(stores[0], parts[0]), (stores[1], parts[1]), (stores[0], parts[2])])
    assert isinstance(chosen, Store)
    assert chosen.shape == (len(chosen), 2, 3, 1) == (6, 2, 3, 1)
    whole = pixels[torch.cat([parts[0], 7 + parts[1], parts[2]])]
    rows = torch.tensor([5, 3, 0, 3, 2, 4, 1])
    assert torch.equal(chosen.read(rows), whole[rows])
    assert chosen.read(rows[:0]).shape == (0, 2, 3, 1)


@settings(max_examples=20, deadline=None)
@given(data_sets(), st.data())
def test_from_a_store_the_same_is_held_out(tmp_path_factory, dataset, data):
    folder = tmp_path_factory.mktemp("stored")
    stores = {}
    for part in ("train_images", "test_images"):
        np.save(folder / f"{part}.npy", getattr(dataset, part).permute(0, 2, 3, 1).numpy())
        stores[part] = RawStore(folder / f"{part}.npy")
    name = data.draw(st.sampled_from(["", *dataset.domain_names]))
    validation = data.draw(st.sampled_from([0.1, 0.3]))
    ours = hold_out(replace(dataset, **stores), name, validation)
    theirs = hold_out(dataset, name, validation)
    for store, images in (
        (ours.dataset.train_images, theirs.dataset.train_images),
        (ours.dataset.test_images, theirs.dataset.test_images),
        (ours.beside.images, theirs.beside.images),
    ):
        every = torch.arange(len(images))
        assert torch.equal(store.read(every).permute(0, 3, 1, 2), images)
