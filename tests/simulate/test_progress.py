"""What a run says while it runs, on a terminal, in a file, in a notebook; and nothing if quiet."""

import logging
import re
import sys
from types import ModuleType

import pytest
from conftest import quick_config

import fedsam
from fedsam import cli
from fedsam.config.schema import resolve
from fedsam.simulate import progress
from fedsam.simulate.__main__ import main
from fedsam.simulate.progress import Progress

QUICK = ["--clients=20", "--clients-per-round=5", "--rounds=6", "--device=cpu", "--threads=1"]


def test_without_a_terminal_there_are_plain_lines(tmp_path, capfd):
    assert main([*QUICK, "--alpha", "1", "--out", str(tmp_path / "loud")]) == 0
    said = capfd.readouterr()
    lines = said.out.splitlines()
    assert lines[0] == "run       fedavg (sgd, fedavg client, fedavg server) on digits"
    assert lines[1] == "clients   5 of 20 a round, dirichlet split, alpha 1"
    assert lines[2] == "model     digits-cnn, 18,510 parameters, fp32 on cpu (1 thread)"
    assert lines[3] == "data      1,442 images over 20 clients, 72 to 73 each; 355 for testing"
    assert lines[4].startswith("round 0/6  accuracy ")
    last = r"round 6/6  accuracy \d+\.\d\d%  train loss \d\.\d+  \d+\.\d s, 0\.0 s left"
    assert re.fullmatch(last, lines[10])
    assert lines[11].startswith("rounds    6 in ")
    assert " mean of the last 6 rounds (last " in lines[12]
    assert lines[13] == f"results   {tmp_path / 'loud'}"
    assert "\x1b[" not in said.out
    assert said.err == ""


def test_quiet_says_nothing_but_what_goes_wrong(tmp_path, capfd):
    assert main([*QUICK, "--quiet", "--out", str(tmp_path / "quiet")]) == 0
    assert capfd.readouterr() == ("", "")
    call = [*QUICK, "--quiet", "--lr", "1e30", "--out", str(tmp_path / "bad")]
    assert main(call) == 1
    said = capfd.readouterr()
    assert said.out == ""
    assert "left out: its update is not finite" in " ".join(said.err.split())


@pytest.mark.parametrize("partition", ["iid", "shards"])
def test_a_split_without_alpha_is_told_of_without(partition, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*QUICK[:2], "--rounds=1", "--partition", partition]) == 0
    said = capfd.readouterr().out
    assert f"{partition} split\n" in said
    assert " after one round (last " in said
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith(f"digits-fedavg-{partition}-seed0-")


def test_only_splits_by_alpha_are_told_with_it():
    by_alpha = {
        name: resolve({"partition": name}).by_alpha
        for name in ("dirichlet", "iid", "dirichlet-per-class", "shards", "quantity", "mine:split")
    }
    assert by_alpha == {
        "dirichlet": True, "iid": False, "dirichlet-per-class": True, "shards": False,
        "quantity": True, "mine:split": True,
    }  # fmt: skip


class Handle:
    """What IPython's display returns: the place of an output."""

    def __init__(self, shown):
        self.shown = shown

    def update(self, html):
        self.shown[-1] = html


@pytest.fixture
def notebook(monkeypatch):
    """Return what a notebook shows below a cell, an entry an output."""
    shown = []

    def display(html, display_id):
        assert display_id
        shown.append(html)
        return Handle(shown)

    module = ModuleType("IPython.display")
    module.HTML, module.display = str, display
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    for place in (cli, progress):
        monkeypatch.setattr(place, "in_notebook", lambda: True)
    return shown


def test_a_notebook_shows_one_line_that_changes_and_text(tmp_path, notebook, capfd):
    run = fedsam.run(
        rounds=6, clients=20, clients_per_round=5, device="cpu", out=str(tmp_path / "run")
    )
    assert len(notebook) == 1
    assert notebook[0].startswith('<progress value="6" max="6"></progress> <code>round 6/6  acc')
    said = capfd.readouterr().out
    words = [line.split()[0] for line in said.splitlines()]
    assert words == ["run", "clients", "model", "data"]
    assert repr(run) == (
        f"Run('{tmp_path / 'run'}': fedavg on digits, 6 rounds, accuracy {run.final:.2%})"
    )


def test_a_narrow_terminal_has_no_rate_and_loggers_are_as_before(monkeypatch, tmp_path):
    logger = logging.getLogger("fedsam")
    before = logger.level, list(logger.handlers)
    columns = {}
    for width in (70, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        with Progress([quick_config(tmp_path)]) as shown:
            columns[width] = len(shown.bar.columns)
            assert logger.level == logging.INFO
        assert (logger.level, logger.handlers) == before
    assert columns[120] == columns[70] + 1
