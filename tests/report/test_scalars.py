"""What a report makes of flatness.json: tables, charts, Kendall's tau, pictures; by hand."""

import csv
import io
import json
import math

import numpy as np
import pytest
from PIL import Image
from run_folders import measure, write_run
from scipy import stats

from fedsam.base.errors import UsageError
from fedsam.report import formats, scalars
from fedsam.report.__main__ import main
from fedsam.report.charts import against_options, against_the_gap, all_charts
from fedsam.report.page import MOST, html, pictures
from fedsam.report.paper import draw
from fedsam.report.scalars import Scalar
from fedsam.report.table import ResultTable
from fedsam.runs.run import load_all

LAMBDA = Scalar("hessian", "lambda_1")


@pytest.fixture
def runs(tmp_path):
    """Two methods of three seeds; the first is sharper and has the larger gap."""
    generator = np.random.default_rng(0)
    for n, method in enumerate(("fedavg", "fedasam")):
        for seed in range(3):
            run = write_run(
                tmp_path / "runs" / f"{method}{seed}", [0.5], algorithm=method, seed=seed
            )
            sharp = 10.0 - 5 * n + seed
            adaptive = {"worst p=2": 1e-3 * 10 ** generator.uniform(0, 3), "always": 2.0}
            gap = 0.3 - 0.1 * n + 0.01 * ((2 * seed) % 3)
            scalars = {"lambda_1": sharp, "trace": math.nan, "ok": True}
            measure(run, 0.9, 0.9 - gap, hessian=scalars, sharpness=adaptive)
    return tmp_path / "runs"


def test_only_finite_numbers_of_the_evaluated_model_are_read(runs):
    run = load_all([runs / "fedavg1"])[0]
    assert run.measures["hessian"] == {"lambda_1": 11.0}
    assert list(run.measures) == ["fit", "hessian", "sharpness"]
    assert LAMBDA.of(run) == 11.0
    assert Scalar("hessian", "trace").of(run) is None


def test_a_file_of_other_models_alone_has_none_of_this(runs):
    (runs / "fedavg1" / "flatness.json").write_text('{"between": {"plane": {"scalars": {"a": 1}}}}')
    assert load_all([runs / "fedavg1"])[0].measures == {}


@pytest.mark.parametrize("text", ["{", "[]", '{"model": {"hessian": 3}}'])
def test_a_damaged_file_is_named(runs, text):
    (runs / "fedavg0" / "flatness.json").write_text(text)
    with pytest.raises(UsageError, match=r"flatness\.json: damaged"):
        formats.markdown(ResultTable(load_all([runs])))


def test_the_table_has_mean_and_deviation_over_seeds(runs):
    (table,) = scalars.tables(ResultTable(load_all([runs])))
    assert table.head == ["measure", "fedavg", "fedasam"]
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["hessian: lambda_1"] == ["11 ± 1", "6 ± 1"]
    assert rows["fit: train accuracy"] == ["0.9 ± 0", "0.9 ± 0"]
    assert "hessian: trace" not in rows
    text = formats.markdown(ResultTable(load_all([runs])))
    assert "| hessian: lambda_1 | 11 ± 1 | 6 ± 1 |" in text
    lines = list(
        csv.DictReader(io.StringIO(formats.comma_separated(ResultTable(load_all([runs])))))
    )
    shown = {(line["method"], line["seed"]): line["hessian: lambda_1"] for line in lines}
    assert shown["fedavg", "2"] == "12.0"


