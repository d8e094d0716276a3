"""What the documents promise is run: their blocks, their commands, their flags."""

import json
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from textwrap import dedent

import pytest
import torch
from conftest import ROOT
from fedsam.clients.minimizers.sam import SAM

from fedsam.base.errors import flag
from fedsam.base.randomness import numpy_generator
from fedsam.base.vector import unit
from fedsam.config.schema import Config
from fedsam.data.partition import heterogeneity
from fedsam.data.partitions.splits import METHODS
from fedsam.data.sources.load import LISTINGS
from fedsam.flatness import __main__ as flatness
from fedsam.flatness import options, registry
from fedsam.pack import __main__ as pack
from fedsam.report import __main__ as report
from fedsam.simulate.__main__ import main, parse, parser
from fedsam.sweep import __main__ as sweep

README = (ROOT / "README.md").read_text()
EXTEND = (ROOT / "docs" / "extend.md").read_text()
INTEROP = (ROOT / "docs" / "interop.md").read_text()
SEGMENTATION = (ROOT / "docs" / "segmentation.md").read_text()
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.M | re.S)
COMMAND = re.compile(r"python -m fedsam\.(\w+)([^\n`&|]*)")


def blocks(text, language):
    return [dedent(code) for _, kind, code in BLOCK.findall(text) if kind == language]


def commands(text, module="simulate"):
    lines = "".join(blocks(text, "sh")).replace("\\\n", " ")
    found = COMMAND.findall(lines)
    return [arguments.strip() for name, arguments in found if name == module]


def words_of(command):
    return shlex.split(command.replace("DIR/config.yaml", "digits"), comments=True)


EXAMPLES = [(EXTEND, words) for words in commands(EXTEND)]
PARTITIONERS = re.compile("--partition (flwr_datasets|mine:)")
EXAMPLES += [(INTEROP, words) for words in commands(INTEROP) if PARTITIONERS.search(words)]
EXAMPLES += [(SEGMENTATION, words) for words in commands(SEGMENTATION) if "mine:" in words]


@pytest.mark.parametrize(("page", "arguments"), EXAMPLES, ids=[words for _, words in EXAMPLES])
def test_every_example_of_your_own_runs(tmp_path, monkeypatch, page, arguments):
    mine = [block for block in blocks(page, "python") if block.startswith("# mine.py")]
    (tmp_path / "mine.py").write_text("\n".join(mine))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    sys.modules.pop("mine", None)
    small = ["--rounds", "4", "--clients", "20", "--clients-per-round", "5"]
    assert main([*shlex.split(arguments), *small, "--quiet", "--out", "run"]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["finished"]


ONES_OWN = (
    "extend.md",
    "interop.md",
    "segmentation.md",
)  # files of the user's, which tests above use as such
WITH_CODE = [p for p in PAGES if p.name not in ONES_OWN and blocks(p.read_text(), "python")]


def shortened(code):
    """Return a block with few rounds in each of its runs."""
    return re.sub(r'(\brounds"?(?:=|: ))\d+', r"\g<1>3", code)


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_every_python_block_of_a_page_runs(tmp_path, monkeypatch, capsys, page):
    code = "\n".join(blocks(page.read_text(), "python"))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(shortened(code), page.name, "exec"), names)
    if page.name == "README.md":
        assert len(names["run"].metrics) == 4
    if page.name == "cohort.md":
        lines = capsys.readouterr().out.splitlines()
        assert len([line for line in lines if line.startswith("runs/digits-fedasam")]) == 3
        assert len(list((tmp_path / "runs").iterdir())) == 3


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


