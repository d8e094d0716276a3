"""A run's files: each name stands once in the code, and models and checkpoints by name."""

import ast

import pytest
from conftest import ROOT

from fedsam.runs import files

NAMES = {value for name, value in vars(files).items() if name.isupper()}
SHARED = {files.MODEL, files.CHECKPOINTS, files.TENSORBOARD}  # words that mean other things too


@pytest.mark.parametrize(
    "path",
    sorted(p for p in (ROOT / "fedsam").rglob("*.py") if p.parent.name != "runs"),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_file_of_a_run_is_named_outside_runs(path):
    words = {
        node.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert words & (NAMES - SHARED) == set()
    assert not any(word.startswith(("models/", "flatness-")) for word in words)


def test_models_are_listed_by_name_and_by_round(tmp_path):
    for name in ("model", "model-trained", "models/000100", "models/000020", "models/other"):
        file = files.weights(tmp_path, name)
        file.parent.mkdir(exist_ok=True)
        file.touch()
    assert files.models_of(tmp_path) == [
        *("model", "model-trained", "models/000020", "models/000100", "models/other"),
    ]
    assert files.models_by_round(tmp_path) == {20: "models/000020", 100: "models/000100"}
    assert files.round_of(files.model_after(7)) == 7
    assert files.round_of("models/1000000") == 1_000_000
    assert files.round_of("model-trained") is None
    assert not files.is_run(tmp_path)
    assert files.checkpoints(tmp_path) == []
