"""The line between two models: barriers that are known in closed form, and plain PyTorch."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import Net, by_hand, formula, network, pictures

from fedsam.base.errors import UsageError
from fedsam.base.randomness import torch_generator
from fedsam.flatness.measures.connectivity import barrier, connectivity


def test_the_barrier_of_a_tilted_double_well():
    """f = (x^2 - 1)^2 + c x + y^2 lies (x^2 - 1)^2 above the line between (-1, 0) and (1, 0)."""

    def f(w):
        x, y = w.unbind(-1)
        return (x.square() - 1).square() + 0.3 * x + y.square()

    left, right = formula(f, [-1.0, 0.0], [1.0, 0.0])
    found = connectivity([("left", left), ("right", right)], points=5)
    (pair,) = found["pairs"]
    assert found["t"] == [0, 0.25, 0.5, 0.75, 1]
    assert pair["train_loss"] == pytest.approx([-0.3, 0.5625 - 0.15, 1, 0.5625 + 0.15, 0.3])
    assert pair["train_loss_barrier"] == pytest.approx(1.0)
    assert pair["distance"] == 2.0
    assert pair["models"] == ["left", "right"]
    assert pair["test_error_barrier"] == 0.0


@settings(deadline=None)  # each models two sets of images: on a busy machine that may take long
@given(st.lists(st.floats(-10, 10), min_size=4, max_size=4), st.floats(0, 5))
def test_a_convex_loss_has_no_barrier(ends, curvature):
    f = lambda w: curvature * w.square().sum(-1) - w[..., 0]  # noqa: E731
    made = formula(f, ends[:2], ends[2:])
    found = connectivity(list(zip("ab", made, strict=True)), points=4, images=2)
    assert found["scalars"]["train_loss_barrier"] == pytest.approx(0, abs=1e-9)


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=9), st.floats(-5, 5), st.floats(-5, 5))
def test_a_barrier_is_never_negative_and_does_not_see_a_slope(values, slope, level):
    t = [i / (len(values) - 1) for i in range(len(values))]
    tilted = [value + slope * s + level for s, value in zip(t, values, strict=True)]
    assert barrier(t, values) >= 0
    assert barrier(t, tilted) == pytest.approx(barrier(t, values), abs=1e-9)
    assert barrier(t, values[::-1]) == pytest.approx(barrier(t, values), abs=1e-9)


def test_all_pairs_against_plain_pytorch():
    subjects = [(name, network(seed)) for seed, name in enumerate("abc")]
    before = [one.state.clone() for _, one in subjects]
    found = connectivity(subjects, points=3, images=100)
    assert [pair["models"] for pair in found["pairs"]] == [["a", "b"], ["a", "c"], ["b", "c"]]
    heights = []
    for pair, (i, j) in zip(found["pairs"], ((0, 1), (0, 2), (1, 2)), strict=True):
        line = [before[i], (before[i] + before[j]) / 2, before[j]]
        values = [by_hand(subjects[0][1], state, "test") for state in line]
        assert pair["test_loss"] == pytest.approx([loss for loss, _ in values], rel=1e-10)
        assert pair["test_error"] == pytest.approx([error for _, error in values], abs=1e-10)
        (a, _), (m, _), (b, _) = values
        heights.append(max(0, m - (a + b) / 2))
    assert [pair["test_loss_barrier"] for pair in found["pairs"]] == pytest.approx(heights)
    assert found["scalars"]["test_loss_barrier"] == pytest.approx(sum(heights) / 3)
    assert found["scalars"]["test_loss_barrier_max"] == pytest.approx(max(heights))
    assert max(heights) > 0
    assert all(torch.equal(one.state, old) for (_, one), old in zip(subjects, before, strict=True))


def test_what_cannot_be_compared_is_refused():
    one, two = network(0), network(1)
    with pytest.raises(UsageError, match="two models or more, got 1"):
        connectivity([("a", one)])
    with pytest.raises(UsageError, match=r"^b: another network than that of a"):
        connectivity([("a", one), ("b", network(norm=False))])
    with pytest.raises(UsageError, match=r"^b: other data than those of a"):
        connectivity([("a", one), ("b", replace(two, train=pictures(23)))])
    with pytest.raises(UsageError, match=r"^points: "):
        connectivity([("a", one), ("b", two)], points=2)


def renewed_by_hand(made, state, count):
    """Return loss and error with BatchNorm's statistics of the first rows of a keyed order."""
    order = torch.randperm(24, generator=torch_generator(made.seed, "measure bn"))
    net = Net().double()
    net.load_state_dict(made.network.layout.read(state))
    pixels = made.train.rows(order[:count]).images
    with torch.no_grad():
        maps = net.conv(pixels)
        net.norm.running_mean.copy_(maps.mean((0, 2, 3)))
        net.norm.running_var.copy_(maps.var((0, 2, 3)))
    return by_hand(made, made.network.layout.write(net.state_dict()))


def test_batchnorm_may_be_computed_anew_at_each_point():
    one, two = network(0), network(1)
    found = connectivity([("a", one), ("b", two)], points=3, images=0, update_bn=20)
    (pair,) = found["pairs"]
    line = [one.state, (one.state + two.state) / 2, two.state]
    expected = [renewed_by_hand(one, state, 20)[0] for state in line]
    assert pair["train_loss"] == pytest.approx(expected, rel=1e-9)
    kept = connectivity([("a", one), ("b", two)], points=3, images=0)["pairs"][0]
    assert pair["train_loss"] != pytest.approx(kept["train_loss"], rel=1e-3)
    assert found["settings"]["update_bn"] == 20
    plain = network(norm=False)
    with pytest.raises(UsageError, match="--update-bn 20: the model has no BatchNorm"):
        connectivity([("a", plain), ("b", plain)], points=3, update_bn=20)
    with pytest.raises(UsageError, match="--update-bn -1"):
        connectivity([("a", one), ("b", two)], points=3, update_bn=-1)
