"""Shared fixtures: a tiny federation of real digits, and quick runs of it."""

import gc
import itertools
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fedsam.config.schema import Config, resolve
from fedsam.runs import folder
from fedsam.server.compat import identify_process
from fedsam.simulate.run import Outcome, run

ROOT = Path(__file__).resolve().parents[1]  # of the checkout


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    identify_process()  # tests build messages of their own
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in the background of a shell
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what tests start would be deaf


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # Flower collects garbage with each message: not among all that was imported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "slow" not in item.keywords)  # so that workers end together
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="this machine has no CUDA device"))


PICTURES = ("draw_curves", "draw_lifelong", "draw_partition")  # of a run, to its folder
DRAW = {name: getattr(folder, name) for name in PICTURES}


@pytest.fixture(scope="session", autouse=True)
def blank_pictures() -> Iterator[None]:
    """Leave a run's pictures blank, one pixel each: drawing takes two thirds of a quick run."""

    def blank(*arguments: Any) -> None:
        Image.new("RGB", (1, 1)).save(arguments[-1])

    with pytest.MonkeyPatch.context() as patch:
        for name in PICTURES:
            patch.setattr(folder, name, blank)
        yield


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the pictures of runs in this process, as users get them."""
    for name, draw in DRAW.items():
        monkeypatch.setattr(folder, name, draw)


@pytest.fixture
def quick(tmp_path: Path) -> Callable[..., Outcome]:
    """Return a function that runs a few rounds on the digits into a fresh folder."""
    count = iter(range(1000))

    def go(**given: Any) -> Outcome:
        out = given.pop("out", tmp_path / f"run{next(count)}")
        return run(quick_config(out, **given))

    return go


@pytest.fixture
def shared_ray() -> str:
    """Start a Ray of two cores in this process, once, and return its address.

    Runs on Ray in this process use it, as they use any Ray that is there. It stays for the tests
    that follow; those that need none begin with ``ray.shutdown()``.
    """
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'fedsam[ray]'")
    if not ray.is_initialized():
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    return str(ray.get_runtime_context().gcs_address)


def quick_config(out: Path, **given: Any) -> Config:
    """Return the config of a run of well under a second."""
    base = {"rounds": 4, "clients": 20, "clients_per_round": 5, "eval_every": 2, "alpha": 1.0}
    return resolve(base | {"out": str(out), "device": "cpu"} | given)


def command(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``python -m fedsam.simulate`` as a user would."""
    call = [sys.executable, "-m", "fedsam.simulate", *arguments]
    return subprocess.run(call, capture_output=True, text=True, cwd=cwd, timeout=120)


def free_port() -> int:
    """Return a port of this machine that nobody listens at, nor is given who asks for any."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def combined(*axes: Sequence[str], plain: Sequence[str], more: int) -> list[tuple[str, ...]]:
    """Return each method beside the plain ones of the other axes, and ``more`` of the rest.

    Which ones follows from the methods' names alone.
    """
    alone = {
        (*plain[:place], name, *plain[place + 1 :])
        for place, names in enumerate(axes)
        for name in names
    }
    rest = sorted(set(itertools.product(*axes)) - alone)
    return sorted(alone) + random.Random(0).sample(rest, min(more, len(rest)))
