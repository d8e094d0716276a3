"""Segmentation against naive loops in float64: loss, hardest quarter, confusion, mIoU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fedsam.base.errors import UsageError
from fedsam.data.datasets import check, load
from fedsam.tasks.classification import Classification
from fedsam.tasks.segmentation import Segmentation

C, H, W = 4, 5, 6


def drawn(seed, batch=3, ignored=0.2):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, C, H, W, generator=generator, dtype=torch.float64)
    masks = torch.randint(0, C, (batch, H, W), generator=generator)
    masks[torch.rand(batch, H, W, generator=generator) < ignored] = 255
    return logits, masks.to(torch.uint8)


def pixel_losses(logits, mask):
    """One image's losses in rows and columns, by the definition; 0 where nothing is said."""
    losses = torch.zeros(mask.shape, dtype=torch.float64)
    for row in range(mask.shape[0]):
        for column in range(mask.shape[1]):
            cls = int(mask[row, column])
            if cls != 255:
                scores = logits[:, row, column]
                losses[row, column] = scores.exp().sum().log() - scores[cls]
    return losses


def test_a_loss_is_the_mean_over_the_pixels_that_say_something_gradient_included():
    logits, masks = drawn(0)
    logits.requires_grad_()
    losses = Segmentation(C).loss(logits, masks)
    naive = [
        pixel_losses(x, m).sum() / (m != 255).sum() for x, m in zip(logits, masks, strict=True)
    ]
    pytorch = [
        F.cross_entropy(x[None], m[None].long(), ignore_index=255)
        for x, m in zip(logits, masks, strict=True)
    ]
    torch.testing.assert_close(losses, torch.stack(naive), rtol=1e-12, atol=0)
    torch.testing.assert_close(losses, torch.stack(pytorch), rtol=1e-12, atol=0)
    ours = torch.autograd.grad(losses.sum(), logits)[0]
    theirs = torch.autograd.grad(torch.stack(pytorch).sum(), logits)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def test_the_hardest_quarter_is_that_of_all_pixels_and_ignored_ones_have_no_loss():
    logits, masks = drawn(1, ignored=0.3)
    losses = Segmentation(C, hard=0.25).loss(logits, masks)
    for loss, x, mask in zip(losses, logits, masks, strict=True):
        falling = sorted(pixel_losses(x, mask).flatten().tolist(), reverse=True)
        assert float(loss) == pytest.approx(sum(falling[:7]) / 7, rel=1e-12)  # int(30 / 4)


@pytest.mark.parametrize("hard", [0.0, 0.25])
def test_an_image_that_says_nothing_has_no_loss_and_no_gradient(hard):
    logits, masks = drawn(2)
    masks[1] = 255
    logits.requires_grad_()
    losses = Segmentation(C, hard=hard).loss(logits, masks)
    assert float(losses[1].detach()) == 0
    gradient = torch.autograd.grad(losses.mean(), logits)[0]
    assert gradient.isfinite().all()
    assert (gradient[1] == 0).all()
    assert (gradient[0] != 0).any()


def test_each_auxiliary_head_adds_its_loss_and_the_first_one_answers():
    heads = torch.stack([drawn(seed)[0] for seed in (3, 4, 5)], 1)
    masks = drawn(6)[1]
    task = Segmentation(C, aux=0.4)
    one, two, three = (task.loss(heads[:, head], masks) for head in range(3))
    torch.testing.assert_close(task.loss(heads, masks), one + 0.4 * (two + three))
    alone, all_of_them = (task.statistics(x, masks)[2:] for x in (heads[:, 0], heads))
    assert torch.equal(alone, all_of_them)
    torch.testing.assert_close(task.loss(heads[:, :1], masks), one)


def counted(logits, masks):
    confusion = torch.zeros(C, C, dtype=torch.float64)
    for x, mask in zip(logits, masks, strict=True):
        for row in range(H):
            for column in range(W):
                if mask[row, column] != 255:
                    confusion[int(mask[row, column]), int(x[:, row, column].argmax())] += 1
    return confusion


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6), st.data())
def test_statistics_add_up_wherever_the_images_are_cut(seed, batch, data):
    logits, masks = drawn(seed, batch)
    task = Segmentation(C)
    whole = task.statistics(logits, masks)
    assert torch.equal(whole[2:].view(C, C), counted(logits, masks))
    at = data.draw(st.integers(1, batch - 1))
    parts = task.statistics(logits[:at], masks[:at]) + task.statistics(logits[at:], masks[at:])
    torch.testing.assert_close(whole, parts, rtol=1e-13, atol=0)
    assert float(whole[0]) == batch