def test_taus_are_scipys_over_all_runs(runs):
    table = ResultTable(load_all([runs]))
    x = [LAMBDA.of(run) for run in table.runs]
    gaps = [
        100 * (run.measures["fit"]["train accuracy"] - run.measures["fit"]["test accuracy"])
        for run in table.runs
    ]
    rows = list(csv.DictReader(io.StringIO(formats.correlations(table))))
    found = {(row["measure"], row["scalar"], row["gap"]): row for row in rows}
    row = found["hessian", "lambda_1", "error"]
    assert float(row["tau"]) == pytest.approx(stats.kendalltau(x, gaps).statistic)
    assert float(row["tau"]) > 0.5
    assert float(row["low"]) <= float(row["tau"]) <= float(row["high"])
    assert row["runs"] == "6"
    assert row["dataset"] == "digits"
    assert len(rows) == 3 * 2  # lambda_1, worst, always; error and loss
    assert found["sharpness", "always", "error"]["tau"] == "nan"


def test_runs_on_another_data_set_are_another_set(runs):
    for seed in range(3):
        name = runs / f"mnist{seed}"
        run = write_run(name, [0.5], dataset="mnist", seed=seed)
        measure(run, 0.9, 0.8 + 0.01 * seed, hessian={"lambda_1": float(seed)})
    table = ResultTable(load_all([runs]))
    found = {(tau.dataset, tau.scalar): tau for tau in scalars.taus(table) if tau.gap == "error"}
    assert found["digits", LAMBDA].correlation.runs == 6
    assert found["mnist", LAMBDA].correlation[:1] == (-1.0,)
    (chart,) = [chart for chart in against_the_gap(table) if chart.name == "gap-hessian"]
    assert [panel.title.partition(",")[0] for panel in chart.panels[:2]] == ["digits", "mnist"]


def test_the_gaps_chart_holds_each_runs_point_and_says_tau(runs):
    table = ResultTable(load_all([runs]))
    charts = {chart.name: chart for chart in against_the_gap(table)}
    assert set(charts) == {"gap-hessian", "gap-sharpness"}
    error, loss = charts["gap-hessian"].panels
    (tau,) = [t for t in scalars.taus(table) if t.scalar == LAMBDA and t.gap == "error"]
    low, high = tau.correlation.low, tau.correlation.high
    text = f"lambda_1: τ = {tau.correlation.tau:.2f} (95%: {low:.2f} to {high:.2f}; 6 runs)"
    assert error.title == text
    assert (error.x_label, error.y_label) == ("hessian: lambda_1", "test - train error (points)")
    points = {series.label: (series.x, series.y) for series in error.series}
    assert points["fedavg"] == ([10.0, 11.0, 12.0], pytest.approx([30.0, 32.0, 31.0]))
    assert [y for series in loss.series for y in series.y] == pytest.approx([0.4] * 6)
    assert "τ undefined" in charts["gap-sharpness"].panels[2].title
    assert [axes.get_title() for axes in draw(charts["gap-hessian"]).axes] == [text, loss.title]


def test_two_runs_have_no_tau_and_it_is_said_why(runs, tmp_path, capsys):
    folders = [str(runs / name) for name in ("fedavg0", "fedasam0")]
    assert main([*folders, "--out", str(tmp_path / "out")]) == 0
    assert "no Kendall's tau: it needs 3 runs" in capsys.readouterr().out
    assert not (tmp_path / "out" / "tau.csv").exists()


def test_accuracy_and_sharpness_against_the_switch_of_a_late_phase(tmp_path):
    for start in (0, 10, 20, 30):
        for seed in (0, 1):
            run = write_run(
                tmp_path / "runs" / f"{start}-{seed}",
                [0.5, 0.5 + 0.01 * start + 0.1 * seed],
                algorithm="late-phase",
                minimizer_options={"first": "sgd", "then": "sam", "start": start},
                seed=seed,
            )
            measure(run, 0.9, 0.8, hessian={"lambda_1": 4.0 + start + seed})
    write_run(tmp_path / "runs" / "plain", [0.6, 0.6])
    table = ResultTable(load_all([tmp_path / "runs"]))
    assert table.rows == ["fedavg", *(f"late-phase, start {start}" for start in (0, 10, 20, 30))]
    (chart,) = against_options(table)
    assert (chart.name, chart.kind) == ("option-minimizer-options-start", "values")
    accuracy, sharp = chart.panels
    (line,) = accuracy.series
    assert (line.label, line.x) == ("late-phase", [0.0, 10.0, 20.0, 30.0])
    assert line.y == pytest.approx([52.5, 57.5, 62.5, 67.5])
    assert line.spread == pytest.approx([5 / math.sqrt(2)] * 4)
    assert sharp.y_label == "hessian: lambda_1"
    assert sharp.series[0].y == [4.5, 14.5, 24.5, 34.5]
    left, right = draw(chart).axes
    assert left.get_xlim() == right.get_xlim()


