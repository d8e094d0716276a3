"""Classification: PyTorch's cross entropy, and statistics that add up."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fedsam.tasks.classification import Classification

TASK = Classification()


def test_the_mean_of_the_losses_is_pytorchs_cross_entropy_gradient_included():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(7, 5, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.arange(7) % 5
    losses = TASK.loss(logits, labels)
    assert losses.shape == (7,)
    (ours,) = torch.autograd.grad(losses.mean(), logits)
    # softmax minus one-hot, by hand
    expected = (logits.softmax(-1) - F.one_hot(labels, 5)) / 7
    torch.testing.assert_close(ours, expected.detach(), rtol=1e-12, atol=1e-15)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.data())
def test_statistics_do_not_depend_on_how_the_test_set_is_cut(size, data):
    cut = data.draw(st.integers(0, size))
    logits = torch.randn(size, 4, generator=torch.Generator().manual_seed(size))
    labels = torch.arange(size) % 4
    whole = TASK.statistics(logits, labels)
    parts = [TASK.statistics(logits[s], labels[s]) for s in (slice(cut), slice(cut, None))]
    torch.testing.assert_close(whole, parts[0] + parts[1], rtol=1e-12, atol=1e-12)
    pairs = zip(logits.tolist(), labels.tolist(), strict=True)
    right = sum(row.index(max(row)) == label for row, label in pairs)
    assert TASK.metrics(whole)["accuracy"] == right / size


def test_statistics_are_summed_in_float64():
    # in float32, a sum of 2^15 losses of log(1000) would be off in its 7th digit or before
    logits, labels = torch.zeros(1, 1000).expand(2**15, 1000), torch.zeros(2**15, dtype=torch.int64)
    one = float(TASK.loss(logits[:1], labels[:1]))
    total = TASK.statistics(logits, labels)
    assert total.dtype == torch.float64
    assert TASK.metrics(total)["loss"] == pytest.approx(one, rel=1e-14)
    assert one == pytest.approx(math.log(1000), rel=1e-6)
