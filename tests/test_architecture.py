"""The order of imports, what importing costs, and other promises about the code itself.

``PYTHONPATH=. python tests/test_architecture.py`` prints how many entries a folder has, and how
many imports lead from one room to another.
"""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT

# downward: a module may import what stands in a later row, or in its own
ORDER = [
    ["fedsam.sweep"],
    ["fedsam.report", "fedsam.flatness", "fedsam.pack", "fedsam.server_app", "fedsam.client_app"],
    ["fedsam.simulate"],
    ["fedsam.engines"],
    ["fedsam.server", "fedsam.clients"],
    ["fedsam.compiled", "fedsam.training", "fedsam.runs"],
    ["fedsam.data", "fedsam.strategies"],
    ["fedsam.cli", "fedsam.config", "fedsam.messages"],
    ["fedsam.base", "fedsam.tasks", "fedsam.models"],
]
FOLDERS = ("fedsam", "clients", "strategies")
ENTRIES = 12  # of a folder
METHODS = (  # a file a method: as many as there are
    *("clients/minimizers", "clients/corrections", "clients/losses", "strategies"),
    *("strategies/averages", "fedsam/models", "fedsam/flatness/measures"),
)
MODULES = sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return name if name.startswith("fedsam") else f"fedsam.{name}"


def row(module: str) -> int | None:
    for number, rooms in enumerate(ORDER):
        if any(f"{module}.".startswith(f"{room}.") for room in rooms):
            return number
    return None


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return [module for module in found if module.startswith("fedsam.")]


def arrows() -> Counter[tuple[str, str]]:
    """Return how many imports lead from a room to another one."""
    counted: Counter[tuple[str, str]] = Counter()
    for path in MODULES:
        here = room(name_of(path))
        targets = {room(module) for module in imports(path)} - {None, here}
        counted.update((here, target) for target in targets if here and target)
    return counted


def room(module: str) -> str | None:
    """Return the room, a name in ORDER, that a module lies in."""
    return next((r for rooms in ORDER for r in rooms if f"{module}.".startswith(f"{r}.")), None)


def entries() -> dict[str, int]:
    """Return how many modules and packages each folder holds, beside its ``__init__``."""
    folders = {path.parent for path in MODULES}
    return {
        folder.relative_to(ROOT).as_posix(): sum(
            (e.suffix == ".py" and e.name != "__init__.py") or (e / "__init__.py").exists()
            for e in folder.iterdir()
        )
        for folder in sorted(folders)
    }


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_downward(path):
    here = row(name_of(path))
    assert here is not None or path.name == "__init__.py", "give the new module its row in ORDER"
    for module in imports(path):
        target = row(module)
        assert target is None or here is None or target >= here, f"{name_of(path)} imports {module}"


def test_there_are_nine_rows_and_no_two_rooms_import_each_other():
    assert len(ORDER) == 9
    pairs = set(arrows())
    assert not {pair for pair in pairs if pair[::-1] in pairs}


def test_folders_hold_about_twelve_entries():
    crowded = {f: n for f, n in entries().items() if n > ENTRIES and f not in METHODS}
    assert crowded.keys() <= {"fedsam"}  # whose entries are the rooms of ORDER


def test_clients_and_strategies_know_neither_each_other_nor_flower():
    for folder, other in (("clients", "fedsam.strategies"), ("strategies", "fedsam.clients")):
        paths = list((ROOT / folder).rglob("*.py"))
        assert len(paths) > 3
        for path in paths:
            text = path.read_text()
            assert "flwr" not in text, path
            assert other not in text, path


def test_strategies_are_formulas_on_vectors():
    for path in (ROOT / "strategies").rglob("*.py"):
        for module in imports(path):
            assert module.startswith(("fedsam.base.strategy.", "fedsam.base.vector.")), path


def test_the_framework_names_no_plug_in():
    for path in (ROOT / "fedsam").rglob("*.py"):
        plugged = [
            m for m in imports(path) if m.startswith(("fedsam.clients", "fedsam.strategies"))
        ]
        assert not plugged, f"{name_of(path)} imports {plugged}"


def test_flowers_inner_modules_are_touched_in_one_file():
    inner = ("flwr.supercore", "flwr.superlink", "flwr.common", "flwr.server.", "flwr.proto")
    for path in MODULES:
        if path.name != "compat.py":
            assert not any(f"from {module}" in path.read_text() for module in inner), path


