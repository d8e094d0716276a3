"""A task with another headline, from the run to the report; groups of test rows on the way."""

import csv
import json
import math
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from conftest import quick_config
from run_folders import measure, write_run

import fedsam
from fedsam.base.errors import UsageError
from fedsam.data.datasets import Dataset
from fedsam.data.sources.embedded import digits
from fedsam.flatness.__main__ import main as flatness
from fedsam.report.__main__ import main as report
from fedsam.report.charts import all_charts
from fedsam.report.scalars import GAPS, taus
from fedsam.report.table import ResultTable
from fedsam.runs import metrics
from fedsam.runs.run import load
from fedsam.simulate.progress import Progress
from fedsam.sweep.grid import SweepPoint
from fedsam.sweep.live import LiveTable
from fedsam.tasks.classification import Classification

HERE = "tests.simulate.test_headline"
TOLD = []


class Recall(Classification):
    """Classification whose headline is the mean over classes of the share that is found."""

    headline = "mean_recall"

    def __init__(self, classes, smoothing=0.0):
        self.classes = classes
        self.smoothing = smoothing

    def statistics(self, output, targets):
        counts = torch.zeros(2, self.classes, dtype=torch.float64)
        right = (output.argmax(-1) == targets).double()
        counts[0].index_add_(0, targets, torch.ones_like(right))
        counts[1].index_add_(0, targets, right)
        loss = self.loss(output, targets).double().sum()
        return torch.cat([loss[None], counts.flatten()])

    def metrics(self, total):
        seen, right = total[1:].view(2, self.classes)
        there = seen > 0
        return {
            "loss": float(total[0] / seen.sum()),
            "mean_recall": float((right[there] / seen[there]).mean()),
            "recall": (right / seen).tolist(),  # NaN of a class that is not there
        }


class Lacking(Recall):
    headline = "miou"


class Tracker:
    def start(self, config, folder, lines):
        TOLD.clear()

    def log(self, line):
        TOLD.append(dict(line))

    def finish(self, summary, error):
        TOLD.append(dict(summary))


def halves():
    """The digits, their test images in two groups that share some and leave some out."""
    whole = digits(None)
    groups = {"seen": torch.arange(0, 200), "unseen": torch.arange(180, 340)}
    return Dataset(**{**vars(whole), "test_groups": groups})


def masks():
    images = torch.zeros(6, 1, 8, 8, dtype=torch.uint8)
    targets = torch.ones(6, 8, 8, dtype=torch.uint8)
    kinds = torch.arange(6) % 2
    parts = images, targets, images, targets, 3, (0.5,), (0.5,)
    return Dataset("squares", *parts, train_classes=kinds, test_classes=kinds, ignore=255)


def unsorted():
    return replace(masks(), train_classes=None)


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


