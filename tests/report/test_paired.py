"""Differences from the baseline, paired over seeds, and what is bold."""

import math

import numpy as np
import pytest
from run_folders import write_run
from scipy import stats

from fedsam.report import formats
from fedsam.report.paired import clearly_best, difference, verdicts
from fedsam.report.table import ResultTable
from fedsam.runs.run import load_all


@pytest.fixture
def table(tmp_path):
    """Return a table of three methods over four seeds, whose levels differ more than methods."""
    levels = [0.30, 0.50, 0.40, 0.60]
    for seed, level in enumerate(levels):
        write_run(tmp_path / f"avg{seed}", [level], seed=seed)
        better = level + 0.02 + 0.001 * seed
        write_run(tmp_path / f"asam{seed}", [better], seed=seed, algorithm="fedasam")
        noisy = level + (-1) ** seed * 0.05
        write_run(tmp_path / f"sam{seed}", [noisy], seed=seed, algorithm="fedsam")
    write_run(tmp_path / "one", [0.9], seed=9, algorithm="scaffold")
    write_run(tmp_path / "two", [0.31], seed=0, algorithm="mofedsam")
    return ResultTable(load_all([tmp_path]))


def test_a_difference_is_students_paired_one(table):
    asam, sam, avg = (table.cells[row, ()] for row in ("fedasam", "fedsam", "fedavg"))
    seen = difference(asam, avg)
    ours, theirs = (np.array([100 * run.final for run in cell.runs]) for cell in (asam, avg))
    interval = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert seen.mean == pytest.approx((ours - theirs).mean())
    assert (seen.mean - seen.half, seen.mean + seen.half) == pytest.approx(tuple(interval))
    assert (seen.clear, seen.seeds) == (True, 4)
    assert not difference(sam, avg).clear
    assert str(difference(sam, avg)) == "+0.00 ± 9.19 (unclear)"


def test_one_common_seed_has_no_interval_and_none_no_difference(table):
    avg = table.cells["fedavg", ()]
    assert difference(table.cells["scaffold", ()], avg) is None
    seen = difference(table.cells["mofedsam", ()], avg)
    assert (seen.mean, math.isnan(seen.half), seen.clear) == (pytest.approx(1.0), True, False)


def test_verdicts_are_lines_against_the_baseline(table):
    assert table.rows[0] == "fedavg"
    assert list(verdicts(table)) == [
        "fedasam against fedavg: +2.15 ± 0.21; over 4 seeds",
        "fedsam against fedavg: +0.00 ± 9.19 (unclear); over 4 seeds",
        "mofedsam against fedavg: +1.00 (one seed); over 1 seed",
    ]
    text = formats.markdown(table)
    assert "\n- fedasam against fedavg: +2.15 ± 0.21; over 4 seeds\n" in text
    assert "over 1 to 4 seeds." in text


def test_bold_is_what_is_clearly_better_than_all_others(tmp_path):
    for seed, level in enumerate((0.3, 0.5, 0.4)):
        write_run(tmp_path / f"avg{seed}", [level], seed=seed)
        write_run(tmp_path / f"asam{seed}", [level + 0.02], seed=seed, algorithm="fedasam")
    assert clearly_best(ResultTable(load_all([tmp_path])), ()) == "fedasam"
    assert "**42.00 ± 10.00**" in formats.markdown(ResultTable(load_all([tmp_path])))
    for seed, level in enumerate((0.33, 0.4, 0.6)):
        write_run(tmp_path / f"sam{seed}", [level], seed=seed, algorithm="fedsam")
    table = ResultTable(load_all([tmp_path]))
    assert clearly_best(table, ()) == ""
    assert "**" not in formats.markdown(table)


def test_columns_are_told_apart(tmp_path):
    for seed in range(3):
        for alpha in (0, 0.5):
            at = {"seed": seed, "alpha": alpha}
            write_run(tmp_path / f"avg{seed}{alpha}", [0.5 + 0.01 * seed], **at)
            better = 0.51 + 0.01 * seed + alpha / 10
            write_run(tmp_path / f"swa{seed}{alpha}", [better], swa=True, **at)
    (line,) = verdicts(ResultTable(load_all([tmp_path])))
    assert line == (
        "fedavg + swa against fedavg: +1.00 ± 0.00 at alpha 0, +6.00 ± 0.00 at alpha 0.5; "
        "over 3 seeds"
    )
