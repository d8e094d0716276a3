"""Federated evaluation: against a loop over clients and images, and its laws."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from statistics import mean, pstdev

import little
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsam.base.errors import UsageError
from fedsam.data.partition import Partition
from fedsam.flatness.measures.clients import by_client, clients, local_tests, spread


def test_every_client_is_served_as_in_a_loop_over_its_images():
    subject = little.subject()
    module = little.module_of(subject)
    for images, split in (
        (subject.train, subject.partition),
        (subject.test, Partition(torch.tensor([3, 3, 3, 9, 0, 39]), torch.tensor([0, 4, 6]))),
    ):
        found = by_client(subject, images, split)
        for client in range(len(split)):
            each = [little.right(module, images, int(row)) for row in split[client]]
            assert found["accuracy"][client] == pytest.approx(mean(r for r, _ in each))
            assert found["loss"][client] == pytest.approx(mean(loss for _, loss in each))


def test_every_image_goes_through_the_model_once():
    subject = little.subject()
    seen = []
    hook = subject.network.module.register_forward_hook(lambda m, x, y: seen.append(len(y)))
    clients(subject)
    hook.remove()
    local = local_tests(subject.partition, subject.train.targets, subject.test.targets, 3)
    assert sum(seen) == len(subject.train) + len(local.indices.unique())


def test_what_the_values_come_to_by_hand():
    values = np.array([0.9, 0.2, 0.5, 0.2, *[0.8] * 8])  # 12 clients: the worst 10 % are 2
    sizes = np.array([1, 3, *[2] * 10])
    found = spread(values, sizes, high_is_bad=False)
    assert found["mean"] == pytest.approx(mean(values))
    assert found["weighted_mean"] == pytest.approx(float(values @ sizes) / 24)
    assert found["deviation"] == pytest.approx(pstdev(values))
    assert found["worst_tenth"] == pytest.approx(0.2)
    assert (found["bottom"], found["bottom_client"]) == (0.2, 1)
    assert spread(values, sizes, high_is_bad=True)["worst_tenth"] == pytest.approx(0.85)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50), st.booleans())
def test_the_worst_tenth_lies_between_the_bottom_and_the_mean(values, high_is_bad):
    found = spread(np.array(values), np.ones(len(values), np.int64), high_is_bad)
    order = [found["bottom"], found["worst_tenth"], found["mean"]]
    for below, above in pairwise(order):
        lower, higher = (above, below) if high_is_bad else (below, above)
        assert lower <= higher + 1e-12
    worst = sorted(values, reverse=high_is_bad)[: math.ceil(len(values) / 10)]
    assert found["worst_tenth"] == pytest.approx(mean(worst))
    assert found["mean"] == pytest.approx(found["weighted_mean"])


def test_the_weighted_mean_is_the_accuracy_on_all_images():
    subject = little.subject()
    found = clients(subject)["scalars"]
    whole = subject.objective("train").metrics(subject.w)
    assert found["train_accuracy_weighted_mean"] == pytest.approx(whole["accuracy"])
    assert found["train_loss_weighted_mean"] == pytest.approx(whole["loss"])
    assert found["train_accuracy_mean"] != pytest.approx(whole["accuracy"])  # sizes differ


def test_a_local_test_set_has_the_labels_of_the_client_and_images_drawn_evenly():
    subject = little.subject(train=900, test=50, clients=7)
    train, test = subject.train.targets, subject.test.targets
    local = local_tests(subject.partition, train, test, 3)
    counts = subject.partition.counts(train, 5)
    assert torch.equal(Partition(local.indices, local.offsets).counts(test, 5), counts)
    again = local_tests(subject.partition, train, test, 3)
    assert torch.equal(local.indices, again.indices)
    assert not torch.equal(local.indices, local_tests(subject.partition, train, test, 4).indices)
    times = torch.bincount(local.indices, minlength=50).double()  # 18 expected of each
    chi2 = float(((times - 18) ** 2 / 18).sum())
    assert 20 < chi2 < 80  # 45 degrees of freedom: within 1 in 1,000 on either side


def test_a_label_without_test_images_is_an_error():
    own = Partition(torch.arange(4), torch.tensor([0, 2, 4]))
    with pytest.raises(UsageError, match="no test image has label 2"):
        local_tests(own, torch.tensor([0, 1, 2, 1]), torch.tensor([0, 1, 1]), 0)


def test_many_clients_are_a_matter_of_seconds_and_of_a_small_file():
    subject = little.subject(train=50_000, side=4, clients=2)
    many = Partition(subject.partition.indices, torch.arange(50_001))
    found = clients(replace(subject, partition=many))
    assert found["scalars"]["train_accuracy_deviation"] > 0  # one image each: 0 or 1
    assert found["values"]["train_accuracy"] == []
    assert len(json.dumps(found)) < 20_000