OTHER = {"task": f"{HERE}:Recall", "dataset": f"{HERE}:halves", "model": "mlp", "lr": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with another headline, stopped by it: target 0.6."""
    from fedsam.simulate.run import run

    out = tmp_path_factory.mktemp("headline") / "run"
    further = {"rounds": 60, "eval_every": 1, "target_accuracy": 0.6, "client_tests": True}
    config = quick_config(out, **OTHER, **further, track=f"{HERE}:Tracker")
    with Progress([config]) as progress:
        outcome = run(config, progress.update)
        assert progress.shown == [f"mean recall {outcome.summary['last_mean_recall']:.2%}"]
        progress.summarise(config, outcome)
    return out


def test_it_stops_by_the_headline_and_lines_summary_and_tracker_have_it(folder):
    lines, summary = lines_of(folder), json.loads((folder / "summary.json").read_text())
    assert summary["ended"] == "reached --target-accuracy 0.6"
    values = [line["mean_recall"] for line in lines]
    assert values[-1] >= 0.6 > max(values[:-1])
    assert {line["headline"] for line in lines} == {"mean_recall"}
    assert sum(lines[-1]["recall"]) / 10 == pytest.approx(values[-1])
    assert summary["headline"] == "mean_recall"
    assert summary["final_mean_recall"] == pytest.approx(math.fsum(values[1:]) / len(values[1:]))
    assert summary["best_mean_recall"] == summary["last_mean_recall"] == values[-1]
    assert summary["client_mean_recall"] == lines[-1]["client_mean_recall"]
    written = (folder / "metrics.jsonl").read_text() + (folder / "summary.json").read_text()
    assert "accuracy" not in written.replace("--target-accuracy", "")
    told = import_module(HERE).TOLD  # the tracker's, which was imported by this path
    assert [line["round"] for line in told[:-1]] == [line["round"] for line in lines]
    assert told[-1]["final_mean_recall"] == summary["final_mean_recall"]


def test_groups_worst_and_gap_are_those_of_a_naive_evaluation(folder):
    run, line = load(folder), lines_of(folder)[-1]
    assert list(line["groups"]) == ["seen", "unseen"]
    whole = digits(None)
    mean, std = (torch.tensor(value)[:, None, None] for value in (whole.mean, whole.std))
    module = fedsam.load(folder).model()
    with torch.no_grad():
        answers = module((whole.test_images / 255 - mean) / std).argmax(-1)
    naive = {}
    for name, rows in halves().test_groups.items():
        pairs = list(zip(answers[rows].tolist(), whole.test_labels[rows].tolist(), strict=True))
        recalls = []
        for digit in {truth for _, truth in pairs}:
            of_digit = [answer == truth for answer, truth in pairs if truth == digit]
            recalls.append(sum(of_digit) / len(of_digit))
        naive[name] = sum(recalls) / len(recalls)
        assert line["groups"][name]["mean_recall"] == pytest.approx(naive[name], rel=1e-12)
    assert line["worst"] == pytest.approx(min(naive.values()))
    assert line["gap"] == pytest.approx(naive["seen"] - naive["unseen"])  # of this name
    late = [one["groups"]["seen"]["mean_recall"] for one in lines_of(folder)[1:]]
    assert run.summary["groups"]["seen"] == pytest.approx(sum(late) / len(late))
    assert run.summary["worst"] == min(run.summary["groups"].values())
    assert run.measures["groups"] == {
        "worst": run.summary["worst"],
        "gap": run.summary["gap"],
        **run.summary["groups"],
    }


def test_the_report_names_it_everywhere(folder, tmp_path, capsys):
    assert report([str(folder), "--out", str(tmp_path / "report"), "--target", "0.5"]) == 0
    printed = capsys.readouterr().out
    run = load(folder)
    assert "mean recall" in printed
    assert f"{100 * run.final:.2f}" in printed
    table = (tmp_path / "report" / "table.md").read_text()
    assert "Mean recall in percent" in table
    assert "| groups: worst |" in table
    with (tmp_path / "report" / "runs.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["final_mean_recall"]) == run.final
    assert float(row["groups: gap"]) == run.summary["gap"]
    assert int(row["rounds_to_target"]) == next(
        line["round"] for line in lines_of(folder) if line["mean_recall"] >= 0.5
    )
    charts = {chart.name: chart for chart in all_charts(ResultTable([run]), 0.5)}
    assert charts["mean-recall"].y_label == "test mean recall (%)"
    assert charts["rounds-to-target"].y_label == "rounds to 50% mean recall"
    (panel,) = charts["groups"].panels
    assert [series.label for series in panel.series] == ["seen", "unseen"]
    last = lines_of(folder)[-1]["groups"]["unseen"]["mean_recall"]
    assert panel.series[1].y[-1] == pytest.approx(100 * last)
    assert {"worst", "gap"} <= set(charts)
    page = (tmp_path / "report" / "report.html").read_text()
    for text in [table, printed, page[: page.index("Plotly")]]:
        assert "accuracy" not in text.lower().replace("target accuracy", "").replace(
            "target_accuracy", ""
        ).replace("--target-accuracy", "")


def test_the_sweeps_live_line_shows_it(folder, capsys):
    point = SweepPoint(folder.name, folder, load(folder).config)
    board = LiveTable([point])
    board.look([[point]])
    (task,) = [t for t in board.bar.tasks if t.id == board.running[folder.name]]
    last = lines_of(folder)[-1]["mean_recall"]
    assert task.fields["shown"] == f"mean recall {last:.2%}"


def test_measures_of_flatness_go_by_it(folder):
    names = ("fit", "slope", "weight-noise", "quantisation", "sharpness", "adversarial")
    words = [word for name in names for word in ("--measure", name)]
    assert flatness([str(folder), *words, "--images", "40", "--steps", "2", "--draws", "2"]) == 0
    found = json.loads((folder / "flatness.json").read_text())["model"]
    scalars = {name: found[name]["scalars"] for name in names}
    last = lines_of(folder)[-1]["mean_recall"]
    assert scalars["fit"]["test mean_recall"] == pytest.approx(last, abs=1e-6)
    assert scalars["quantisation"]["mean_recall_int8_channel"] <= 1
    assert "mean_recall_sigma_0.5" in scalars["weight-noise"]
    assert "mean_recall" in scalars["slope"]
    assert found["adversarial"]["settings"]["headline"] == "mean_recall"
    run = load(folder)
    assert GAPS["error"].of(run) == pytest.approx(
        100 * (scalars["fit"]["train mean_recall"] - scalars["fit"]["test mean_recall"])
    )


def test_a_lifelong_run_has_its_tasks_by_it(quick):
    further = {"lifelong": 5, "rounds": 5, "eval_every": 1}
    outcome = quick(**OTHER | further)
    lines, found = lines_of(outcome.folder), outcome.summary["lifelong"]
    assert [len(line["task_mean_recall"]) for line in lines] == [1, 1, 2, 3, 4, 5]
    assert found["mean_recall_matrix"][4] == lines[5]["task_mean_recall"]
    assert found["average_mean_recall"] == pytest.approx(sum(lines[5]["task_mean_recall"]) / 5)
    assert load(outcome.folder).measures["lifelong"]["average mean recall"] == pytest.approx(
        found["average_mean_recall"]
    )


def test_classes_as_groups_show_the_worst_one(quick):
    outcome = quick(test_groups="classes", alpha=0, rounds=2)
    last = lines_of(outcome.folder)[-1]
    assert list(last["groups"]) == [f"class {digit}" for digit in range(10)]
    by_class = [group["accuracy"] for group in last["groups"].values()]
    assert (last["worst"], last["gap"]) == (min(by_class), max(by_class) - min(by_class))
    sizes = torch.bincount(digits(None).test_labels).double()
    whole = float((sizes * torch.tensor(by_class)).sum() / sizes.sum())
    assert last["accuracy"] == pytest.approx(whole)
    assert "groups" not in lines_of(quick(rounds=2).folder)[-1]


def test_a_table_of_two_headlines_names_both_and_draws_each_apart(tmp_path):
    write_run(tmp_path / "a", [0.5, 0.7])
    other = write_run(tmp_path / "b", [0.5, 0.7], algorithm="fedsam")
    for name in ("metrics.jsonl", "summary.json"):
        text = (other / name).read_text().replace("accuracy", "miou")
        marked = (
            text.replace('"miou": ', '"headline": "miou", "miou": ')
            if "jsonl" in name
            else (text.replace('"ended"', '"headline": "miou", "ended"'))
        )
        (other / name).write_text(marked)
    table = ResultTable([load(tmp_path / "a"), load(other)])
    assert table.title(()) == "accuracy or mIoU"
    assert math.isnan(load(other).accuracy)
    assert load(other).final == pytest.approx(0.6)
    charts = {chart.name: chart for chart in all_charts(table, None)}
    for name, row in (("accuracy", "fedavg"), ("miou", "fedsam")):
        (panel,) = charts[name].panels
        assert [series.label for series in panel.series] == [row]


def test_of_many_groups_the_worst_and_the_best_are_drawn(tmp_path):
    folder = write_run(tmp_path / "a", [0.5, 0.7])
    final = {f"g{number}": ((7 * number) % 23) / 23 for number in range(23)}
    summary = json.loads((folder / "summary.json").read_text()) | {"groups": final}
    (folder / "summary.json").write_text(json.dumps(summary))
    lines = [line for line in lines_of(folder) if "accuracy" in line]
    groups = {"groups": {name: {"accuracy": value} for name, value in final.items()}}
    text = "".join(json.dumps(line | groups) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    charts = {chart.name: chart for chart in all_charts(ResultTable([load(folder)]), None)}
    (panel,) = charts["groups"].panels
    shown = [name for name in final if final[name] < 5 / 23 or final[name] >= 18 / 23]
    assert [series.label for series in panel.series] == shown
    assert panel.series[0].y == [100 * final[shown[0]]] * 3


def test_taus_go_by_each_runs_headline(tmp_path):
    for seed in range(3):
        write_run(tmp_path / f"{seed}", [0.5], seed=seed)
        measure(tmp_path / f"{seed}", 0.9, 0.5 + 0.1 * seed, sharpness={"worst": 1.0 - 0.1 * seed})
    runs = [load(tmp_path / f"{seed}") for seed in range(3)]
    error = next(tau for tau in taus(ResultTable(runs)) if tau.gap == "error")
    assert error.correlation.tau == 1


def test_what_is_not_finite_in_a_group_is_null_and_left_out_of_the_worst(tmp_path, quick):
    assert metrics.worst_and_gap({"a": 0.5, "b": math.nan, "c": None, "d": 0.75}) == {
        "worst": 0.5,
        "gap": 0.25,
    }
    assert metrics.worst_and_gap({"a": math.nan}) == {"worst": None, "gap": None}
    apart = {"seen": 0.5, "unseen": 0.75, "a": 0.25}
    assert metrics.worst_and_gap(apart) == {"worst": 0.25, "gap": -0.25}
    lines = [
        {"round": 1, "accuracy": 0.5, "groups": {"a": {"accuracy": 0.25}, "b": {"accuracy": None}}},
        {"round": 2, "accuracy": 0.5, "groups": {"a": {"accuracy": 0.75}, "b": {"accuracy": None}}},
    ]
    summary = metrics.summary_of(lines)
    assert summary["groups"] == {"a": 0.5, "b": None}
    assert (summary["worst"], summary["gap"]) == (0.5, 0.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"task": f"{HERE}:Lacking"},
            "--task: metrics returns loss, mean_recall, recall, and no 'miou'",
        ),
        ({"task": f"{HERE}:Recall", "task_options": {"smooth": 1}}, "did you mean 'smoothing'"),
        ({"dataset": f"{HERE}:masks"}, "--task classification: squares has masks .*not one label"),
        (
            {"dataset": f"{HERE}:unsorted", "task": f"{HERE}:Unchecked"},
            "--dataset squares: train_labels are masks: give train_classes, what splits sort by",
        ),
    ],
)
def test_what_does_not_fit_is_one_line_before_anything_is_written(tmp_path, given, message):
    from fedsam.simulate.run import run

    with pytest.raises(UsageError, match=message):
        run(quick_config(tmp_path / "run", **{"model": "mlp"} | given))
    assert not (tmp_path / "run").exists()


class Unchecked:
    """A task of before: it names no headline and checks nothing."""

    def loss(self, output, targets):
        return torch.nn.functional.cross_entropy(output, targets, reduction="none")

    statistics = Classification.statistics
    metrics = Classification.metrics


def test_a_task_that_names_no_headline_goes_by_accuracy(quick):
    summary = quick(task=f"{HERE}:Unchecked", rounds=2).summary
    assert summary["final_accuracy"] == summary["best_accuracy"]
    assert "headline" not in summary


def test_options_and_what_the_data_say_reach_the_task():
    from fedsam.simulate.build.trainer import new_task

    config = quick_config("", task=f"{HERE}:Recall", task_options={"smoothing": 0.2})
    task = new_task(config, digits(None))
    assert (task.classes, task.smoothing) == (10, 0.2)


class Ignoring(Unchecked):
    def __init__(self, ignore=1):
        self.ignore = ignore


def test_ignore_reaches_a_task_that_names_it_where_the_data_have_one():
    from fedsam.simulate.build.trainer import new_task

    config = quick_config("", task=f"{HERE}:Ignoring")
    assert new_task(config, masks()).ignore == 255
    assert new_task(config, digits(None)).ignore == 1
