"""fedsam as it is shipped: a wheel, Flower's bundle, a checkout that nobody installed."""

import os
import subprocess
import sys
import sysconfig
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

SITE = sysconfig.get_path("purelib")
QUICK = ["--rounds", "2", "--clients", "20", "--clients-per-round", "5", "--device", "cpu"]
# a user's own files, of the names that our folders have in the repository
OWN = {
    "clients/__init__.py": "raise ImportError('the clients of the user')",
    "strategies.py": "raise ImportError('the strategies of the user')",
    "configs/__init__.py": "raise ImportError('the configs of the user')",
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Return a function from the folder that holds fedsam to an environment without any other.

    A folder of links to all of this environment's packages but fedsam's stands in for a new one.
    """
    packages = tmp_path_factory.mktemp("packages")
    for entry in Path(SITE).iterdir():
        if "fedsam" not in entry.name and entry.suffix != ".pth":
            (packages / entry.name).symlink_to(entry)

    def holding(source: Path) -> dict[str, str]:
        path = os.pathsep.join([str(source), str(packages)])
        return os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}

    return holding


def python(*words, cwd, env):
    """Run the environment's Python without its own site-packages (-S)."""
    call = [sys.executable, "-S", *map(str, words)]
    return subprocess.run(call, capture_output=True, text=True, cwd=cwd, env=env, timeout=240)


@pytest.fixture
def home(tmp_path):
    """A folder of a user's, who has clients, strategies and configs of their own."""
    for name, text in OWN.items():
        file = tmp_path / "home" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return tmp_path / "home"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The folder that the wheel was installed into."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "-q"]
    make = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, ROOT]
    subprocess.run(make, check=True, capture_output=True, timeout=120)
    (file,) = folder.glob("fedsam-*.whl")
    target = folder / "target"
    put = [*pip, "install", "--no-deps", "--no-index", "--target", target, file]
    subprocess.run(put, check=True, capture_output=True, timeout=120)
    return target


@pytest.mark.slow
def test_the_wheel_runs_beside_clients_and_strategies_of_the_users(wheel, home, environment):
    names = {path.name for path in wheel.iterdir() if "dist-info" not in path.name}
    assert names == {"fedsam", "bin"}  # bin holds the command
    assert [path.name for path in (wheel / "bin").iterdir()] == ["fedsam"]
    env = environment(wheel)
    words = [*QUICK, "--algorithm", "fedsam", "--strategy", "fedadam", "--quiet", "--out", "run"]
    done = python("-m", "fedsam.simulate", *words, cwd=home, env=env)
    assert done.returncode == 0, done.stderr
    code = (
        "import fedsam.clients.minimizers.sam as m, fedsam.runs.folder as f\n"
        "print(m.__file__, f.versions()['fedsam'])"
    )
    done = python("-c", code, cwd=home, env=env)
    file, version = done.stdout.split()
    assert Path(file) == wheel / "fedsam" / "clients" / "minimizers" / "sam.py"
    assert version[0].isdigit()


@pytest.mark.slow
def test_a_type_checker_knows_the_wheels_clients(wheel, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from fedsam.clients.minimizers.sam import SAM\n\nrho: str = SAM(rho=0.1).rho\n"
    )
    venv.create(tmp_path / "venv")
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "fedsam").symlink_to(wheel / "fedsam")
    words = ["--python-executable", tmp_path / "venv" / "bin" / "python", "mine.py"]
    call = [sys.executable, "-m", "mypy", "--follow-imports", "silent", *words]
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, timeout=240)
    (error, _) = done.stdout.splitlines()
    assert error.startswith("mine.py:3: error: Incompatible types in assignment (expression has")


@pytest.mark.slow
def test_flowers_bundle_holds_clients_and_presets(tmp_path, environment, home):
    flwr = Path(sys.executable).with_name("flwr")
    if not flwr.exists():
        pytest.skip("Flower's commands are not beside this Python")
    done = subprocess.run(
        [flwr, "build", "--app", ROOT], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (bundle,) = tmp_path.glob("*.fab")
    zipfile.ZipFile(bundle).extractall(tmp_path / "app")
    held = {p.relative_to(tmp_path / "app") for p in (tmp_path / "app").rglob("*") if p.is_file()}
    rooms = ("fedsam", "clients", "strategies", "configs")
    ours = {p.relative_to(ROOT) for room in rooms for p in (ROOT / room).rglob("*") if p.is_file()}
    needed = {p for p in ours if "__pycache__" not in p.parts and p.name != "py.typed"}
    assert needed - held == set()
    code = textwrap.dedent("""
        import fedsam.clients.minimizers.sam, fedsam.strategies.fedadam, fedsam.client_app
        from fedsam.config.schema import resolve
        print(fedsam.clients.minimizers.sam.__file__, resolve({}, "paper/cifar10").model)
    """)
    done = python("-c", code, cwd=home, env=environment(tmp_path / "app"))
    assert done.returncode == 0, done.stderr
    app = tmp_path / "app" / "clients" / "minimizers" / "sam.py"
    assert done.stdout.split() == [str(app), "cnn"]


@pytest.mark.slow
def test_a_checkout_that_is_not_installed_runs_and_says_so(home, environment):
    done = python("-m", "fedsam.simulate", *QUICK, "--out", "run", cwd=home, env=environment(ROOT))
    assert done.returncode == 0, done.stderr
    assert '"fedsam": "checkout"' in (home / "run" / "summary.json").read_text()
