"""Quantised weights: against PyTorch's fake quantisation, and by hand."""

import little
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsam.base.errors import UsageError
from fedsam.flatness.measures.quantisation import (
    quantisation,
    quantised,
    quantised_weights,
)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(6, 3, 5, 5), (10, 16)])
def test_it_is_pytorchs_fake_quantisation(bits, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(bits)) / 7
    q = 2 ** (bits - 1) - 1
    one = float(weight.abs().max()) / q
    theirs = torch.fake_quantize_per_tensor_affine(weight, one, 0, -q, q)
    torch.testing.assert_close(quantised(weight, bits, by_channel=False), theirs)
    scales = weight.flatten(1).abs().amax(1) / q
    zeros = torch.zeros(shape[0], dtype=torch.int32)
    theirs = torch.fake_quantize_per_channel_affine(weight, scales, zeros, 0, -q, q)
    torch.testing.assert_close(quantised(weight, bits, by_channel=True), theirs)


def test_by_hand_with_a_row_of_zeros():
    weight = torch.tensor([[7.0, -3.4, 0.5], [0.0, 0.0, 0.0], [0.7, 0.26, -0.34]])
    rounded = quantised(weight, 4, by_channel=True)
    expected = torch.tensor([[7.0, -3.0, 0.0], [0.0, 0.0, 0.0], [0.7, 0.3, -0.3]])
    torch.testing.assert_close(rounded, expected)
    coarse = torch.tensor([[7.0, -3.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(quantised(weight, 4, by_channel=False), coarse)


@given(st.integers(2, 16), st.integers(0, 10**6), st.booleans(), st.floats(1e-6, 1e6))
def test_error_is_half_a_step_and_doing_it_twice_changes_nothing(bits, seed, by_channel, size):
    generator = torch.Generator().manual_seed(seed)
    weight = size * torch.randn(4, 9, generator=generator, dtype=torch.float64)
    rounded = quantised(weight, bits, by_channel=by_channel)
    peak = weight.abs().amax(1, keepdim=True) if by_channel else weight.abs().max()
    step = peak / (2 ** (bits - 1) - 1)
    assert bool(((rounded - weight).abs() <= step / 2 * (1 + 1e-9)).all())
    assert len(rounded[0].unique()) <= 2**bits - 1
    again = quantised(rounded, bits, by_channel=by_channel)
    torch.testing.assert_close(again, rounded, rtol=1e-12, atol=0)


def test_only_the_weights_of_layers_change_and_the_accuracy_is_theirs():
    subject = little.subject()
    w = quantised_weights(subject.network.layout, subject.w, 4, by_channel=True)
    for entry in subject.network.layout.parameters:
        same = torch.equal(entry.view(w), entry.view(subject.w))
        assert same == (entry.name not in ("conv.weight", "fc.weight")), entry.name
    found = quantisation(subject, bits=(3, 2))
    for bits in (3, 2):
        for scales in ("tensor", "channel"):
            module = little.module_of(subject)
            for layer in (module.conv, module.fc):
                by_channel = scales == "channel"
                layer.weight.data = quantised(layer.weight.data, bits, by_channel=by_channel)
            expected = little.naive_accuracy(module, subject.test)
            assert found["scalars"][f"accuracy_int{bits}_{scales}"] == expected
    errors = found["rounding"]
    assert errors["int3_channel"] < errors["int3_tensor"] < errors["int2_tensor"]


def test_bits_are_checked():
    with pytest.raises(UsageError, match=r"2\.\.16"):
        quantisation(little.subject(), bits=(1,))
