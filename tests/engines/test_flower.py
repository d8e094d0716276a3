"""The Flower app on Flower's own runtime: the same clients, the same bytes."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedsam.loader import ROOT

FLWR = Path(sys.executable).with_name("flwr")
SETTINGS = {"rounds": 3, "clients": 6, "clients-per-round": 3, "eval-every": 1, "alpha": 1.0}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


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


@pytest.mark.slow
@pytest.mark.skipif(not FLWR.exists(), reason="Flower's commands are not beside this Python")
def test_flowers_simulation_gives_the_bytes_of_the_local_engine(tmp_path, flower, quick):
    pytest.importorskip("ray", reason="Flower's simulation needs ray: pip install 'fedsam[flower]'")
    out = tmp_path / "flower"
    settings = SETTINGS | {"algorithm": "fedasam", "average": "swa", "swa-start": 1}
    settings |= {"swa-cycle": 1, "out": str(out)}
    log = flower(settings, 6, out / "summary.json")
    assert (out / "summary.json").exists(), log[-4000:]
    here = {key.replace("-", "_"): value for key, value in settings.items() if key != "out"}
    local = quick(**here)
    for name in ("model.safetensors", "model-trained.safetensors"):
        assert (out / name).read_bytes() == (local.folder / name).read_bytes()
