"""Keys from Python and paths as a shell reads them; the command ``fedsam``."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from fedsam.clients.minimizers.sam import SAM

import fedsam
from fedsam import cli
from fedsam.base import system
from fedsam.base.errors import TrainingError, UsageError
from fedsam.config.schema import resolve


def test_paths_numpys_numbers_and_none_are_taken():
    config = resolve({
        "out": Path("some") / "where", "rho": np.float64(0.25), "lr": np.float32(0.5),
        "rounds": np.int64(7), "swa": np.bool_(True), "alpha": None, "quiet": None,
        "minimizer_options": {"k": np.int32(3), "path": Path("a")},
    })  # fmt: skip
    assert (config.out, config.rho, config.lr, config.rounds, config.swa) == (
        "some/where", 0.25, 0.5, 7, True,
    )  # fmt: skip
    assert (config.alpha, config.quiet) == (0.05, False)
    assert config.minimizer_options == {"k": 3, "path": "a"}
    assert resolve({"algorithm": "fedasam", "rho": None}).rho == 0.7


def test_an_object_where_a_name_belongs_gets_the_name():
    with pytest.raises(UsageError) as caught:
        resolve({"minimizer": SAM})
    name = "minimizer='fedsam.clients.minimizers.sam:SAM'"
    assert str(caught.value) == f"--minimizer: takes a name, not the object: {name}"
    assert resolve({"minimizer": "fedsam.clients.minimizers.sam:SAM"}).minimizer
    with pytest.raises(UsageError, match=r"put it into a file, mine\.py, and give dataset='mine:"):
        resolve({"dataset": lambda: None})


def test_paths_are_read_as_a_shell_reads_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHERE", "there")
    config = resolve({"out": "~/x", "data_root": "$WHERE/${WHERE}"})
    assert (config.out, config.data_root) == (str(tmp_path / "x"), "there/there")
    assert resolve(config.model_dump()) == config
    (tmp_path / "mine.yaml").write_text("out: ~/y\nlr: 0.5\n")
    assert resolve({}, "~/mine.yaml").out == str(tmp_path / "y")
    assert cli.path("$WHERE/a") == Path("there/a")


@pytest.mark.parametrize("text", ["$NOWHERE_X/a", "${NOWHERE_X}"])
def test_a_variable_that_is_not_set_is_one_line(text):
    said = "the environment has no variable NOWHERE_X"
    with pytest.raises(UsageError) as caught:
        resolve({"data_root": text})
    assert str(caught.value) == f"--data-root {text}: {said}"
    with pytest.raises(UsageError) as caught:
        resolve({}, text)
    assert str(caught.value) == f"--config {text}: {said}"
    parser = cli.Parser()
    parser.add_argument("--resume", type=cli.path)
    with pytest.raises(UsageError) as caught:
        parser.read(["--resume", text])
    assert str(caught.value) == f"argument --resume: {text}: {said}"


def raiser(error):
    def act():
        raise error

    return act


def test_errors_are_exit_codes(capsys):
    assert cli.run(lambda: None) == 0
    assert cli.run(lambda: 1) == 1
    assert cli.run(raiser(UsageError("--x: no"))) == 2
    assert cli.run(raiser(TrainingError("gone"))) == 1
    assert cli.run(raiser(TrainingError("full")), stopped="stopped") == 1
    assert cli.run(raiser(system.Interrupted(15))) == 143
    assert cli.run(raiser(KeyboardInterrupt()), interrupted="interrupted; go on") == 130
    assert capsys.readouterr().err.splitlines() == [
        "fedsam: error: --x: no", "fedsam: training stopped: gone", "fedsam: stopped: full",
        "fedsam: interrupted after round 0", "fedsam: interrupted; go on",
    ]  # fmt: skip


def test_the_command_hands_on_lists_and_says_its_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fedsam {fedsam.__version__}\n"
    assert cli.main(["list", "minimizers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("sam ")] == ["sam"]
    assert all(len(line.split()) > 3 for line in lines)
    assert cli.main(["list"]) == 0
    everything = capsys.readouterr().out
    assert "fashion-mnist" in everything
    assert "dirichlet-per-class" in everything
    assert "heterogeneity" in everything
    assert cli.main(["list", "minimisers"]) == 2
    assert "did you mean 'minimizers'?" in capsys.readouterr().err
    assert cli.main(["simulat"]) == 2
    assert "did you mean 'simulate'?" in capsys.readouterr().err
    assert cli.main(["simulate", "--alhpa", "1"]) == 2
    assert "did you mean '--alpha'?" in capsys.readouterr().err
    assert cli.main([]) == 0
    usage = capsys.readouterr().out
    assert all(f"  {name} " in usage for name in cli.COMMANDS)


def test_a_package_that_is_not_installed_is_a_checkout():
    assert system.version("no-package-of-this-name") == "checkout"
    assert system.version("torch") != "checkout"


def test_list_and_help_import_no_torch():
    code = (
        "import sys\nfrom fedsam.cli import main\nmain(['list']); main(['--version'])\n"
        "try: main(['simulate', '--help'])\nexcept SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    call = [sys.executable, "-c", code]
    done = subprocess.run(call, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip().endswith("False")
    assert all(f"--{key.replace('_', '-')} " in done.stdout for key in ("rho", "eta", "out"))
    assert "How a client learns:" in done.stdout
