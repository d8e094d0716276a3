"""Flat vectors, layouts and networks: what lies where, and gradients that are autograd's."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedsam.base.vector import Layout, norm, unit, weighted_mean
from fedsam.training.flat_module import FlatModule


class Odd(nn.Module):
    """Convolution, BatchNorm with its integer counter; a tied, a frozen and an unused weight."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.fc = nn.Linear(3 * 16, 4)
        self.tied = nn.Linear(4, 4)
        self.again = nn.Linear(4, 4, bias=False)
        self.again.weight = self.tied.weight
        self.frozen = nn.Parameter(torch.arange(4.0), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(5))

    def forward(self, x):
        x = self.fc(torch.relu(self.bn(self.conv(x))).flatten(1))
        return self.again(torch.relu(self.tied(x))) + self.frozen


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Odd()


def test_the_trainable_part_comes_first_and_shared_tensors_lie_once(module):
    layout = Layout.of(module)
    assert layout.trainable == sum(p.numel() for p in module.parameters() if p.requires_grad)
    carried = sum(b.numel() for b in module.buffers())
    assert layout.size == layout.trainable + carried
    offsets = {e.name: e.offset for e in layout.entries}
    assert offsets["tied.weight"] == offsets["again.weight"]
    assert list(offsets) == [name for name in module.state_dict() if name != "frozen"]
    assert list(layout.frozen) == ["frozen"]


def test_write_and_read_are_inverse_and_keep_dtypes(module):
    module.bn.num_batches_tracked.fill_(41)
    layout = Layout.of(module)
    state = layout.write(module.state_dict())
    back = layout.whole(state)
    for name, tensor in module.state_dict().items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)
    assert back["bn.num_batches_tracked"].dtype == torch.int64
    fresh = Odd()
    fresh.load_state_dict(back)


def test_averaged_integers_are_rounded_not_cut(module):
    layout = Layout.of(module)
    states = []
    for count in (1, 2, 2):
        module.bn.num_batches_tracked.fill_(count)
        states.append(layout.write(module.state_dict()))
    mean = layout.read(weighted_mean(states, [1, 1, 1]))["bn.num_batches_tracked"]
    assert mean == 2
    assert mean.dtype == torch.int64


def test_views_are_views_with_channels_last_convolutions(module):
    layout = Layout.of(module)
    state = layout.write(module.state_dict())
    views = layout.read(state)
    state.add_(1)
    assert torch.equal(views["conv.weight"], module.conv.weight.detach() + 1)
    assert views["conv.weight"].is_contiguous(memory_format=torch.channels_last)
    cohort = torch.stack([state, 2 * state])
    entry = layout.entries[0]
    assert torch.equal(entry.view(cohort)[1], 2 * entry.view(state))


def test_what_is_a_weight_is_decided_by_name(module):
    layout = Layout.of(module)
    for entry in layout.parameters:
        part = layout.weights[entry.offset : entry.offset + entry.size]
        assert part.all() if "weight" in entry.name else not part.any()
    assert layout.weights.shape == (layout.trainable,)


def test_a_weight_is_a_name_that_holds_weight_anywhere():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(2, 3)
            self.norm = nn.LayerNorm(3)
            self.cls_token = nn.Parameter(torch.ones(3))

    layout = Layout.of(Tokens())
    is_weight = {e.name: bool(layout.weights[e.offset]) for e in layout.parameters}
    assert {name for name, yes in is_weight.items() if yes} == {
        "lstm.weight_ih_l0",
        "lstm.weight_hh_l0",
        "norm.weight",
    }


def test_sums_by_tensor_and_spreading(module):
    layout = Layout.of(module)
    v = torch.randn(2, layout.trainable, dtype=torch.float64)
    sums = layout.sum_by_tensor(v)
    for column, entry in enumerate(layout.parameters):
        part = v[:, entry.offset : entry.offset + entry.size]
        torch.testing.assert_close(sums[:, column], part.sum(1))
        spread = layout.spread(sums)[:, entry.offset : entry.offset + entry.size]
        assert torch.equal(spread, sums[:, column : column + 1].expand_as(part))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.pop("fc.bias"), "'fc.bias'"),
        (lambda d: d.update(extra=torch.ones(1)), "'extra'"),
        (lambda d: d.update({"fc.bias": torch.ones(5)}), "'fc.bias' has shape"),
    ],
)
def test_another_models_tensors_are_refused(module, change, says):
    tensors = dict(module.state_dict())
    change(tensors)
    with pytest.raises(ValueError, match=says):
        Layout.of(module).write(tensors)


