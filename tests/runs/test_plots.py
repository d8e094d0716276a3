"""The pictures of a run: every value in its place, and none so odd that nothing is drawn."""

import warnings

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from fedsam.data.partition import heterogeneity
from fedsam.runs import plots

NAN = None  # what metrics.jsonl has in place of what is not finite


def lines_of(accuracies, losses, train_losses):
    rounds = enumerate(zip(accuracies, losses, train_losses, strict=True))
    lines = [{"round": r, "accuracy": a, "loss": b, "train_loss": c} for r, (a, b, c) in rounds]
    return [{key: value for key, value in line.items() if value != "-"} for line in lines]


LINES = {
    "nothing yet": [],
    "round 0": lines_of([0.1], [2.3], ["-"]),
    "evaluated every other round": lines_of([0.1, "-", 0.9], [2.3, "-", 0.4], ["-", 2.0, 1.0]),
    "overflown": lines_of([0.1, 0.1, 0.1], [2.3, 1e30, NAN], ["-", 1e38, NAN]),
    "all overflown": lines_of([NAN, NAN], [NAN, NAN], ["-", NAN]),
}
COUNTS = {
    "one image": torch.ones(1, 1, dtype=torch.int64),
    "a client without images": torch.tensor([[0, 0, 0], [5, 0, 1]]),
    "more clients than are shown": torch.arange(150)[:, None].expand(150, 2),
    "a hundred classes": torch.eye(100, dtype=torch.int64)[:3] * 500,
}


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def is_drawn(path):
    with Image.open(path) as image:
        return len(image.convert("L").getcolors()) > 20


@pytest.mark.parametrize("name", LINES)
def test_curves_are_the_values_of_their_rounds(tmp_path, name):
    lines = LINES[name]
    plots.draw_curves(lines, tmp_path / "curves.png")
    assert is_drawn(tmp_path / "curves.png")
    left, right = plots.curves_of(lines).axes
    drawn = [left.lines[0], right.lines[1], right.lines[0]]
    for key, scale, line in zip(
        ("accuracy", "loss", "train_loss"), (100, 1, 1), drawn, strict=True
    ):
        points = {r["round"]: scale * r[key] for r in lines if r.get(key) is not None}
        assert dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) == points


@pytest.mark.parametrize("name", COUNTS)
def test_a_partition_is_a_bubble_for_each_client_and_class_that_it_holds(tmp_path, name):
    counts = COUNTS[name]
    plots.draw_partition(counts, tmp_path / "partition.png")
    assert is_drawn(tmp_path / "partition.png")
    axes = Figure().subplots()
    plots.bubbles(axes, counts, 0.2)
    (found,) = axes.collections
    shown = counts[: plots.SHOWN]
    assert found.get_offsets().tolist() == shown.nonzero().tolist()
    area, held = torch.tensor(found.get_sizes()), shown[shown > 0]
    whole = area.max() * held / held.max()
    torch.testing.assert_close(area, whole.clamp(min=2).to(area.dtype))
    assert f"{len(counts)} client" in axes.get_title()
    assert heterogeneity(counts)["classes_max"] == (counts > 0).sum(1).max()


@pytest.mark.parametrize("tasks", [0, 1, 3, 12])
def test_a_lifelong_run_has_a_curve_for_each_task_that_has_begun(tmp_path, monkeypatch, tasks):
    """Cut short after ``tasks`` of 12 tasks of two rounds each, and before its first evaluation."""
    figures, write = [], Figure.savefig

    def save(figure, *arguments, **options):
        figures.append(figure)
        write(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", save)
    begun = [max(1, -(-number // 2)) for number in range(2 * tasks + 1)] if tasks else []
    lines = [{"round": r, "task_accuracy": [k / 16 for k in range(n)]} for r, n in enumerate(begun)]
    plots.draw_lifelong(lines, range(2, 26, 2), tmp_path / "lifelong.png")
    assert is_drawn(tmp_path / "lifelong.png")
    (figure,) = figures
    curves = [line for line in figure.axes[0].lines if line.get_label().startswith("task")]
    assert [line.get_label() for line in curves] == [f"task {k}" for k in range(1, tasks + 1)]
    for task, line in enumerate(curves):
        assert list(line.get_xdata()) == [r for r, n in enumerate(begun) if n > task]
        assert set(line.get_ydata()) == {100 * task / 16}
