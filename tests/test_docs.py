"""What the documents promise is run: their blocks, their commands, their flags."""

import json
import re
import shlex
import subprocess
import sys

import pytest

from fedsam.loader import ROOT
from fedsam.simulate import main, parse

README = (ROOT / "README.md").read_text()
EXTEND = (ROOT / "docs" / "extend.md").read_text()
INTEROP = (ROOT / "docs" / "interop.md").read_text()
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
SIMULATE = re.compile(r"python -m fedsam\.simulate([^\n`&|]*)")


def blocks(text, language):
    return [code for kind, code in BLOCK.findall(text) if kind == language]


def commands(text):
    return [m.strip() for block in blocks(text, "sh") for m in SIMULATE.findall(block)]


EXAMPLES = [(EXTEND, words) for words in commands(EXTEND)]
PARTITIONERS = re.compile("--partition (flwr_datasets|mine:)")
EXAMPLES += [(INTEROP, words) for words in commands(INTEROP) if PARTITIONERS.search(words)]


@pytest.mark.parametrize(("page", "arguments"), EXAMPLES, ids=[words for _, words in EXAMPLES])
def test_every_example_of_your_own_runs(tmp_path, monkeypatch, page, arguments):
    mine = [block for block in blocks(page, "python") if block.startswith("# mine.py")]
    (tmp_path / "mine.py").write_text("\n".join(mine))
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


@pytest.mark.slow
@pytest.mark.parametrize("average", ["--average none", "--swa"])
def test_plain_pytorch_without_fedsam_has_the_accuracy_of_the_summary(
    tmp_path, monkeypatch, average
):
    (arguments,) = [line for line in commands(INTEROP) if "--out run" in line]
    arguments = arguments.replace("--swa", average) + " --alpha 10 --rounds 60 --quiet"
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(arguments)) == 0
    code = next(block for block in blocks(INTEROP, "python") if "load_file" in block)
    forbid = "import sys; sys.modules |= dict.fromkeys(['fedsam', 'clients', 'strategies'])\n"
    script = [sys.executable, "-c", forbid + code]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert float(done.stdout) == pytest.approx(summary["last_accuracy"], abs=1e-9)
    assert summary["last_accuracy"] > 0.3  # ten classes
    assert (tmp_path / "run" / "model-trained.safetensors").exists() == (average == "--swa")


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
