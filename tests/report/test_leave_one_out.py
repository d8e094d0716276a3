"""The table of domain generalisation: methods by the domain that was left out."""

import json
from statistics import mean, stdev

import pytest
from run_folders import write_run

from fedsam.config.schema import resolve
from fedsam.report import formats, paper
from fedsam.report.__main__ import write
from fedsam.report.charts import all_charts
from fedsam.report.domains import leave_one_out, tables
from fedsam.report.page import html
from fedsam.report.scalars import scalars, sharpness
from fedsam.report.table import ResultTable
from fedsam.runs.run import load, load_all
from fedsam.sweep.grid import cells_of, read
from fedsam.sweep.queue import run_here

DOMAINS = ("art", "photo", "sketch")
SELECTED = {  # by method, domain and seed
    ("fedavg", "art"): [0.50, 0.60],
    ("fedavg", "photo"): [0.70, 0.74],
    ("fedavg", "sketch"): [0.30, 0.34],
    ("fedasam", "art"): [0.55, 0.65],
    ("fedasam", "photo"): [0.80, 0.70],
    ("fedasam", "sketch"): [0.60],  # its second seed is not there
}


def chosen(folder, value):
    """Let a run's summary say what validation chose."""
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"selected_round": 10, "validation_accuracy": 0.9, "selected_accuracy": value}
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def table(tmp_path):
    for (method, domain), values in SELECTED.items():
        for seed, value in enumerate(values):
            folder = tmp_path / f"{method}-{domain}-{seed}"
            given = {"dataset": "mine:pacs", "leave_out": domain, "validation": 0.1}
            write_run(folder, [0.2, value + 0.1], algorithm=method, seed=seed, **given)
            chosen(folder, value)
    return ResultTable(load_all([tmp_path]))


def test_means_and_worst_are_over_the_domains_of_a_seed(table):
    best, final = leave_one_out(table)
    assert (best.figure, final.figure) == (
        "at the round of the best validation",
        "mean of the last 100 rounds",
    )
    assert best.domains == list(DOMAINS)
    fedavg = best.values["fedavg"]
    for domain in DOMAINS:
        assert fedavg[domain] == SELECTED["fedavg", domain]
    assert fedavg["mean"] == pytest.approx([1.5 / 3, 1.68 / 3])
    assert fedavg["worst"] == [0.30, 0.34]
    assert best.values["fedasam"]["mean"] == pytest.approx([1.95 / 3])  # of the whole seed alone
    assert final.values["fedavg"]["art"] == pytest.approx([0.40, 0.45])


def test_the_table_has_a_column_a_domain_then_mean_and_worst(table):
    first, second = tables(table)
    assert first.title == (
        "accuracy on the domain that is left out (%), at the round of the best validation"
    )
    assert second.title.endswith("mean of the last 100 rounds")
    assert first.head == ["method", *DOMAINS, "mean", "worst"]
    rows = {row[0]: row[1:] for row in first.rows}
    middle, spread = 100 * mean([0.50, 0.56]), 100 * stdev([0.50, 0.56])
    assert rows["fedavg"][3] == f"{middle:.2f} ± {spread:.2f}"
    assert rows["fedavg"][0] == "55.00 ± 7.07"
    assert rows["fedasam"][2:] == ["60.00", "65.00", "55.00"]