def test_engines_rounds_and_the_loop_know_nothing_of_what_is_learnt():
    words = re.compile(r"\b(labels?|masks?|m?iou|domains?|accurac\w*)\b", re.IGNORECASE)
    for folder in ("engines", "server", "training"):
        for path in (ROOT / "fedsam" / folder).rglob("*.py"):
            found = words.findall(path.read_text())
            assert not found, f"{path}: {found}"


def test_only_a_task_names_its_headline():
    # the flag and the library's property keep their names: they stand in users' scripts
    allowed = re.compile(r"(--)?target[_-]accuracy")
    for folder in ("sweep", "report", "flatness", "simulate", "runs"):
        for path in (ROOT / "fedsam" / folder).rglob("*.py"):
            if path.name == "__main__.py":  # its help says what the headline usually is
                continue
            said = {allowed.sub("", word) for word in words_in_code(path)}
            literal = {word for word in said if "accuracy" in word or "miou" in word}
            assert literal <= ({"accuracy"} if path.match("runs/run.py") else set()), path


def words_in_code(path: Path) -> set[str]:
    """Return the names and texts of a module, without its docstrings and comments."""
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {
        id(n.body[0].value)
        for n in ast.walk(tree)
        if isinstance(n, documented) and isinstance(n.body[0], ast.Expr)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set() if id(node) in docstrings else {node.value}
        for field in ("id", "attr", "name", "arg"):
            if isinstance(value := getattr(node, field, None), str):
                found.add(value)
    return found


def test_nothing_is_unpickled():
    for path in MODULES:
        text = path.read_text()
        assert "pickle.load" not in text
        assert "torch.load" not in text
        assert "allow_pickle=True" not in text


def asserts(test: ast.AST) -> bool:
    """Return whether a test says itself what must hold; a helper that does so is an assert_..."""
    calls = [node.func for node in ast.walk(test) if isinstance(node, ast.Call)]
    names = [getattr(call, "attr", getattr(call, "id", "")) for call in calls]
    claims = any(name.startswith(("assert_", "raises")) for name in names)
    return claims or any(isinstance(node, ast.Assert) for node in ast.walk(test))


def test_every_test_asserts_something():
    tests = [
        (path.name, node)
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    assert len(tests) > 500
    assert [(name, node.name) for name, node in tests if not asserts(node)] == []


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_fedsam_loads_nothing_heavy():
    heavy = "{'torch', 'torchvision', 'ray', 'matplotlib', 'sklearn', 'flwr'}"
    assert python(f"import sys, fedsam; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_a_run_of_the_digits_imports_only_what_it_needs_and_what_draws_at_its_end(tmp_path):
    heavy = {"torchvision", "ray", "matplotlib", "sklearn", "scipy", "pandas", "pyarrow", "PIL"}
    heavy |= {"tensorboard", "wandb", "mlflow", "torch._dynamo", "torch._inductor", "functorch"}
    heavy |= {"fedsam.simulate.joint", "fedsam.engines.batched", "fedsam.engines.ray"}
    code = f"""
import gc, sys
from fedsam.simulate.__main__ import main
from fedsam.simulate.progress import Progress

def update(self, line):
    lines.append((line["round"], sorted({heavy} & set(sys.modules))))

lines, Progress.update = [], update
code = main(["--rounds", "2", "--eval-every", "1", "--out", {str(tmp_path / "run")!r}])
print(code, lines, "matplotlib" in sys.modules, gc.isenabled(), gc.get_freeze_count() > 100_000)
"""
    assert python(code).splitlines()[-1] == "0 [(0, []), (1, []), (2, [])] True True True"
    assert {"curves.png", "partition.png"} < {path.name for path in (tmp_path / "run").iterdir()}


def test_help_is_answered_without_torch():
    code = (
        "import sys\nfrom fedsam.simulate.__main__ import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    assert python(code).endswith("False")


if __name__ == "__main__":
    print(f"{len(ORDER)} rows of order, {len(MODULES)} modules")
    for folder, number in entries().items():
        print(f"{number:4d}  {folder}")
    print(f"{len(arrows())} arrows between rooms")
    for (source, target), number in sorted(arrows().items()):
        print(f"{number:4d}  {source} -> {target}")
