"""Segmentation: losses and confusion against naive float64 loops; sums, vmap, what is refused."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import confusion_of, hardest_mean, iou_of
from torch.nn import functional as F

from fedsam.base.errors import UsageError
from fedsam.config.plugins import build, find
from fedsam.data.datasets import Dataset
from fedsam.data.datasets import check as check_dataset
from fedsam.data.sources.load import load
from fedsam.tasks import Task, check, headline_of
from fedsam.tasks.segmentation import Segmentation

C = 4


def sample(images=5, side=6, classes=C, ignored=0.2, heads=0, seed=0):
    """Return logits in float64 and uint8 masks, a share of whose pixels is 255."""
    generator = torch.Generator().manual_seed(seed)
    shape = (images, *([heads] if heads else []), classes, side, side)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64)
    masks = torch.randint(0, classes, (images, side, side), generator=generator)
    drawn = torch.rand(masks.shape, generator=generator)
    return logits, torch.where(drawn < ignored, 255, masks).to(torch.uint8)


def naive_losses(logits, masks):
    """The cross entropy of each pixel, by hand: a list an image, 0 where it is ignored."""
    out = []
    for image, mask in zip(logits, masks, strict=True):
        pixels = []
        for row in range(mask.shape[0]):
            for column in range(mask.shape[1]):
                truth, z = int(mask[row, column]), image[:, row, column].tolist()
                total = math.log(sum(math.exp(value) for value in z))
                pixels.append(0.0 if truth == 255 else total - z[truth])
        out.append(pixels)
    return out


def test_the_loss_is_the_mean_over_valid_pixels_and_pytorchs_gradient_included():
    logits, masks = sample(images=1)
    logits.requires_grad_()
    ours = Segmentation(C).loss(logits, masks)
    theirs = F.cross_entropy(logits, masks.long(), ignore_index=255)
    torch.testing.assert_close(ours[0], theirs, rtol=1e-14, atol=0)
    gradients = [torch.autograd.grad(loss.sum(), logits)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)
    logits, masks = sample()
    naive = naive_losses(logits, masks)
    valid = (masks != 255).flatten(1).sum(1).tolist()
    expected = [sum(pixels) / n for pixels, n in zip(naive, valid, strict=True)]
    assert Segmentation(C).loss(logits, masks).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("hard", [0.01, 0.25, 0.5, 1.0])
def test_the_hardest_pixels_are_those_of_a_sort(hard):
    logits, masks = sample()
    expected = [hardest_mean(pixels, hard) for pixels in naive_losses(logits, masks)]
    losses = Segmentation(C, hard=hard).loss(logits, masks)
    assert losses.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("hard", [0.0, 0.25])
def test_an_image_that_is_all_ignored_has_loss_and_gradient_zero(hard):
    logits, masks = sample()
    masks[2] = 255
    logits.requires_grad_()
    losses = Segmentation(C, hard=hard).loss(logits, masks)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert losses[2] == 0
    assert not gradient[2].any()
    assert gradient[0].any()
    assert gradient.isfinite().all()


def test_auxiliary_heads_are_added_and_the_main_one_answers():
    logits, masks = sample(heads=3)
    task, plain = Segmentation(C, aux=0.4), Segmentation(C)
    main, second, third = (plain.loss(logits[:, head], masks) for head in range(3))
    torch.testing.assert_close(task.loss(logits, masks), main + 0.4 * (second + third))
    found, alone = task.statistics(logits, masks), task.statistics(logits[:, 0], masks)
    assert torch.equal(found[2:], alone[2:])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(2, 6), st.integers(0, 1000), st.data())
def test_confusion_is_that_of_a_loop_and_adds_up_wherever_it_is_cut(images, classes, seed, data):
    logits, masks = sample(images, side=3, classes=classes, seed=seed)
    cut = data.draw(st.integers(0, images))
    task = Segmentation(classes)
    whole = task.statistics(logits, masks)
    parts = [task.statistics(logits[s], masks[s]) for s in (slice(cut), slice(cut, None))]
    torch.testing.assert_close(whole, parts[0] + parts[1], rtol=1e-12, atol=1e-12)
    assert whole.dtype == torch.float64
    answers = logits.argmax(1).flatten().tolist()
    naive = confusion_of(masks.flatten().tolist(), answers, classes, 255)
    assert whole[2:].view(classes, classes).tolist() == naive


def test_mapped_over_images_the_statistics_are_those_of_a_loop():
    logits, masks = sample()
    for task in (Segmentation(C), Segmentation(C, hard=0.25)):
        mapped = torch.vmap(task.statistics)(logits[:, None], masks[:, None])
        each = [task.statistics(logits[i : i + 1], masks[i : i + 1]) for i in range(len(masks))]
        torch.testing.assert_close(mapped, torch.stack(each), rtol=1e-12, atol=1e-12)
        losses = torch.vmap(task.loss)(logits[:, None], masks[:, None])[:, 0]
        torch.testing.assert_close(losses, task.loss(logits, masks), rtol=1e-12, atol=0)


def test_the_mean_iou_of_a_case_by_hand_with_a_class_that_the_masks_do_not_hold():
    # truth 0 0 1 1, one ignored; answers 0 2 1 1: class 2 is answered and never true
    answers = torch.tensor([[[0, 2, 1, 1, 0]]])
    logits = F.one_hot(answers, 3).permute(0, 3, 1, 2).double()
    masks = torch.tensor([[[0, 0, 1, 1, 255]]], dtype=torch.uint8)
    task = Segmentation(3)
    found = task.metrics(task.statistics(logits, masks))
    assert found["iou"][:2] == [0.5, 1.0]
    assert math.isnan(found["iou"][2])
    assert found["miou"] == 0.75
    assert found["accuracy"] == 0.75
    assert found["class_accuracy"] == 0.75
    assert headline_of(task) == "miou"


def test_the_mean_iou_is_feddrives():
    logits, masks = sample(images=8)
    masks[masks == 3] = 2  # the last class is nowhere in the truth
    task = Segmentation(C)
    found = task.metrics(task.statistics(logits, masks))
    confusion = confusion_of(masks.flatten().tolist(), logits.argmax(1).flatten().tolist(), C, 255)
    # theirs adds 1e-6 to each union
    assert found["miou"] == pytest.approx(iou_of(confusion, 1e-6), rel=1e-6)


def test_no_valid_pixel_at_all_is_not_a_number_and_no_error():
    logits, masks = sample()
    task = Segmentation(C)
    found = task.metrics(task.statistics(logits, torch.full_like(masks, 255)))
    assert math.isnan(found["miou"])
    assert found["loss"] == 0


def with_targets(targets, test=None, ignore=255):
    images = torch.zeros(len(targets), 1, 6, 6, dtype=torch.uint8)
    other = targets if test is None else test
    return Dataset("scenes", images, targets, images, other, C, (0.5,), (0.5,), ignore=ignore)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), "scenes has labels, not masks"),
        (torch.full((3, 6, 6), 9, dtype=torch.uint8), r"holds 9; the classes are 0\.\.3, 255 is"),
        (torch.full((3, 6, 6), 255, dtype=torch.uint8), "all pixels of scenes for testing are 255"),
    ],
)
def test_targets_that_do_not_fit_are_one_line(targets, message):
    masks = sample(3)[1]
    check(Segmentation(C), with_targets(masks))
    with pytest.raises(UsageError, match=f"--task segmentation: .*{message}"):
        check(Segmentation(C), with_targets(masks, targets))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"hard": 1.5}, "hard: must be a share"), ({"aux": -1}, "aux: must be a weight")],
)
def test_wrong_options_are_one_line(options, message):
    make = find("task", "segmentation", "fedsam.tasks", Task)
    assert build("task", make, {"hard": 0.25}, {"classes": 7, "ignore": 11}).ignore == 11
    with pytest.raises(UsageError, match=f"--task-options: Segmentation: {message}"):
        build("task", make, options, {"classes": 7})


def test_the_true_answer_has_an_miou_of_one_and_the_empty_one_a_part_of_a_tenth():
    scenes = load("digit-scenes", Path())
    masks, task = scenes.test_labels[:100], Segmentation(scenes.classes)
    truth = torch.where(masks == 255, 0, masks.long())
    perfect = F.one_hot(truth, 11).movedim(-1, 1).double()
    assert torch.equal(task.answer(perfect), truth)
    assert task.metrics(task.statistics(perfect, masks))["miou"] == 1
    empty = F.one_hot(torch.zeros_like(truth), 11).movedim(-1, 1).double()
    metrics = task.metrics(task.statistics(empty, masks))
    background = float((masks == 0).sum() / (masks != 255).sum())
    assert metrics["miou"] == pytest.approx(background / 11)
    assert metrics["accuracy"] == pytest.approx(background)


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
    after = getattr(scenes, name)
    if said.startswith("train_labels are of"):
        after = after[:, 1:]
    elif isinstance(to, torch.Tensor):
        after = to
    else:
        after = torch.full_like(after, to, dtype=torch.float32 if to == 1.0 else after.dtype)
    with pytest.raises(UsageError, match=f"--dataset digit-scenes: {said}"):
        check_dataset(replace(scenes, **{name: after}))
