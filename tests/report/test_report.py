"""Tables and figures of runs: the numbers by hand, what makes a row, real files, errors."""

import csv
import io
import math

import pytest
from PIL import Image
from run_folders import write_run

from fedsam.base.errors import UsageError
from fedsam.report import formats
from fedsam.report.__main__ import main
from fedsam.report.charts import against_alpha, all_charts, over_rounds, over_seeds, to_target
from fedsam.report.paper import draw
from fedsam.report.table import ResultTable
from fedsam.runs.run import load_all


@pytest.fixture
def runs(tmp_path):
    """FedAvg with three seeds and FedASAM with one at alpha 0; FedAvg + SWA at alpha 0.5."""
    folder = tmp_path / "runs"
    for seed, accuracy in enumerate((0.40, 0.44, 0.48)):
        write_run(folder / f"avg{seed}", [0.2, accuracy], seed=seed, alpha=0)
    write_run(folder / "asam", [0.5, 0.6], algorithm="fedasam", alpha=0)
    write_run(folder / "deep" / "swa", [0.9, 0.9], swa=True, alpha=0.5, threads=3)
    return folder


def test_cells_hold_mean_and_sample_deviation_over_seeds(runs):
    table = ResultTable(load_all([runs]))
    assert table.rows == ["fedavg", "fedasam", "fedavg + swa"]
    assert table.columns == [(0.0,), (0.5,)]
    cell = table.cells["fedavg", (0.0,)]
    finals = [0.30, 0.32, 0.34]
    assert [run.accuracy for run in cell.runs] == pytest.approx(finals)
    assert cell.mean == pytest.approx(0.32)
    assert cell.deviation == pytest.approx(math.sqrt((0.02**2 + 0.02**2) / 2))
    assert table.cells["fedasam", (0.0,)].deviation is None


def test_the_table_in_markdown_and_latex(runs):
    table = ResultTable(load_all([runs]))
    lines = formats.markdown(table).splitlines()
    assert lines[:5] == [
        "| method | alpha 0 | alpha 0.5 |",
        "| --- | ---: | ---: |",
        "| fedavg | 32.00 ± 2.00 | - |",
        "| fedasam | 55.00 (n=1) | - |",
        "| fedavg + swa | - | 90.00 (n=1) |",
    ]
    latex = formats.latex(table)
    assert r"fedavg & 32.00 $\pm$ 2.00 & - \\" in latex
    assert r"fedavg + swa & - & 90.00 (n=1) \\" in latex
    assert latex.count(r"\\") == 4


def test_a_central_run_stands_in_every_column_of_its_data_set(tmp_path):
    for alpha in (0, 0.5):
        for cohort in (5, 10):
            name = f"avg{alpha}-{cohort}"
            write_run(tmp_path / name, [0.3], alpha=alpha, clients_per_round=cohort)
    for seed, accuracy in enumerate((0.6, 0.8)):
        given = {"algorithm": "central", "rounds": 30, "seed": seed}
        write_run(tmp_path / f"central{seed}", [accuracy], **given)
    table = ResultTable(load_all([tmp_path]))
    assert table.columns == [(0.0, 5), (0.0, 10), (0.5, 5), (0.5, 10)]
    assert table.rows == ["fedavg", "central"]
    for column in table.columns:
        assert table.cells["central", column].mean == pytest.approx(0.7)
        assert table.cells["fedavg", column].mean == pytest.approx(0.3)
    alone = ResultTable(load_all([tmp_path / "central0", tmp_path / "central1"]))
    assert alone.columns == [()]
    assert len(alone.cells["central", ()].runs) == 2


def test_what_else_differs_parts_the_rows_of_a_cell_but_not_of_different_columns(tmp_path):
    folder = tmp_path / "runs"
    write_run(folder / "a", [0.1], algorithm="fedsam", alpha=0, rho=0.1)
    write_run(folder / "b", [0.2], algorithm="fedsam", alpha=100, rho=0.02)  # as in the paper
    assert ResultTable(load_all([folder])).rows == ["fedsam"]
    write_run(folder / "c", [0.3], algorithm="fedsam", alpha=0, rho=0.5)
    rows = ResultTable(load_all([folder])).rows
    assert rows == ["fedsam, rho 0.02", "fedsam, rho 0.1", "fedsam, rho 0.5"]


def test_the_csv_has_a_line_a_run_and_says_when_a_target_was_reached(runs):
    text = formats.comma_separated(ResultTable(load_all([runs])), target=0.44)
    lines = {(r["method"], r["seed"]): r for r in csv.DictReader(io.StringIO(text))}
    assert len(lines) == 5
    assert lines["fedavg", "0"]["rounds_to_target"] == ""
    assert lines["fedavg", "1"]["rounds_to_target"] == "20"
    assert float(lines["fedavg", "1"]["seconds_to_target"]) == 20.0
    assert lines["fedasam", "0"]["rounds_to_target"] == "10"
    assert float(lines["fedavg", "2"]["final_accuracy"]) == pytest.approx(0.34)