def test_every_form_of_the_report_has_it(table, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(paper, "draw_all", lambda *_: [])
    monkeypatch.setenv("COLUMNS", "160")
    for text in (formats.markdown(table), html(table)):
        assert "at the round of the best validation" in text
        assert "worst" in text
        assert "55.00 ± 7.07" in text
    write([tmp_path], tmp_path / "report", None)
    said = capfd.readouterr().out
    assert "leave out sketch" in said
    assert "55.00 ± 7.07" in said
    assert "validation: selected accuracy" in (tmp_path / "report" / "runs.csv").read_text()


def test_the_chart_has_a_mark_a_domain_and_the_mean(table):
    chart, _ = [c for c in all_charts(table, None) if c.name.startswith("leave-out")]
    assert chart.categories == [*DOMAINS, "mean"]
    fedavg = next(one for one in chart.panels[0].series if one.label == "fedavg")
    assert fedavg.y == pytest.approx([55, 72, 32, 53])
    assert fedavg.spread[3] == pytest.approx(100 * stdev([0.50, 0.56]))
    axes = paper.draw(chart).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == [*DOMAINS, "mean"]


def test_settings_have_tables_of_their_own_and_without_validation_there_is_one(tmp_path):
    for alpha in (0.1, 1.0):
        for domain in DOMAINS:
            given = {"leave_out": domain, "alpha": alpha, "dataset": "mine:pacs"}
            write_run(tmp_path / f"{alpha}-{domain}", [alpha / 2], **given)
    write_run(tmp_path / "all", [0.9], dataset="mine:pacs", alpha=1.0)  # leaves nothing out
    made = leave_one_out(ResultTable(load_all([tmp_path])))
    assert [(one.setting, one.figure) for one in made] == [
        ("alpha 0.1", "mean of the last 100 rounds"),
        ("alpha 1", "mean of the last 100 rounds"),
    ]
    assert made[1].values["fedavg"]["mean"] == [0.5]
    one = ResultTable([load(tmp_path / "1.0-art"), load(tmp_path / "1.0-photo")])
    assert tables(one)[0].head == ["method", "art", "photo", "mean", "worst"]
    assert not tables(ResultTable([load(tmp_path / "1.0-art")]))


def test_what_validation_chose_is_no_measure_of_sharpness(table):
    names = [str(scalar) for scalar in scalars(table)]
    assert names == [
        "validation: selected round",
        "validation: validation accuracy",
        "validation: selected accuracy",
    ]
    assert sharpness(table) == []


def test_the_sweep_leaves_each_domain_out_and_its_runs_make_the_table(tmp_path):
    assert resolve({"dataset": "rotated-digits"}).partition == "domains"
    small = {"rounds": 2, "eval_every": 1, "checkpoint_every": "0", "swa_start": 0, "device": "cpu"}
    cells = cells_of(read("leave-one-out"), tmp_path / "runs", small)
    assert len(cells) == 3 * 6 * 4
    configs = [cell.config for cell in cells]
    assert {c.leave_out for c in configs} == {"0", "15", "30", "45", "60", "75"}
    assert {c.validation for c in configs} == {0.1}
    few = [c for c in cells if c.config.seed == 0 and c.config.leave_out in ("0", "75")]
    few = [c for c in few if (c.config.algorithm, c.config.swa) == ("fedasam", True)]
    for cell in few:
        assert not run_here([cell])
    one, _ = leave_one_out(ResultTable(load_all([tmp_path / "runs"])))
    assert one.domains == ["0", "75"]
    assert set(one.values) == {"fedasam + swa"}
    for cell in few:
        summary = load(cell.folder).summary
        values = one.values[load(cell.folder).method]
        assert values[cell.config.leave_out] == [summary["selected_accuracy"]]


def test_a_group_has_one_colour_in_every_panel(tmp_path):
    for domain, other in (("art", "photo"), ("photo", "art")):
        folder = write_run(tmp_path / domain, [0.5], leave_out=domain, dataset="mine:pacs")
        order = ("unseen", domain, "seen", other)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        lines[-1]["groups"] = {name: {"accuracy": 0.5} for name in order}
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        summary = json.loads((folder / "summary.json").read_text())
        (folder / "summary.json").write_text(
            json.dumps(summary | {"groups": dict.fromkeys(order, 0.5)})
        )
    (chart,) = [
        c for c in all_charts(ResultTable(load_all([tmp_path])), None) if c.name == "groups"
    ]
    numbers = [{one.label: one.number for one in panel.series} for panel in chart.panels]
    assert len(numbers) == 2
    assert numbers[0] == numbers[1]
