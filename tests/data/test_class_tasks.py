"""Tasks of classes: who learns what when, against plain loops; heads against a smaller output."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fedsam.config.schema import resolve
from fedsam.data.lifelong import Heads, lifelong
from fedsam.data.partition import Partition
from fedsam.tasks.classification import Classification


@st.composite
def cases(draw):
    classes = draw(st.integers(2, 12))
    tasks = draw(st.integers(2, classes))
    rounds = draw(st.integers(tasks, 40))
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=1, max_size=60))
    order = draw(st.one_of(st.just("natural"), st.integers(0, 99)))
    ends = resolve({"rounds": rounds, "lifelong": tasks}).task_ends
    labels = torch.tensor(labels)
    return lifelong(ends, labels, classes, order, memory=draw(st.integers(0, 3)))


@settings(max_examples=60, deadline=None)
@given(cases(), st.data())
def test_tasks_share_classes_and_rounds_out_evenly(plan, data):
    tasks, rounds = len(plan.ends), plan.ends[-1]
    sizes = plan.task_of.bincount(minlength=tasks)
    assert int(sizes.min()) >= 1
    assert int(sizes.max() - sizes.min()) <= 1
    at = [plan.at(round) for round in range(1, rounds + 1)]
    assert at == sorted(at)
    lengths = [at.count(task) for task in range(tasks)]
    assert max(lengths) - min(lengths) <= 1
    assert min(lengths) >= 1
    assert plan.at(rounds + 1) == tasks - 1  # of plans that are drawn ahead


@settings(max_examples=60, deadline=None)
@given(cases(), st.data())
def test_a_client_trains_on_its_images_of_the_task_and_its_memory(plan, data):
    images = data.draw(st.permutations(range(len(plan.labels))))
    round = data.draw(st.integers(1, plan.ends[-1]))
    expected, kept = [], {}
    for image in images:
        label = int(plan.labels[image])
        if plan.task_of[label] == plan.at(round):
            expected.append(image)
        elif plan.task_of[label] < plan.at(round) and kept.get(label, 0) < plan.memory:
            kept[label] = kept.get(label, 0) + 1
            expected.append(image)
    assert plan.rows(torch.tensor(images), round).tolist() == expected


def test_natural_order_and_a_shuffled_one():
    ends, labels = (1, 2, 3), torch.arange(10)
    assert lifelong(ends, labels, 10).task_of.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    mixed = [lifelong(ends, labels, 10, order=seed).task_of.tolist() for seed in (0, 0, 1)]
    assert mixed[0] == mixed[1] != mixed[2]
    assert all(sorted(tasks) == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2] for tasks in mixed)


def test_holders_are_the_clients_with_images_of_the_task():
    labels = torch.tensor([0, 1, 2, 3, 0, 3])
    partition = Partition(torch.tensor([4, 1, 2, 3, 0, 5]), torch.tensor([0, 1, 4, 6]))
    plan = lifelong((5, 10), labels, 4)  # classes 0 and 1, then 2 and 3
    assert [clients.tolist() for clients in plan.holders(partition)] == [[0, 1, 2], [1, 2]]
    rows = plan.rows_by_task(torch.tensor([3, 0, 0, 2]))
    assert [of.tolist() for of in rows] == [[1, 2], [0, 3]]


def test_heads_are_a_classifier_of_the_tasks_own_classes():
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(40, 6, dtype=torch.float64, generator=generator).requires_grad_()
    targets = torch.randint(0, 6, (40,), generator=generator)
    task_of = torch.tensor([0, 1, 0, 2, 1, 0])
    heads = Heads(Classification(), task_of)
    right, losses = 0, []
    for row, label in zip(output, targets.tolist(), strict=True):
        own = (task_of == task_of[label]).nonzero()[:, 0]
        place = own.tolist().index(label)
        right += int(row[own].argmax()) == place
        losses.append(F.cross_entropy(row[own], torch.tensor(place)))
    expected = torch.stack(losses)
    found = heads.loss(output, targets)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    g, h = (torch.autograd.grad(loss.sum(), output)[0] for loss in (found, expected))
    torch.testing.assert_close(g, h, rtol=1e-12, atol=1e-14)
    metrics = heads.metrics(heads.statistics(output, targets))
    assert metrics["accuracy"] == right / 40
    assert metrics["loss"] == pytest.approx(expected.mean().item())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 2}, "only 2 classes"),
        ({"heads": "two"}, "single or multi"),
        ({"memory": -1}, "at least 0"),
        ({"memory": 0.5}, "a number of images"),
        ({"order": "random"}, "natural or a seed"),
        ({"order": True}, "natural or a seed"),
    ],
)
def test_options_that_make_no_sense_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        lifelong((1, 2, 3), torch.arange(10), **({"classes": 10} | options))