def test_a_model_without_parameters_is_refused():
    with pytest.raises(ValueError, match="no trainable parameter"):
        Layout.of(nn.ReLU())


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=5
    )
)
def test_any_stack_of_layers_survives_the_round_trip(shapes):
    layers = []
    for a, b, k in shapes:
        layers += [nn.Conv2d(a, b, k), nn.BatchNorm1d(b), nn.Linear(a, b, bias=k > 1)]
    module = nn.Sequential(*layers)
    layout = Layout.of(module)
    back = layout.whole(layout.write(module.state_dict()))
    assert all(torch.equal(back[n], t) for n, t in module.state_dict().items())
    covered = torch.zeros(layout.size)
    for entry in layout.entries:
        covered[entry.offset : entry.offset + entry.size] += 1
    assert covered.eq(1).all()


numbers = st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3)


@settings(max_examples=60, deadline=None)
@given(st.lists(numbers, min_size=1, max_size=6), st.data())
def test_the_weighted_mean_is_the_exact_one(rows, data):
    count = len(rows)
    weights = data.draw(st.lists(st.integers(1, 1000), min_size=count, max_size=count))
    vectors = torch.tensor(rows, dtype=torch.float64)
    before = vectors.clone()
    mean = weighted_mean(vectors, weights)
    exact = [
        math.fsum(w * r[i] for w, r in zip(weights, rows, strict=True)) / sum(weights)
        for i in range(3)
    ]
    np.testing.assert_allclose(mean, exact, rtol=1e-12, atol=1e-9)
    assert torch.equal(vectors, before)
    assert torch.equal(weighted_mean(list(vectors), weights), mean)


def test_norms_and_units_are_per_row_and_zero_stays_zero():
    v = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert norm(v).tolist() == [[5.0], [0.0]]
    torch.testing.assert_close(unit(v), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


def loss_of(y):
    return lambda output: nn.functional.cross_entropy(output, y)


X = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(1))
Y = torch.arange(6) % 4


def loss_at_x(network):
    return loss_of(Y)(network.forward(X))


def test_a_flat_modules_gradient_is_autograds_and_a_new_tensor_each_time(module):
    untouched = copy.deepcopy(module)
    network = FlatModule(module)
    layout = network.layout
    w = network.w.clone()
    loss, first = network.gradient(w, loss_at_x)
    expected = loss_of(Y)(untouched(X))
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for entry in layout.parameters:
        grad = dict(untouched.named_parameters(remove_duplicate=False))[entry.name].grad
        grad = torch.zeros(entry.shape) if grad is None else grad  # the unused one
        torch.testing.assert_close(entry.view(first), grad, rtol=1e-4, atol=1e-6)
    kept = first.clone()
    _, second = network.gradient(w + 1, loss_at_x)
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)


def test_a_flat_module_may_be_anything_before_it_is_loaded(module):
    network, other = FlatModule(copy.deepcopy(module)), FlatModule(copy.deepcopy(module))
    state = network.state.clone()
    other.state.fill_(3.0)
    other.load(state)
    _, a = network.gradient(state[: network.layout.trainable], loss_at_x)
    _, b = other.gradient(state[: network.layout.trainable], loss_at_x)
    assert torch.equal(a, b)


def test_batchnorm_statistics_travel_with_the_state(module):
    untouched = copy.deepcopy(module)
    network = FlatModule(module)
    network.load(network.state.clone())
    network.module.train()
    network.gradient(network.w.clone(), loss_at_x)
    untouched.train()(X)
    after = network.layout.whole(torch.cat([network.w, network.carried()]))
    for name in ("bn.running_mean", "bn.running_var", "bn.num_batches_tracked", "frozen"):
        torch.testing.assert_close(after[name], untouched.state_dict()[name])
    assert after["bn.num_batches_tracked"] == 1


def test_bf16_keeps_the_weights_and_the_gradient_in_fp32(module):
    fp32, bf16 = FlatModule(copy.deepcopy(module)), FlatModule(copy.deepcopy(module), bf16=True)
    _, a = fp32.gradient(fp32.w.clone(), loss_at_x)
    _, b = bf16.gradient(bf16.w.clone(), loss_at_x)
    assert b.dtype == torch.float32
    assert not torch.equal(a, b)
    assert float((a - b).norm() / a.norm()) < 0.02


def test_filter_normalisation_is_that_of_the_papers_code(module):
    """net_plotter.normalize_directions_for_weights(norm="filter", ignore="biasbn")."""
    layout = Layout.of(module.double())
    w, d = torch.randn(2, layout.trainable, dtype=torch.float64)
    found = layout.filter_normalised(d, w)
    for entry in layout.parameters:
        expected, weights = entry.view(d).clone(), entry.view(w)
        if expected.dim() <= 1:
            expected.zero_()
        for mine, theirs in zip(expected, weights, strict=True):
            mine.mul_(theirs.norm() / (mine.norm() + 1e-10))
        torch.testing.assert_close(entry.view(found), expected, rtol=1e-8, atol=1e-12)
    assert not layout.filter_normalised(d, torch.zeros_like(w)).any()
    assert not layout.filter_normalised(torch.zeros_like(d), w).any()
