"""Flat modules: exact gradients, and nothing of one client left over for the next."""

import copy

import pytest
import torch
from torch import nn

from fedsam.training.flat_module import FlatModule

X = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.arange(6) % 3


@pytest.fixture
def module():
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)]
    return nn.Sequential(*layers).double()


def loss(output):
    return nn.functional.cross_entropy(output, Y)


def mean_loss(network):
    return loss(network.forward(X))


def test_gradients_are_autograds_to_rounding(module):
    untouched = copy.deepcopy(module)
    network = FlatModule(module)
    value, g = network.gradient(network.w.clone(), mean_loss)
    expected = loss(untouched(X))
    expected.backward()
    torch.testing.assert_close(value, expected.detach(), rtol=1e-14, atol=0)
    for entry in network.layout.parameters:
        grad = untouched.get_parameter(entry.name).grad
        torch.testing.assert_close(entry.view(g), grad, rtol=1e-11, atol=1e-15)


def test_the_gradient_is_taken_at_the_w_that_is_given(module):
    untouched = copy.deepcopy(module)
    network = FlatModule(module)
    w = network.w * 1.5 + 0.1
    _, g = network.gradient(w, mean_loss)
    with torch.no_grad():
        for parameter in untouched.parameters():
            parameter.mul_(1.5).add_(0.1)
    loss(untouched(X)).backward()
    for entry in network.layout.parameters:
        grad = untouched.get_parameter(entry.name).grad
        torch.testing.assert_close(entry.view(g), grad, rtol=1e-11, atol=1e-14)


def test_a_pass_leaves_no_gradient_in_the_module_and_no_mark_on_w(module):
    network = FlatModule(module)
    w = network.w.clone() + 1
    before = w.clone()
    first = network.gradient(w, mean_loss)[1]
    second = network.gradient(w, mean_loss)[1]
    assert torch.equal(first, second)  # accumulated, it would be twice the first
    assert torch.equal(w, before)
    assert not first.requires_grad
    assert all(p.grad is None for p in module.parameters())


def test_loading_sets_floats_and_integers_alike(module):
    network = FlatModule(module)
    module[1].num_batches_tracked.fill_(5)
    start = torch.cat([network.w, network.carried()])
    for _ in range(2):
        network.gradient(network.w + 1, mean_loss)
    assert module[1].num_batches_tracked == 7
    network.load(start)
    assert module[1].num_batches_tracked == 5
    assert torch.equal(torch.cat([network.w, network.carried()]), start)


def test_what_is_carried_is_a_copy(module):
    network = FlatModule(module)
    carried = network.carried()
    before = carried.clone()
    network.gradient(network.w.clone(), mean_loss)
    assert torch.equal(carried, before)
    assert not torch.equal(network.carried(), before)


def test_evaluation_changes_no_statistics(module):
    network = FlatModule(module)
    before = network.carried()
    network.module.eval()
    network.forward(X)
    assert torch.equal(network.carried(), before)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_output_has_ws_dtype(bf16):
    network = FlatModule(nn.Linear(4, 3), bf16=bf16)
    assert network.forward(torch.ones(2, 4)).dtype == torch.float32


def test_convolutions_compute_in_channels_last_out_of_the_vector_itself(module):
    network = FlatModule(module)
    weight = module[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    network.state.add_(1)
    assert weight.untyped_storage().data_ptr() == network.state.untyped_storage().data_ptr()