def test_a_number_that_differs_between_settings_has_a_line_for_what_is_alike(tmp_path):
    for rho in (0.1, 0.2):
        for method in ("fedsam", "fedasam"):
            write_run(tmp_path / f"{rho}{method}", [rho], algorithm=method, rho=rho, eta=0.2)
    (chart,) = against_options(ResultTable(load_all([tmp_path])))
    (panel,) = chart.panels
    lines = {series.label: (series.x, series.y) for series in panel.series}
    assert lines == {name: ([0.1, 0.2], [10.0, 20.0]) for name in ("fedsam", "fedasam")}


def test_lifelong_runs_have_their_numbers_in_the_tables(tmp_path):
    for seed in (0, 1):
        run = write_run(tmp_path / f"run{seed}", [0.5], seed=seed, lifelong=5)
        summary = json.loads((run / "summary.json").read_text())
        summary["lifelong"] = {"average_accuracy": 0.5 + 0.2 * seed, "forgetting": 0.25}
        (run / "summary.json").write_text(json.dumps(summary))
    table = ResultTable(load_all([tmp_path]))
    (lifelong,) = scalars.tables(table)
    rows = [["lifelong: average accuracy", "0.6 ± 0.14"], ["lifelong: forgetting", "0.25 ± 0"]]
    assert lifelong.rows == rows
    assert not scalars.sharpness(table)


def test_pictures_are_bounded_and_those_of_first_seeds_come_first(runs):
    for folder in sorted(runs.iterdir()):
        for name in ("flatness-surface", "flatness-spectrum", "flatness-path", "curves"):
            Image.new("RGB", (30, 20), "red").save(folder / f"{name}.png")
    Image.new("RGB", (30, 20)).save(runs / "fedavg2" / "lifelong.png")
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8)
    Image.fromarray(noise).save(runs / "fedavg0" / "flatness-path.png")
    chosen, left_out = pictures(ResultTable(load_all([runs])))
    assert len(chosen) == 18
    assert left_out == 1  # larger than a megabyte
    texts = [picture["text"] for picture in chosen]
    assert texts[:2] == ["fedasam0: flatness path", "fedasam0: flatness spectrum"]
    assert {text.partition(":")[0] for text in texts[:5]} == {"fedasam0", "fedavg0"}
    for number in range(MOST):
        Image.new("RGB", (3, 2)).save(runs / "fedavg1" / f"flatness-{number}.png")
    chosen, left_out = pictures(ResultTable(load_all([runs])))
    assert (len(chosen), left_out) == (MOST, 19)
    page = html(ResultTable(load_all([runs])))
    assert page.count('<img src="data:image/png;base64,') == MOST
    assert "19 more are in the folders of the runs" in page


def test_the_command_draws_and_writes_all_of_it(runs, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([str(runs), "--out", str(out)]) == 0
    names = {path.name for path in out.iterdir()}
    assert {"tau.csv", "gap-hessian.png", "gap-sharpness.pdf"} < names
    assert "tau.csv" in capsys.readouterr().out
    assert {c.name for c in all_charts(ResultTable(load_all([runs])), None)} >= {"gap-hessian"}
    for path in out.glob("gap-*.png"):
        with Image.open(path) as image:
            assert len(image.convert("L").getcolors()) > 20