@pytest.mark.parametrize("hard", [0.0, 0.25])
def test_vmap_gives_what_a_loop_gives(hard):
    task = Segmentation(C, hard=hard)
    logits, masks = drawn(7, batch=6)
    logits, masks = logits.view(2, 3, C, H, W), masks.view(2, 3, H, W)
    for of in (task.loss, task.statistics):
        loop = torch.stack([of(x, m) for x, m in zip(logits, masks, strict=True)])
        torch.testing.assert_close(torch.vmap(of)(logits, masks), loop, rtol=1e-13, atol=0)


def test_metrics_of_three_classes_by_hand_one_of_which_does_not_occur():
    # truth in rows, answers in columns; class 2 is in no mask, and twice said
    confusion = torch.tensor([[6.0, 2.0, 2.0], [1.0, 3.0, 0.0], [0.0, 0.0, 0.0]])
    total = torch.cat([torch.tensor([4.0, 10.0]), confusion.flatten()]).double()
    metrics = Segmentation(3).metrics(total)
    assert metrics == {
        "miou": pytest.approx((6 / (10 + 7 - 6) + 3 / (4 + 5 - 3)) / 2),
        "accuracy": pytest.approx(9 / 14),
        "class_accuracy": pytest.approx((6 / 10 + 3 / 4) / 2),
        "loss": 2.5,
    }


def test_the_true_answer_has_an_miou_of_one_and_the_empty_one_a_tenth_of_it():
    scenes = load("digit-scenes", Path())
    masks = scenes.test_labels[:100]
    task = Segmentation(scenes.classes)
    truth = torch.where(masks == 255, 0, masks.long())
    perfect = F.one_hot(truth, 11).movedim(-1, 1).double()
    assert task.metrics(task.statistics(perfect, masks))["miou"] == 1
    empty = F.one_hot(torch.zeros_like(truth), 11).movedim(-1, 1).double()
    metrics = task.metrics(task.statistics(empty, masks))
    background = float((masks == 0).sum() / (masks != 255).sum())
    assert metrics["miou"] == pytest.approx(background / 11)
    assert metrics["accuracy"] == pytest.approx(background)


def test_labels_are_no_masks_and_masks_are_no_labels():
    scenes, digits = load("digit-scenes", Path()), load("digits", Path())
    Segmentation(11).check(scenes)
    with pytest.raises(UsageError, match=r"--task segmentation: digits has labels \(1442,\)"):
        Segmentation(11).check(digits)
    with pytest.raises(UsageError, match=r"--task classification: digit-scenes has masks"):
        Classification().check(scenes)
    with pytest.raises(ValueError, match="a part of the pixels"):
        Segmentation(11, hard=2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train_labels": 1}, r"train_labels are of \(15, 16\) for images of \(16, 16\)"),
        ({"train_labels": 11}, "train_labels must lie in 0..10, or be 255"),
        ({"test_labels": 255}, "test_labels are all 255, which is ignored"),
        ({"train_classes": -1}, "train_classes must be numbers from 0"),
        ({"test_classes": 1.0}, "test_classes must be int64, one an image"),
        ({"owners": torch.arange(2000) + 1}, "owners must be numbers from 0"),
        ({"owners": torch.arange(3)}, "owners must be int64, one a training image"),
    ],
)
def test_masks_classes_and_owners_that_cannot_be_are_named(change, said):
    scenes = load("digit-scenes", Path())
    ((name, to),) = change.items()
    before = getattr(scenes, name)
    if said.startswith("train_labels are of"):
        after = before[:, 1:]
    else:
        after = to if isinstance(to, torch.Tensor) else torch.full_like(before, to)
    after = after.float() if isinstance(to, float) else after
    with pytest.raises(UsageError, match=f"--dataset digit-scenes: {said}"):
        check(replace(scenes, **{name: after}))
