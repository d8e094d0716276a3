"""Every benchmark starts: it says what it takes, and plays one tiny round."""

import os
import runpy
import subprocess
import sys
from importlib.util import find_spec

import pytest
from conftest import ROOT

# the others are what these import
SCRIPTS = [p for p in sorted(ROOT.glob("benchmarks/*.py")) if "__main__" in p.read_text()]
# what the last line of a tiny round begins with
LAST = {
    "attacks": "| FedTrimmedAvg | ",
    "cohort": "| vmap | ",
    "compiled": "| digits CNN, fedavg | ",
    "engines": "| pfl | not installed",
    "flatness": "| fedsam | ",
    "growth": "| 10 | 32 | ",
    "landmarks": "| mobilenet-v2: peak resident memory | ",
    "local": "  fedsam, threads 2: ",
    "models": "| `mlp` |  | 656,810 | ",
    "partial": "| head, LoRA of rank 8 with A fixed | ",
    "storage": "| train from jpeg | ",
}
NEEDS = {"blazefl": "blazefl", "fedjax": "fedjax", "pfl": "pfl[pytorch]"}


def ended(script, *words, cwd):
    call = [sys.executable, script, *words]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return subprocess.run(
        call, capture_output=True, text=True, cwd=cwd, env=environment, timeout=270
    )


def test_every_benchmark_has_its_test():
    assert {script.stem for script in SCRIPTS} == {*LAST, "peer"}


@pytest.fixture
def called(tmp_path, monkeypatch):
    """Return a function that calls a script in this process, and returns what it exits with."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")

    def call(script, *words):
        monkeypatch.setattr(sys, "argv", [str(script), *words])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(script), run_name="__main__")
        return ended.value.code

    yield call
    for script in ROOT.glob("benchmarks/*.py"):
        sys.modules.pop(script.stem, None)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_help_measures_nothing(called, capsys, script):
    assert called(script, "--help") == 0
    said = capsys.readouterr().out
    assert "--tiny" in said
    assert "|" not in said


@pytest.mark.slow
@pytest.mark.parametrize("name", LAST)
def test_a_tiny_round_is_played(tmp_path, name):
    if name == "engines":
        pytest.importorskip("ray", reason="the engines benchmark needs ray and flwr[simulation]")
    done = ended(ROOT / "benchmarks" / f"{name}.py", "--tiny", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1].startswith(LAST[name]), done.stdout


@pytest.mark.parametrize(("name", "package"), NEEDS.items())
def test_a_framework_that_is_not_there_is_named_in_one_line(called, name, package):
    if find_spec(name):
        pytest.skip(f"{name} is installed")
    line = f"peer: this Python has no {name}: pip install '{package}'"
    assert called(ROOT / "benchmarks" / "peer.py", name, "none", "--tiny") == line
