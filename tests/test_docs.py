"""What the documents promise is run: their blocks, their commands, their flags."""

import re
import shlex
import sys

import pytest

from fedsam.loader import ROOT
from fedsam.simulate import main, parse

README = (ROOT / "README.md").read_text()
EXTEND = (ROOT / "docs" / "extend.md").read_text()
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
SIMULATE = re.compile(r"python -m fedsam\.simulate([^\n`&|]*)")


def blocks(text, language):
    return [code for kind, code in BLOCK.findall(text) if kind == language]


def commands(text):
    return [m.strip() for block in blocks(text, "sh") for m in SIMULATE.findall(block)]


@pytest.mark.parametrize("arguments", commands(EXTEND))
def test_every_example_of_the_extension_page_runs(tmp_path, monkeypatch, arguments):
    (tmp_path / "mine.py").write_text("\n".join(blocks(EXTEND, "python")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    sys.modules.pop("mine", None)
    small = ["--rounds", "4", "--clients", "20", "--clients-per-round", "5"]
    assert main([*shlex.split(arguments), *small, "--quiet", "--out", "run"]) == 0
    assert (tmp_path / "run" / "summary.json").exists()


def test_the_example_from_python_in_the_readme_runs(tmp_path, monkeypatch):
    code = next(block for block in blocks(README, "python") if "import fedsam" in block)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code.replace("rounds=300", "rounds=3, quiet=True"), "README.md", "exec"), names)
    assert len(names["run"].metrics) == 4


def test_the_example_of_several_runs_at_once_runs(tmp_path, monkeypatch, capsys):
    (code,) = blocks((ROOT / "docs" / "cohort.md").read_text(), "python")
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace('"rounds": 20', '"rounds": 2'), "cohort.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("runs/digits-fedasam")]) == 3
    assert len(list((tmp_path / "runs").iterdir())) == 3


def test_the_extension_page_shows_every_axis():
    text = " ".join(commands(EXTEND))
    for name in (
        "minimizer",
        "client",
        "strategy",
        "average",
        "model",
        "task",
        "dataset",
        "partition",
        "track",
    ):
        assert f"--{name} mine:" in text


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))], ids=lambda p: p.name
)
def test_every_command_in_the_documents_parses(path):
    for arguments in commands(path.read_text()):
        words = shlex.split(arguments.replace("DIR/config.yaml", "digits"), comments=True)
        if "--help" not in words:
            assert parse(words)


def test_the_two_commands_of_the_readme_are_what_ci_and_users_run():
    shell = "\n".join(blocks(README, "sh"))
    assert "python -m fedsam.simulate --alpha 0.05" in shell
    test_command = next(line for line in shell.splitlines() if line.endswith("python -m pytest"))
    script = (ROOT / ".ci" / "run").read_text()
    for part in test_command.split(" && "):
        assert part in script, f".ci/run does not do {part!r}"


def test_links_between_documents_lead_somewhere():
    for path in [ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
