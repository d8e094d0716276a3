"""One by one or as a cohort: every way to train a round's clients, checked and measured.

    python benchmarks/cohort.py                       # on the GPU where there is one, else the CPU
    python benchmarks/cohort.py --data-root data      # genuine CIFAR-10, else random images

On a GPU it first runs the tests that need one. Before a way is timed, a round of it must end where
the clients one by one do. Rounds are whole ones: sampling, messages, plans, training, averaging.
"""

import argparse
import json
import logging
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from ours import Ours
from torch import Tensor

from fedsam.base.system import cores
from fedsam.config.schema import resolve
from fedsam.data.images import Batch
from fedsam.engines.threads import on_device
from fedsam.simulate.build.steps import new_gradients
from fedsam.simulate.build.trainer import new_trainer
from fedsam.simulate.joint import run_together
from fedsam.training.batched_gradient import Slots, Vmapped
from fedsam.training.client import Trainer
from fedsam.training.gradient import Loss

ROOT = Path(__file__).resolve().parents[1]
FASHION = Path("/usr/share/datasets")  # where Debian's package puts Fashion-MNIST
TOLERANCE = {"fp32": 1e-3, "tf32": 1e-2, "bf16": 5e-2}  # of the round's update


class Compiled(Vmapped):
    """The batched backward pass, compiled."""

    def __init__(self, trainer: Trainer, clients: int) -> None:
        super().__init__(trainer, clients)
        self._compiled = torch.compile(super().__call__)

    def __call__(
        self, w: Tensor, batch: Batch, loss: Loss, frozen: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return losses (K,) and gradients (K, P) at ``w`` (K, P)."""
        losses, gradients = self._compiled(w, batch, loss, frozen)
        return losses, gradients


def race(ways: dict[str, Ours], seconds: float) -> dict[str, list[float]]:
    """Return each way's rounds a second over five spans of time, taken in turn."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(5):
        for name, way in ways.items():
            begin, rounds = time.perf_counter(), 0
            while (spent := time.perf_counter() - begin) < seconds / 5 or not rounds:
                way.round()
                rounds += 1
                spent = time.perf_counter() - begin
            rates[name].append(rounds / spent)
    return rates


def measure(title: str, options: dict[str, Any], preset: str, on_gpu: bool, seconds: float) -> None:
    """Print a table of the ways for one workload."""
    config = resolve(options | {"out": "", "rounds": 10**6}, preset)
    made = new_trainer(config)
    ways: dict[str, tuple[type[Slots | Vmapped] | None, bool]] = {
        "one by one": (None, False),
        "slots": (Slots, False),
        "vmap": (Vmapped, False),
    }
    if on_gpu:
        ways |= {
            "slots, CUDA graph": (Slots, True),
            "vmap, CUDA graph": (Vmapped, True),
            "vmap compiled, CUDA graph": (Compiled, True),
        }
    print(f"\n{title}")
    print("| way | rounds a second | least to most | to one by one | first two rounds |")
    print("| --- | ---: | ---: | ---: | ---: |")
    with on_device(made[0].layout.device, config.precision):
        reference = Ours(config, made).round()
        moved = float((reference - made[1].state).norm())
        usable, starts = {}, {}
        for name, (gradients, capture) in ways.items():
            begin = time.perf_counter()
            way = Ours(config, made, gradients=gradients, capture=capture)
            apart = float((way.round() - reference).norm()) / moved
            if apart > TOLERANCE[config.precision]:
                print(f"| {name} | not the same: the update differs by {apart:.1e} | | | |")
            elif way.batched is not None and way.batched.gradients is None:
                print(f"| {name} | trained one by one | | | |")
            else:
                way.round()
                usable[name], starts[name] = way, time.perf_counter() - begin
        rates = race(usable, seconds)
    for name, mine in rates.items():
        ratio = median(a / b for a, b in zip(mine, rates["one by one"], strict=True))
        spread = f"{min(mine):.2f} to {max(mine):.2f}"
        print(f"| {name} | {median(mine):.2f} | {spread} | {ratio:.2f} | {starts[name]:.1f} s |")
        usable[name].close()


def measure_together(options: dict[str, Any], rounds: int) -> None:
    """Print how many rounds a second all runs together make, as their number grows."""
    print("\nSeveral FedASAM runs in one program")
    print("| runs | rounds a second, of all together | of each |")
    print("| ---: | ---: | ---: |")
    for runs in (1, 2, 5, 10):
        with TemporaryDirectory() as folder:
            configs = [
                resolve(
                    options
                    | {"algorithm": "fedasam", "seed": n, "rho": 0.1 + 0.05 * n, "alpha": 0.0}
                    | {"rounds": rounds, "eval_every": rounds, "out": f"{folder}/{n}"},
                    "paper/cifar10",
                )
                for n in range(runs)
            ]
            outcome = run_together(configs)[0]
            lines = (outcome.folder / "metrics.jsonl").read_text().splitlines()
        seconds = median(json.loads(line)["seconds"] for line in lines[3:])  # warm by then
        print(f"| {runs} | {runs / seconds:.2f} | {1 / seconds:.2f} |")


def profile(options: dict[str, Any], folder: Path) -> None:
    """Print where a GPU's time goes in rounds of FedASAM, and leave a trace to open."""
    config = resolve(options | {"algorithm": "fedasam", "alpha": 0.0, "out": ""}, "paper/cifar10")
    made = new_trainer(config)
    way = Ours(config, made, gradients=new_gradients(config, made[0]), capture=True)
    for _ in range(5):
        way.round()
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as seen:
        for _ in range(10):
            way.round()
    print("\nTen rounds of FedASAM, by kernel")
    print(seen.key_averages().table(sort_by="self_cuda_time_total", row_limit=25))
    folder.mkdir(parents=True, exist_ok=True)
    seen.export_chrome_trace(str(folder / "cohort-trace.json.gz"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", default="", help="folder with CIFAR-10 (else random images)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--seconds", type=float, default=5.0, help="of timed rounds, each way")
    parser.add_argument("--trace", type=Path, help="folder for a profiler trace (GPU only)")
    parser.add_argument("--tiny", action="store_true", help="start, and measure next to nothing")
    given = parser.parse_args()
    logging.getLogger("fedsam").setLevel(logging.WARNING)
    on_gpu = given.device != "cpu" and torch.cuda.is_available()
    name = torch.cuda.get_device_name() if on_gpu else f"{cores()} cores"
    print(f"{name}, torch {torch.__version__}, Python {platform.python_version()}")
    torch.set_num_threads(1)  # on a CPU: one core for every way
    logging.getLogger("flwr").setLevel(logging.ERROR)
    small = {"device": given.device, "threads": 1}
    if given.tiny:
        measure("fedavg, digits, 10 clients of 14", small, "", on_gpu, 0.0)
        return
    if on_gpu:
        tests = [sys.executable, "-m", "pytest", "-m", "gpu", str(ROOT / "tests")]
        subprocess.run(tests, cwd=ROOT, check=False)
    options = small | {"data_root": given.data_root or "none", "dataset": "shapes:cifar10"}
    for precision in ("fp32", "tf32", "bf16") if on_gpu else ("fp32",):
        for algorithm in ("fedavg", "fedasam"):
            more = {"precision": precision, "algorithm": algorithm, "alpha": 0.0, "rho": 0.1}
            title = f"{algorithm}, the paper's CNN, CIFAR-10, 5 clients of 500, {precision}"
            measure(title, options | more, "paper/cifar10", on_gpu, given.seconds)
    measure("fedavg, digits, 10 clients of 14", small, "", on_gpu, given.seconds)
    if FASHION.exists():
        mlp = small | {"dataset": "fashion-mnist", "data_root": str(FASHION), "batch_size": 10}
        title = "fedavg, MLP, Fashion-MNIST, 10 clients of 600, mini-batches of 10"
        measure(title, mlp, "", on_gpu, given.seconds)
    if on_gpu:
        measure_together(options | {"precision": "bf16"}, 60)
        if given.trace:
            profile(options | {"precision": "bf16"}, given.trace)


if __name__ == "__main__":
    main()
