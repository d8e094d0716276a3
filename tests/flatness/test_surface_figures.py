"""Pictures of surfaces: their levels, and that what is drawn is what was measured."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from worlds import network

from fedsam.flatness.figures import surface as surface_figures
from fedsam.flatness.measures.connectivity import connectivity
from fedsam.flatness.measures.plane import plane
from fedsam.flatness.measures.surface import surface, surface_line

PNG = b"\x89PNG"


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30))
def test_levels_grow_from_the_lowest_value_to_the_highest(values):
    steps = surface_figures.levels(np.array(values))
    assert (np.diff(steps) > 0).all()
    assert steps[0] == min(values)
    assert steps[-1] >= max(values)


def drawn(figure, path):
    figure.savefig(path / "figure.png", dpi=100)
    data = (path / "figure.png").read_bytes()
    assert data.startswith(PNG)
    assert int.from_bytes(data[16:20], "big") == 900  # pixels wide
    return figure.axes


def three():
    return [(f"model {name}", network(seed)) for seed, name in enumerate("abc")]


def through_json(result):
    return json.loads(json.dumps(result, allow_nan=False))


def test_lines_of_a_surface(tmp_path):
    found = through_json(surface_line(network(), directions=2, points=5))
    loss, error = drawn(surface_figures.draw_line(found), tmp_path)
    np.testing.assert_array_equal(loss.lines[1].get_ydata(), found["train_loss"][1])
    np.testing.assert_allclose(error.lines[5].get_ydata(), 100 * np.mean(found["test_error"], 0))


def test_a_surface_and_where_json_had_no_number(tmp_path):
    found = through_json(surface(network(), points=5))
    found["train_loss"][0][0] = None
    axes = drawn(surface_figures.draw_surface(found, "mine"), tmp_path)
    assert [a.get_title() for a in axes[:2]] == ["train loss (nats)", "test error (%)"]
    found["train_loss"] = [[None] * 5] * 5  # of a model that diverged
    drawn(surface_figures.draw_surface(found), tmp_path)


def test_a_plane_marks_its_models(tmp_path):
    found = through_json(plane(three(), points=4))
    loss, *_ = drawn(surface_figures.draw_plane(found), tmp_path)
    places = [(line.get_xdata()[0], line.get_ydata()[0]) for line in loss.lines]
    assert places == [(model["x"], model["y"]) for model in found["models"]]
    labels = loss.get_legend_handles_labels()[1]
    assert labels[3] == f"mean: {found['models'][3]['train_loss']:.3g}"


def test_lines_between_models(tmp_path):
    found = through_json(connectivity(three(), points=3))
    loss, error = drawn(surface_figures.draw_connectivity(found), tmp_path)
    assert len(loss.lines) == len(error.lines) == 6
    np.testing.assert_array_equal(loss.lines[2].get_ydata(), found["pairs"][1]["test_loss"])
    assert loss.get_legend_handles_labels()[1][2] == "model b to model c"


@pytest.mark.parametrize("clients", [1, 3, 12])
def test_a_cohort(tmp_path, clients):
    row = {"own_loss_before": 2.0, "own_loss_after": 1.0, "test_loss": 3.0}
    table = [{"client": 7 * k, "images": 9, **row} for k in range(clients)]
    cosines = np.eye(clients).tolist()
    found = {"clients": table, "cosines": cosines, "scalars": {"test_loss": 1.5}}
    alike, losses, _ = drawn(surface_figures.draw_cohort(found), tmp_path)
    assert [text.get_text() for text in alike.get_xticklabels()] == [
        str(7 * k) for k in range(clients)
    ]
    shown = [float(line.get_ydata()[-1]) for line in losses.lines]
    assert shown == [2.0, 1.0, 3.0, 1.5]
