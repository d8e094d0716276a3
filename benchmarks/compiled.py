"""Compiled steps beside plain ones: steps a second on one core, and what compiling takes.

    python benchmarks/compiled.py                  # random images of CIFAR-10's shape for the CNN
    python benchmarks/compiled.py --data-root data

A step is a client's round by the number of its mini-batches: plan, gather, gradient, descent. Both
ways take turns; the least CPU time of a round counts, as others may use the machine. Compiling is
timed in a process of its own, with an empty folder and then with what that left there.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fedsam.base.system import cores
from fedsam.compiled.steps import FOLDER
from fedsam.config.schema import Config, resolve
from fedsam.engines.threads import computing
from fedsam.simulate.build import steps
from fedsam.simulate.build.trainer import new_trainer
from fedsam.training.client import ClientJob, Failed, Result, Trainer, attempt

FASHION = Path("/usr/share/datasets")  # where Debian's package puts Fashion-MNIST


def workloads(data_root: str) -> dict[str, Config]:
    """Return what is measured, by its name."""
    cifar10 = {"dataset": "shapes:cifar10", "data_root": data_root or "none", "alpha": 0.0}
    fashion = {"dataset": "fashion-mnist", "data_root": str(FASHION), "batch_size": 10}
    every: dict[str, tuple[dict[str, Any], str]] = {"digits CNN": ({}, "")}
    if FASHION.exists():
        every["MLP, Fashion-MNIST"] = fashion, ""
    every["the paper's CNN"] = cifar10, "paper/cifar10"
    return {
        f"{name}, {algorithm}": resolve(
            options | {"algorithm": algorithm, "device": "cpu", "out": "", "compile": True}, file
        )
        for name, (options, file) in every.items()
        for algorithm in ("fedavg", "fedasam")
    }


def trained(trainer: Trainer, job: ClientJob) -> Result:
    """Return what a client returns."""
    done = attempt(trainer, trainer.new_network(), job)
    if isinstance(done, Failed):
        raise done.error or RuntimeError(done.reason)
    return done


def first_round(config: Config) -> float:
    """Return the seconds of a client's first round, in which its step is compiled."""
    trainer, initial = new_trainer(config)
    with computing(trainer):
        begin = time.perf_counter()
        trained(trainer, ClientJob(0, initial.state, 1, config.lr))
    return time.perf_counter() - begin


def in_a_process(name: str, given: argparse.Namespace, folder: str) -> float:
    """Return the seconds of a first round, by a process that compiles into a folder."""
    call = [sys.executable, __file__, "--first", name, "--data-root", given.data_root]
    environment = os.environ | {FOLDER: folder}
    done = subprocess.run(call, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


def measure(name: str, config: Config, given: argparse.Namespace) -> None:
    """Print a row."""
    trainer, initial = new_trainer(config)
    job = ClientJob(0, initial.state, 1, config.lr)
    ways = {"plain": replace(trainer, compiled=None), "compiled": trainer}
    least = dict.fromkeys(ways, float("inf"))
    with computing(trainer):
        ends = {way: trained(of_way, job) for way, of_way in ways.items()}
        moved = (ends["plain"].state - initial.state).norm()
        apart = float((ends["plain"].state - ends["compiled"].state).norm() / moved)
        begin, turns = time.perf_counter(), 0
        while time.perf_counter() - begin < given.seconds or not turns:
            for way, of_way in ways.items():
                spent = time.thread_time()
                trained(of_way, job)
                least[way] = min(least[way], time.thread_time() - spent)
            turns += 1
    rates = {way: ends["plain"].steps / seconds for way, seconds in least.items()}
    with TemporaryDirectory() as folder:
        count = 0 if given.tiny else 2
        cold_warm = [f"{in_a_process(name, given, folder):.1f}" for _ in range(count)]
    cold, warm = cold_warm or ["", ""]
    print(
        f"| {name} | {rates['plain']:.0f} | {rates['compiled']:.0f} "
        f"| {rates['compiled'] / rates['plain']:.2f} | {apart:.0e} | {cold} | {warm} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", default="", help="folder with CIFAR-10 (else random images)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timed rounds, each row")
    parser.add_argument("--first", default="", help="only time the first round of one row")
    parser.add_argument("--tiny", action="store_true", help="start, and measure next to nothing")
    given = parser.parse_args()
    steps.PAYS_FROM = 0
    every = workloads(given.data_root)
    if given.first:
        print(first_round(every[given.first]))
        return
    print(f"{cores()} cores, torch {torch.__version__}, Python {platform.python_version()}")
    print("| steps a second, one core | plain | compiled | | apart | cold, s | warm, s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    if given.tiny:
        given.seconds, every = 0.0, dict(list(every.items())[:1])
    for name, config in every.items():
        measure(name, config, given)


if __name__ == "__main__":
    main()