def test_the_method_in_the_readme_is_sam():
    (code,) = [block for block in blocks(README, "python") if block.startswith("def step")]
    w, g = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
    names = {"unit": unit}
    exec(code, names)
    arguments = (w, lambda at: at * g, lambda w, g: w - g, None)
    shown = names["step"](SAM(rho=0.5), *arguments)
    expected, state = SAM(rho=0.5).step(*arguments)
    assert torch.equal(shown[0], expected)
    assert shown[1] == state == {}


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_in_the_documents_parses(page):
    for command in commands(page.read_text()):
        words = words_of(command)
        if "--resume" in words:  # of a run that is not here
            assert str(parser().read(words)["resume"]) == "DIR"
        elif "--help" not in words:
            assert parse(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_sweep_and_report_in_the_documents_parses(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # cells look for runs that were made before
    asked = []
    monkeypatch.setattr(
        sweep, "run_all", lambda jobs, submit: asked.append(jobs) or dict.fromkeys(range(10**6))
    )
    monkeypatch.setattr(report, "write", lambda *arguments: asked.append(arguments))
    sweeps, reports = (commands(page.read_text(), name) for name in ("sweep", "report"))
    for command in sweeps:
        words = [word for word in words_of(command) if word != "--dry-run"]  # which plays rounds
        assert sweep.main(words) == 1  # as if every cell had failed
    for command in reports:
        assert report.main(words_of(command)) == 0
    assert len(asked) == len(sweeps) + len(reports)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flatness_command_in_the_documents_parses(page):
    for command in commands(page.read_text(), "flatness"):
        given = flatness.flags().read(words_of(command))
        assert given.pop("runs")
        names = given.pop("measure", options.QUICK)
        for key in ("model", "along", "device", "data_root"):
            given.pop(key, None)
        registry.check(list(names), given)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_packing_in_the_documents_parses(page):
    for command in commands(page.read_text(), "pack"):
        given = Namespace(**pack.flags().read(words_of(command)))
        if given.verify is None:
            pack.check(given)
            assert f"{given.kind}:PATH" in LISTINGS


def test_the_documents_name_no_other_module():
    known = {"simulate", "sweep", "report", "flatness", "pack"}
    for page in PAGES:
        assert {module for module, _ in COMMAND.findall(page.read_text())} <= known | {"X"}


def test_the_page_of_flags_is_what_the_config_says():
    made = subprocess.run(
        [sys.executable, ROOT / "docs" / "flags.py"], capture_output=True, text=True, check=True
    ).stdout
    assert made == (ROOT / "docs" / "flags.md").read_text(), "python docs/flags.py > docs/flags.md"
    rows = re.findall(r"^\| `(--[\w-]+)` \|", made, re.M)
    assert rows == [flag(name) for name in Config.model_fields]


CLASSES = {  # images of each in the training set
    "CIFAR-10": [5000] * 10,
    "CIFAR-100": [500] * 100,
    "SVHN": [4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659],
}


def test_the_table_of_splits_is_what_they_are():
    page = (ROOT / "docs" / "heterogeneity.md").read_text()
    rows = re.findall(r"^\| ([\w-]+) \| `([\w-]+)(?: --alpha (\S+))?` \|(.+)$", page, re.M)
    assert len(rows) > 15
    for name, method, alpha, numbers in rows:
        labels = torch.arange(len(CLASSES[name])).repeat_interleave(torch.tensor(CLASSES[name]))
        options = {"alpha": float(alpha)} if alpha else {}
        split = METHODS[method](labels, 100, numpy_generator(0, "partition"), **options)
        h = heterogeneity(split.counts(labels, len(CLASSES[name])))
        assert numbers == (
            " {images_min} / {images_mean:.0f} / {images_max} | {classes_min} / {classes_mean:.2f} "
            "/ {classes_max} | {squares:.3f} | {distance_mean:.3f} / {distance_max:.3f} |"
        ).format(**h)


def test_every_page_is_in_the_sites_contents():
    index = (ROOT / "docs" / "index.md").read_text()
    listed = re.findall(r"^[\w-]+$", "".join(re.findall(r"{toctree}(.*?)```", index, re.S)), re.M)
    assert sorted(["index", *listed]) == sorted(["self", *(page.stem for page in PAGES[1:])])


def test_the_ratios_beside_others_were_measured():
    measured = (ROOT / "docs" / "performance.md").read_text()
    page = (ROOT / "docs" / "beside-others.md").read_text()
    rows = "".join(line for line in page.splitlines() if line.startswith("| a round of"))
    ratios = re.findall(r"\d+\.\d\d", rows)
    assert ratios
    assert all(f" {ratio} |" in measured for ratio in ratios)


def test_the_two_commands_of_the_readme_are_what_ci_and_users_run():
    shell = "\n".join(blocks(README, "sh"))
    assert "python -m fedsam.simulate --alpha 0.05" in shell
    test_command = next(line for line in shell.splitlines() if "python -m pytest" in line)
    script = (ROOT / ".ci" / "run").read_text()
    for part in test_command.split(" && "):
        assert part in script, f".ci/run does not do {part!r}"
    assert part in (ROOT / "CONTRIBUTING.md").read_text()


def test_links_between_documents_lead_somewhere():
    for path in [ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
