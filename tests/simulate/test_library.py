"""fedsam as a library: a run from Python, its table, its figure, its model."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import fedsam
from fedsam.base.errors import UsageError
from fedsam.simulate.build.data import load_dataset


def test_a_run_from_python(tmp_path):
    run = fedsam.run(
        alpha=1.0, algorithm="fedasam", rho=0.05, rounds=40, clients=10, clients_per_round=5,
        device="cpu", quiet=True, out=str(tmp_path / "run"),
    )  # fmt: skip
    assert run.path == tmp_path / "run"
    assert [row["round"] for row in run.metrics] == list(range(41))
    assert run.metrics[-1]["accuracy"] == run.summary["last_accuracy"] > 0.5
    assert run.accuracy == run.summary["final_accuracy"]

    model = run.model()
    data = load_dataset(run.config)
    mean, std = torch.tensor(data.mean), torch.tensor(data.std)
    images = (data.test_images / 255 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        right = (model(images).argmax(1) == data.test_labels).float().mean()
    assert float(right) == pytest.approx(run.metrics[-1]["accuracy"], abs=1e-6)
    saved = load_file(run.path / "model.safetensors")
    assert all(torch.equal(t, saved[name]) for name, t in model.state_dict().items())

    accuracy, loss = run.plot().axes
    assert list(accuracy.lines[0].get_ydata())[-1] == pytest.approx(100 * run.accuracy, abs=30)
    assert len(loss.lines) == 2


def test_a_config_by_name_and_keys_over_it(tmp_path):
    run = fedsam.run("digits", rounds=2, quiet=True, out=str(tmp_path / "run"))
    assert run.config.rounds == 2
    assert run.config.dataset == "digits"


def test_a_wrong_key_is_said_before_anything_is_done(tmp_path):
    with pytest.raises(UsageError, match="--alpa: no such key"):
        fedsam.run(alpa=1, out=str(tmp_path / "run"))
    assert not list(tmp_path.iterdir())


def test_importing_the_package_is_instant_and_the_command_is_a_function():
    code = (
        "import sys, fedsam; assert 'torch' not in sys.modules; "
        "assert 'pydantic' not in sys.modules; assert callable(fedsam.run); "
        "assert 'torch' not in sys.modules; from fedsam import run; assert callable(run)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with pytest.raises(AttributeError, match="no attribute 'simulat'"):
        fedsam.simulat  # noqa: B018
