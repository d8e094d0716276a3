"""The plane of three models: its coordinates are exact, its values those of plain PyTorch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import by_hand, formula, network

from fedsam.base.errors import UsageError
from fedsam.flatness.measures.plane import Plane, plane

COORDINATES = st.floats(-3, 3)


def three():
    return [(name, network(seed)) for seed, name in enumerate("abc")]


def flat_of(subjects):
    trainable = subjects[0][1].network.layout.trainable
    return Plane.through([one.state for _, one in subjects], trainable)


@settings(deadline=None, max_examples=30)
@given(x=COORDINATES, y=COORDINATES)
def test_a_point_is_the_formula_of_garipov(x, y):
    subjects = three()
    w1, w2, w3 = (one.w for _, one in subjects)
    u = w2 - w1
    v = (w3 - w1) - ((w3 - w1) @ u) / (u @ u) * u
    expected = w1 + x * u / u.norm() + y * v / v.norm()
    found = flat_of(subjects).at(x, y)
    torch.testing.assert_close(found[: len(w1)], expected, rtol=0, atol=1e-12)
    assert (found[len(w1) :] >= 0).all()  # a variance stays one


def test_the_models_lie_at_their_coordinates_at_their_distances():
    subjects = three()
    flat = flat_of(subjects)
    corners = torch.tensor(flat.corners, dtype=torch.float64)
    for (x, y), (_, one) in zip(flat.corners, subjects, strict=True):
        torch.testing.assert_close(flat.at(x, y), one.state, rtol=1e-12, atol=1e-12)
    for i in range(3):
        for j in range(3):
            apart = (subjects[i][1].w - subjects[j][1].w).norm()
            torch.testing.assert_close((corners[i] - corners[j]).norm(), apart)


def test_values_are_those_of_the_models_and_of_the_points():
    subjects = three()
    before = [one.state.clone() for _, one in subjects]
    found = plane(subjects, points=3, margin=0.5, images=0)
    first = subjects[0][1]
    states = [*before, torch.stack(before).mean(0)]  # statistics are averaged, too
    for state, model in zip(states, found["models"], strict=True):
        for on in ("train", "test"):
            loss, error = by_hand(first, state, on)
            assert model[f"{on}_loss"] == pytest.approx(loss, rel=1e-10)
            assert model[f"{on}_error"] == pytest.approx(error, abs=1e-10)
    assert [model["name"] for model in found["models"]] == ["a", "b", "c", "mean"]
    flat = flat_of(subjects)
    for i, y in enumerate(found["y"]):
        for j, x in enumerate(found["x"]):
            loss, _ = by_hand(first, flat.at(x, y))
            assert found["train_loss"][i][j] == pytest.approx(loss, rel=1e-10)
    losses = [model["test_loss"] for model in found["models"]]
    assert found["scalars"]["test_loss_gap"] == pytest.approx(losses[3] - sum(losses[:3]) / 3)
    assert found["settings"]["images"] == {"train": 24, "test": 18}
    assert all(torch.equal(one.state, old) for (_, one), old in zip(subjects, before, strict=True))


def test_the_grid_is_a_square_with_its_margin():
    corners = [[0.0, 0.0], [4.0, 0.0], [1.0, 2.0]]
    subjects = list(zip("abc", formula(lambda w: w.square().sum(-1), *corners), strict=True))
    found = plane(subjects, points=5, margin=0.25)
    assert found["x"] == pytest.approx([-1, 0.5, 2, 3.5, 5])
    assert found["y"] == pytest.approx([-2, -0.5, 1, 2.5, 4])
    # the loss is |w|^2, and the plane's coordinates are those of w
    assert found["train_loss"][4][0] == pytest.approx(1 + 16)
    assert found["scalars"]["train_loss"] == pytest.approx((5 / 3) ** 2 + (2 / 3) ** 2)
    assert found["scalars"]["train_loss_gap"] < 0  # convex


def test_progress_counts_every_model():
    said = []
    plane(three(), points=2, images=3, tick=lambda *done: said.append(done))
    assert said == [(n, 8) for n in range(1, 9)]


def test_what_spans_no_plane_is_refused():
    one, two, three_ = formula(lambda w: w.sum(-1), [0.0, 0.0], [1.0, 1.0], [3.0, 3.0])
    with pytest.raises(UsageError, match="on one line"):
        plane([("a", one), ("b", two), ("c", three_)])
    with pytest.raises(UsageError, match="are the same"):
        plane([("a", one), ("b", one), ("c", two)])
    with pytest.raises(UsageError, match="3 models, got 2"):
        plane([("a", one), ("b", two)])
    with pytest.raises(UsageError, match=r"^c: another network than that of a"):
        plane([("a", one), ("b", two), ("c", network())])
    with pytest.raises(UsageError, match=r"^points: "):
        plane(three(), points=1)
