"""One experiment on every engine: the same clients, the same parameters."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, free_port
from record import float64
from safetensors.torch import load_file, save_file

from fedsam.models.digits_cnn import DigitsCNN

pytestmark = pytest.mark.xdist_group("clusters")
FLWR = Path(sys.executable).with_name("flwr")
MODELS = ("model.safetensors", "model-trained.safetensors")
SAME = {
    "rounds": 6,
    "clients": 6,
    "clients_per_round": 3,
    "eval_every": 1,
    "partition": "quantity",  # some clients take far longer than others
    "alpha": 1.0,
    "batch_size": 16,
    "algorithm": "fedasam",
    "average": "swa",
    "swa_start": 2,
    "swa_cycle": 2,
    "device": "cpu",
}


# settings over SAME, and what accuracy they reach: vectors kept and sent, both ways, in FedSMOO,
# whose clients' images differ, too, and of whose network most is frozen
METHODS = {
    "fedasam": ({"momentum": 0.9}, 0.5),
    "asam on scaffold": ({"client": "scaffold"}, 0.12),
    "fedsmoo": (
        {
            "algorithm": "fedsmoo",
            "client_noise": 0.1,
            "client_rotations": "0,30,90",
            "train": "conv1|fc2",
            "lora": 3,
            "lora_targets": "conv2|fc1",
            "lora_options": "{freeze: a}",
        },
        0.12,
    ),
    "a domain left out": (
        {"dataset": "rotated-digits", "partition": "domains", "leave_out": "75", "validation": 0.1},
        0.12,
    ),
}


def stop_superlink(home: Path) -> None:
    """End the SuperLink that `flwr run` left in the background, and its children."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().decode(errors="replace")
            environment = (entry / "environ").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(home) in command or f"FLWR_HOME={home}" in environment:
            os.kill(int(entry.name), signal.SIGKILL)


@pytest.fixture
def flower(tmp_path):
    """Return a function that runs the app in Flower's simulation; clean up behind it."""
    home = tmp_path / "flwr-home"
    environment = os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        # fedsam is installed already: no second environment with its own PyTorch
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "PATH": f"{FLWR.parent}{os.pathsep}{os.environ['PATH']}",
    }

    def run(settings: dict, clients: int, wait_for: Path) -> str:
        home.mkdir()
        config = " ".join(
            f'{k}="{v}"' if isinstance(v, str) else f"{k}={v}" for k, v in settings.items()
        )
        call = [str(FLWR), "run", str(ROOT), "--stream", "--run-config", config]
        call += ["--federation-config", f"num-supernodes={clients}"]
        done = subprocess.run(
            call, env=environment, capture_output=True, text=True, timeout=240, cwd=tmp_path
        )
        end = time.monotonic() + 30
        while not wait_for.exists() and time.monotonic() < end:
            time.sleep(0.5)
        return done.stdout + done.stderr

    yield run
    stop_superlink(home)


@pytest.fixture
def engine(quick, flower, tmp_path, request):
    """Return a function that runs the experiment on an engine and returns the run's folder."""

    def on(name: str, **options) -> Path:
        keys = SAME | options
        if "lora" in options:
            torch.manual_seed(5)
            keys["weights"] = str(tmp_path / "first.safetensors")
            save_file(DigitsCNN((1, 8, 8), 3).state_dict(), keys["weights"])
        if name != "local":
            pytest.importorskip("ray", reason=f"{name} needs ray: pip install 'fedsam[{name}]'")
        if name != "flower":
            if name == "ray":
                request.getfixturevalue("shared_ray")
            return quick(**keys, engine=name).folder
        if not FLWR.exists():
            pytest.skip("Flower's commands are not beside this Python")
        out = tmp_path / "flower"
        settings = {key.replace("_", "-"): value for key, value in keys.items()}
        log = flower(settings | {"out": str(out)}, SAME["clients"], out / "summary.json")
        assert (out / "summary.json").exists(), log[-4000:]
        return out

    return on


def rounds(folder: Path) -> list[dict]:
    """Return the lines of metrics.jsonl without what the clock says."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def vector(path: Path) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in load_file(path).values()])


ENGINES = {
    "local-2-threads": ("local", {"threads": 2}),
    "ray-2-actors": ("ray", {"workers": 2}),
    "flower": ("flower", {}),
}
# what an engine need not start for: FedSMOO keeps and sends all that SCAFFOLD does, and test_deploy
# plays FedASAM with SWA in Flower's runtime; one actor is enough for test_ray
NEEDLESS = {
    *((e, "asam on scaffold") for e in ("ray-2-actors", "flower")),
    ("flower", "fedasam"),
    ("flower", "a domain left out"),  # Flower's nodes make their data as Ray's actors do
    ("local-2-threads", "a domain left out"),
}
CASES = [pair for pair in itertools.product(ENGINES, METHODS) if pair not in NEEDLESS]


@pytest.mark.slow
@pytest.mark.parametrize(("on", "method"), CASES)
def test_every_engine_trains_the_same_clients_to_the_same_bytes(engine, on, method):
    (name, options), (axes, learns_to) = ENGINES[on], METHODS[method]
    mine, local = engine(name, **axes, **options), engine("local", **axes, threads=1)
    ours, theirs = rounds(mine), rounds(local)
    assert ours == theirs
    for file in MODELS:
        assert (mine / file).read_bytes() == (local / file).read_bytes()
    assert len({tuple(line["clients"]) for line in theirs[1:]}) > 1
    assert theirs[-1]["accuracy"] > learns_to
    assert len({(local / file).read_bytes() for file in MODELS}) == 2


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_cohort_as_one_program_ends_where_its_clients_end_one_by_one(engine, method):
    """In float64, and with steps that forget a rounding: ASAM's rho of 0.7 beside a momentum of
    0.9 makes 1e-2 of 1e-8 in three rounds.
    """
    axes = METHODS[method][0] | {"rho": 0.05}
    with float64():
        mine, local = engine("local", **axes, cohort="slots"), engine("local", **axes, threads=1)
    for key in ("clients", "accuracy"):
        ours, theirs = ([line.get(key) for line in rounds(run)] for run in (mine, local))
        assert ours == theirs
    for file in MODELS:
        apart = (vector(mine / file) - vector(local / file)).norm()
        assert vector(mine / file).dtype == torch.float64
        assert apart <= 1e-9 * vector(local / file).norm()