def test_curves_are_over_the_rounds_that_all_seeds_evaluated(tmp_path):
    folder = tmp_path / "runs"
    write_run(folder / "a", [0.2, 0.4, 0.6], seed=0, rounds=30)
    write_run(folder / "b", [0.4, 0.6], seed=1, rounds=30)
    (cell,) = ResultTable(load_all([folder])).cells.values()
    rounds, middle, spread = over_seeds([run.curve("accuracy") for run in cell.runs])
    assert rounds == [0, 10, 20]
    assert middle == pytest.approx([0.1, 0.3, 0.5])
    assert spread == pytest.approx([0.0, math.sqrt(0.02), math.sqrt(0.02)])


def test_charts_hold_the_numbers(runs):
    table = ResultTable(load_all([runs]))
    alpha = against_alpha(table)
    assert alpha.categories == ["0", "0.5"]
    (panel,) = alpha.panels
    shown = {series.label: (series.x, series.y, series.spread) for series in panel.series}
    assert shown["fedavg"] == (["0"], pytest.approx([32.0]), pytest.approx([2.0]))
    assert shown["fedavg + swa"] == (["0.5"], pytest.approx([90.0]), [0.0])
    curves = over_rounds(table, "accuracy", "", "", 100)
    assert [panel.title for panel in curves.panels] == ["alpha 0", "alpha 0.5"]
    fedavg = curves.panels[0].series[0]
    assert (fedavg.label, fedavg.x) == ("fedavg", [0, 10, 20])
    assert fedavg.y == pytest.approx([10.0, 20.0, 44.0])
    assert fedavg.spread == pytest.approx([0.0, 0.0, 4.0])
    assert curves.top == pytest.approx(90.0)
    assert not over_rounds(table, "client_drift", "", "", 1).panels  # these runs measured none


def test_no_panel_is_cut_off(runs):
    chart = over_rounds(ResultTable(load_all([runs])), "accuracy", "", "", 100)
    bottoms, tops = zip(*(axes.get_ylim() for axes in draw(chart).axes), strict=True)
    assert set(bottoms) == {0}
    assert min(tops) > 90.0  # the second panel's, higher than all of the first


def test_to_a_target_only_methods_of_which_all_seeds_got_there(runs):
    rounds, seconds = to_target(ResultTable(load_all([runs])), 0.44)
    found = {s.label: (s.x, s.y) for s in rounds.panels[0].series}
    assert found == {"fedasam": (["alpha 0"], [10]), "fedavg + swa": (["alpha 0.5"], [10])}
    rounds, seconds = to_target(ResultTable(load_all([runs])), 0.40)
    found = {s.label: (s.y, s.spread) for s in seconds.panels[0].series}
    assert found["fedavg"] == ([20.0], [0.0])
    assert not to_target(ResultTable(load_all([runs])), 0.99)[0].panels


def test_the_command_writes_every_file_from_real_runs(quick, tmp_path, capsys):
    folders = [quick(alpha=alpha, seed=seed).folder for alpha in (0, 1) for seed in (0, 1)]
    out = tmp_path / "report"
    assert main([*map(str, folders), "--out", str(out), "--target", "0.01"]) == 0
    assert "4 runs" in capsys.readouterr().out
    names = {path.name for path in out.iterdir()}
    charts = [chart.name for chart in all_charts(ResultTable(load_all([tmp_path])), 0.01)]
    assert {"accuracy", "alpha", "loss", "client-drift", "rounds-to-target"} < set(charts)
    pictures = {f"{n}.{e}" for n in (*charts, "partition") for e in ("png", "pdf")}
    assert names == {"report.html", "table.md", "table.tex", "runs.csv"} | pictures
    for path in out.glob("*.png"):
        with Image.open(path) as image:
            assert len(image.convert("L").getcolors()) > 20  # drawn, not blank
    assert (out / "accuracy.pdf").read_bytes().startswith(b"%PDF")


def test_runs_that_did_not_go_to_their_end_are_left_out_and_said_so(tmp_path, capsys):
    write_run(tmp_path / "runs" / "a", [0.5])
    cut = write_run(tmp_path / "runs" / "b", [0.9], seed=1) / "summary.json"
    text = cut.read_text().replace("true", "false").replace("all rounds done", "interrupted")
    cut.write_text(text)
    assert len(load_all([tmp_path / "runs"])) == 1
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "report")]) == 0
    assert "left out: 1 runs that are not finished" in capsys.readouterr().out
    with pytest.raises(UsageError, match="no finished run: interrupted"):
        load_all([cut.parent])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "summary.json").unlink(), "no finished run: it has no summary.json"),
        (lambda run: (run / "summary.json").write_text("{"), "damaged"),
        (lambda run: (run / "config.yaml").write_text("alpha: x"), "alpha"),
        (lambda run: (run / "partition.npz").unlink(), "partition.npz: cannot be read"),
        (lambda run: (run / "partition.npz").write_bytes(b"PK"), "partition.npz: damaged"),
    ],
)
def test_a_damaged_run_is_one_line(tmp_path, capsys, damage, message):
    run = write_run(tmp_path / "run", [0.5])
    damage(run)
    assert main([str(run), "--out", str(tmp_path / "report")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no finished run in it"),
        (["runs", "--target", "40"], "--target 40: must lie in [0, 1]"),
        ([], "runs"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_empty_folder_is_said_to_be_empty(tmp_path):
    with pytest.raises(UsageError, match="no finished run in it"):
        load_all([tmp_path])
