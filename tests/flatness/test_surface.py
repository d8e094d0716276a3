"""Surfaces: against plain PyTorch in float64, and what filter normalisation leaves the same."""

from dataclasses import replace

import pytest
import torch
from worlds import by_hand, formula, network

from fedsam.base.errors import UsageError
from fedsam.flatness.measures.landscape import Limited, evaluate, samples
from fedsam.flatness.measures.surface import direction, offsets, surface, surface_line


def test_a_directions_filters_are_as_long_as_the_models_and_no_two_are_the_same():
    made = network()
    found, other = direction(made, 0), direction(made, 1)
    for entry in made.network.layout.parameters:
        d, w = entry.view(found), entry.view(made.w)
        if d.dim() < 2:
            assert not d.any(), entry.name
        else:
            torch.testing.assert_close(d.flatten(1).norm(dim=1), w.flatten(1).norm(dim=1))
    assert torch.equal(direction(made, 0), found)
    assert abs(torch.nn.functional.cosine_similarity(found, other, dim=0)) < 0.9
    assert not torch.equal(direction(replace(made, seed=8), 0), found)


def test_every_point_of_a_surface_is_the_loss_there():
    made = network()
    found = surface(made, points=3, reach=0.7, images=10)
    rows = samples(made, 10)
    d, e = direction(made, 0), direction(made, 1)
    carried = made.state[len(made.w) :]
    for i, y in enumerate((-0.7, 0.0, 0.7)):
        for j, x in enumerate((-0.7, 0.0, 0.7)):
            state = torch.cat([made.w + x * d + y * e, carried])
            for on in ("train", "test"):
                loss, error = by_hand(made, state, on, rows[on])
                assert found[f"{on}_loss"][i][j] == pytest.approx(loss, rel=1e-12)
                assert found[f"{on}_error"][i][j] == pytest.approx(error, abs=1e-12)
    every = torch.tensor(found["test_loss"], dtype=torch.float64)
    own = by_hand(made, made.state, "test", rows["test"])[0]
    assert found["scalars"]["test_loss"] == pytest.approx(own, rel=1e-12)
    assert found["scalars"]["test_loss_rise"] == pytest.approx(every.mean().item() - own)
    assert found["settings"]["images"] == {"train": 10, "test": 10}


def test_lines_lie_in_the_surface_and_nothing_is_changed():
    made = network()
    before = made.state.clone()
    lines = surface_line(made, directions=2, points=5, images=24)
    square = surface(made, points=5, images=24)
    assert torch.equal(made.state, before)
    assert lines["train_loss"][0] == pytest.approx(square["train_loss"][2], rel=1e-12)
    column = [row[2] for row in square["train_loss"]]
    assert lines["train_loss"][1] == pytest.approx(column, rel=1e-12)


@pytest.mark.parametrize("factor", [0.1, 30.0])
def test_scales_that_leave_a_relu_network_the_same_leave_its_surface_the_same(factor):
    made = network(norm=False)
    layout = made.network.layout
    other = made.state.clone()
    for entry in layout.entries:
        if entry.name != "fc.bias":
            entry.view(other).mul_(factor if entry.name.startswith("conv") else 1 / factor)
    same = surface(made.with_state(other), points=5, images=24)
    found = surface(made, points=5, images=24)
    for mine, theirs in zip(found["train_loss"], same["train_loss"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-10)
    assert found["scalars"]["train_loss_rise"] > 1e-3  # the surface is not flat


def test_a_parabola_along_a_line():
    """A model of vectors alone has no filters: its surface is flat; so are its rises."""
    (made,) = formula(lambda w: w.square().sum(-1), [1.0, 2.0])
    found = surface_line(made, directions=1, points=3)
    assert found["train_loss"] == [[5.0, 5.0, 5.0]]
    assert found["scalars"]["train_loss_rise"] == 0.0
    assert found["scalars"]["test_error"] == 0.75


@pytest.mark.parametrize("given", [{"points": 4}, {"points": 1}, {"reach": 0.0}, {"images": -1}])
def test_wrong_numbers_are_named(given):
    (name,) = given
    with pytest.raises(UsageError, match=rf"^(--)?{name}( -1)?: must be"):
        surface(network(), **given)
    with pytest.raises(UsageError, match=rf"^(--)?{name}( -1)?: must be"):
        surface_line(network(), **given)


def test_steps_go_through_zero():
    for points in (3, 7, 21, 51):
        t = offsets(points, 0.3)
        assert t[points // 2] == 0.0
        assert (t[0], t[-1]) == (-0.3, 0.3)


def test_progress_is_told_and_time_is_bounded():
    said = []
    surface(network(), points=3, images=5, tick=lambda *done: said.append(done))
    assert said == [(n, 9) for n in range(1, 10)]
    times = iter([0.0, 9.0, 10.0, 12.0])  # made, then after each point
    limited = Limited(20.0, lambda *done: said.append(done), clock=lambda: next(times))
    with pytest.raises(UsageError, match="9 points take about 21 s, and may take 20 s"):
        surface(network(), points=3, images=5, tick=limited)
    assert said[9:] == [(1, 9), (2, 9), (3, 9)]


def test_states_are_taken_one_at_a_time():
    made, order = network(), []

    def states():
        for number in range(3):
            order.append(f"made {number}")
            yield made.state

    evaluate(made, states(), 3, samples(made, 5), lambda done, _: order.append(f"done {done - 1}"))
    assert order == [f"{what} {n}" for n in range(3) for what in ("made", "done")]
