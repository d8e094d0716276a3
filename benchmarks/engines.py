"""Engines side by side: fedsam's, Flower's simulation runtime, a bare PyTorch loop, pfl.

    python benchmarks/engines.py                                   # random images for the CNN
    python benchmarks/engines.py --data-root data --pfl pflenv/bin/python

--pfl is the Python of another environment that has pfl[pytorch]. The work is the same for all:
model, first weights, split, mini-batches. Nobody is timed whose weights after one round differ
from the local engine's. Then rounds are played in turn; Flower's runtime cannot be told when to
play, so its rounds are one block, compared with local rounds before and after it.
"""

import argparse
import json
import logging
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import yaml
from contest import (
    ROOT,
    Contestant,
    end,
    environment,
    marked,
    peak_memory,
    ratio,
    serve,
    take_turns,
    tree,
)
from local import Bare
from ours import Ours
from safetensors.numpy import load_file
from torch import Tensor

from fedsam.base.system import cores
from fedsam.config.schema import Config, dump, resolve
from fedsam.simulate.build.data import load_dataset
from fedsam.simulate.build.trainer import new_trainer

HERE = Path(__file__).resolve().parent
WORKLOADS: dict[str, tuple[str, dict[str, Any]]] = {  # what is trained: config file, keys over it
    "cnn": ("paper/cifar10", {"dataset": "shapes:cifar10", "clients_per_round": 10}),
    "mlp": (
        "digits",
        {
            "dataset": "shapes:fashion_mnist",
            "model": "mlp",
            "partition": "iid",
            "batch_size": 10,
            "lr": 0.05,
        },
    ),
    "digits": ("digits", {}),
    "tiny": ("digits", {"clients": 4, "clients_per_round": 2, "alpha": 100.0}),
}
LONGER = {"cnn": 1, "mlp": 3, "digits": 5, "tiny": 1}  # rounds of short workloads, times --rounds
TOLERANCE = {"fp32": 1e-4, "bf16": 0.05}  # relative to the largest weight
PATIENCE = 240  # seconds without a new round after which Flower's run is given up
Weights = Mapping[str, np.ndarray]


class Mismatch(SystemExit):
    """Somebody does other work than the local engine."""


def config_of(workload: str, precision: str, data_root: str) -> Config:
    """Return the config of a workload."""
    file, keys = WORKLOADS[workload]
    root = str(Path(data_root).resolve()) if data_root else str(HERE / "none")
    return resolve(keys | {"data_root": root, "precision": precision, "device": "cpu"}, file)


def flat(config: Config) -> dict[str, Any]:
    """Return a config's keys, as its YAML file has them."""
    keys: dict[str, Any] = yaml.safe_load(dump(config))
    return keys


def serve_engine(engine: str, given: dict) -> None:
    """Play one engine's rounds in this process, as told on standard input."""
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    config = resolve(given)
    if engine == "bare":
        trainer, initial = new_trainer(config)
        bf16 = config.precision == "bf16"
        cohort, threads = config.clients_per_round, config.threads
        player: Ours | Bare = Bare(trainer, initial, cohort, threads, bf16=bf16, lr=config.lr)
        layout = trainer.layout
    else:
        player = Ours(config)
        layout = player.trainer.layout
    last = torch.empty(0)

    def play() -> float:
        nonlocal last
        begin = time.perf_counter()
        last = player.round()
        return time.perf_counter() - begin

    def save(path: str) -> None:
        np.savez(path, allow_pickle=False, **arrays(layout.read(last)))

    serve(play, save)


def arrays(named: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in named.items()}


def hand_over(config: Config, folder: Path) -> None:
    """Write what pfl's side needs: tensors as a NumPy archive, settings as JSON."""
    dataset = load_dataset(config)
    trainer, initial = new_trainer(config)
    folder.mkdir()
    np.savez(
        folder / "data.npz",
        allow_pickle=False,
        images=dataset.train_images.numpy(),
        labels=dataset.train_labels.numpy(),
        indices=trainer.partition.indices.numpy(),
        offsets=trainer.partition.offsets.numpy(),
        **{f"w:{k}": v for k, v in arrays(initial.layout.read(initial.state)).items()},
    )
    model, work = type(trainer.new_module()), trainer.work
    settings = {
        "model": [model.__module__, model.__name__],
        "classes": dataset.classes,
        "mean": dataset.mean,
        "std": dataset.std,
        "work": {"batch_size": work.batch_size, "local_epochs": work.local_epochs},
        "augmentations": [[type(a).__name__, vars(a)] for a in work.augmentations],
        "seed": config.seed,
        "cohort": config.clients_per_round,
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "bf16": trainer.bf16,
    }
    (folder / "settings.json").write_text(json.dumps(settings))


def weights(contestant: Contestant, path: Path) -> Weights:
    contestant.ask(f"save {path}")
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def check(name: str, mine: Weights, reference: Weights, tolerance: float) -> None:
    """Refuse who does other work than the local engine."""
    if set(mine) != set(reference):
        raise Mismatch(f"{name}: other weights: {sorted(set(mine) ^ set(reference))}")
    error = max(float(np.abs(mine[k] - reference[k]).max()) for k in reference)
    error /= max(float(np.abs(reference[k]).max()) for k in reference)
    if not error <= tolerance:
        raise Mismatch(f"{name}: not the same work: its weights differ by {error:.1e}")


def commands(config: Config, folder: Path, pfl: str) -> dict[str, list[str]]:
    """Return the contestants that are told when to play, and what starts them."""
    many = cores()

    def engine(name: str, **more: object) -> list[str]:
        given = json.dumps(flat(config) | more)
        return [sys.executable, str(HERE / "engines.py"), "--serve", name, given]

    found = {
        f"fedsam local, {many} threads": engine("local", threads=many),
        f"fedsam ray, {many} actors": engine("ray", engine="ray", workers=many),
        f"bare loop, {many} compute threads": engine("bare", threads=many),
        "bare loop, 1 compute thread": engine("bare", threads=1),
    }
    if pfl:
        hand_over(config, folder / "pfl")
        script = [str(HERE / "pfl_loop.py"), str(folder / "pfl")]
        found[f"pfl, 1 process of {many} threads"] = [pfl, *script, "--threads", str(many)]
        run = [pfl, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(many)]
        found[f"pfl, {many} processes"] = run + script
    return found


class FlowerRun:
    """One ``flwr run .`` from start to end, watched from outside.

    Parameters
    ----------
    config : Config
        What is run.
    rounds : int
        Rounds, of which the first is not timed.
    folder : Path
        Does not exist yet.
    cpus : int
        CPUs that Flower reserves for a client, of the machine's: 2 by default.
    """

    def __init__(self, config: Config, rounds: int, folder: Path, cpus: int) -> None:
        folder.mkdir()
        self.out, self.log, home = folder / "out", folder / "log", folder / "home"
        keys = flat(config) | {"rounds": rounds, "eval_every": 10**6, "out": str(self.out)}
        defaults = flat(resolve({}))
        settings = {k.replace("_", "-"): v for k, v in keys.items() if v != defaults.get(k)}
        text = " ".join(
            f'{k}="{v}"' if isinstance(v, str) else f"{k}={str(v).lower()}"
            for k, v in settings.items()
        )
        flwr = Path(sys.executable).with_name("flwr")
        nodes = f"num-supernodes={config.clients} client-resources-num-cpus={cpus}"
        call = [str(flwr), "run", str(ROOT), "--stream", "--run-config", text]
        call += ["--federation-config", nodes]
        extra = {
            "FLWR_HOME": str(home),
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "PATH": f"{flwr.parent}{os.pathsep}{os.environ['PATH']}",
        }
        home.mkdir()
        self.memory = 0.0
        begin = time.perf_counter()
        with self.log.open("w") as log:
            process = subprocess.Popen(
                call, stdout=log, stderr=log, env=environment() | extra, cwd=folder
            )
        try:
            self._follow(process.pid, str(home), begin)
        finally:
            end(tree(marked(str(home)) | {process.pid}))
            process.wait()
        self.seconds = [line["seconds"] for line in self._lines() if line["round"] > 1]
        self.start_up = self.until_first - median(self.seconds)

    def _lines(self) -> list[dict]:
        path = self.out / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]

    def _follow(self, pid: int, mark: str, begin: float) -> None:
        """Wait for the summary; note when the first round was there, and the memory."""
        self.until_first, seen, last = 0.0, 0, time.perf_counter()
        while not (self.out / "summary.json").exists():
            lines, now = len(self._lines()), time.perf_counter()
            if lines >= 2 and not self.until_first:
                self.until_first = now - begin
            if lines > seen:
                seen, last = lines, now
                self.memory = max(self.memory, peak_memory(tree(marked(mark) | {pid})))
            if now - last > PATIENCE:
                raise SystemExit(f"flwr run: no round for {PATIENCE} s; its log:\n{self._tail()}")
            time.sleep(0.1)

    def _tail(self) -> str:
        return "\n".join(self.log.read_text().splitlines()[-15:])


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def row(name: str, seconds: list[float], to_local: float, start_up: float, memory: float) -> None:
    spread = f"{median(seconds):.4f} ({min(seconds):.4f} to {max(seconds):.4f})"
    print(f"| {name} | {to_local:.2f} | {spread} | {start_up:.1f} | {memory:.0f} |", flush=True)


def compete(config: Config, rounds: int, pfl: str, flower_cpus: list[int], folder: Path) -> None:
    """Check and time all engines on one workload, and print its table."""
    tolerance = TOLERANCE[config.precision]
    contestants: list[Contestant] = []
    reference: Weights = {}
    for number, (name, command) in enumerate(commands(config, folder, pfl).items()):
        contestant = Contestant(name, command, folder / f"{number}.log")
        contestants.append(contestant)
        mine = weights(contestant, folder / f"{number}.npz")
        reference = reference or mine
        check(name, mine, reference, tolerance)
    print("| engine | to local | seconds a round (min to max) | start-up, s | memory, MB |")
    print("| --- | --- | --- | --- | --- |")
    take_turns(contestants, rounds)
    local = contestants[0]
    final = weights(local, folder / "final.npz")
    flower_rows = []
    for cpus in flower_cpus:
        before = local.seconds[-rounds:]
        run = FlowerRun(config, rounds + 1, folder / f"flower{cpus}", cpus)
        name = f"Flower's simulation, {cpus} CPU a client"
        check(name, load_file(run.out / "model.safetensors"), final, tolerance)
        take_turns([local], rounds)
        beside = median(before + local.seconds[-rounds:])
        to_local = median(run.seconds) / beside
        flower_rows.append((name, run.seconds, to_local, run.start_up, run.memory))
    for contestant in contestants:
        contestant.seconds = contestant.seconds[:rounds]
        to_local = ratio(contestant.seconds, local.seconds)
        start_up = contestant.start_up
        row(contestant.name, contestant.seconds, to_local, start_up, contestant.close())
    for flower_row in flower_rows:
        row(*flower_row)
    if not pfl:
        print("| pfl | not installed | | | |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", default="", help="folder with CIFAR-10 (else random images)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (short ones: more)")
    parser.add_argument("--workload", default="all", choices=[*WORKLOADS, "all"])
    parser.add_argument("--precision", default="all", choices=[*TOLERANCE, "all"])
    parser.add_argument("--pfl", default="", help="Python of an environment that has pfl")
    parser.add_argument("--tiny", action="store_true", help="start, and measure next to nothing")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve_engine(given.serve[0], json.loads(given.serve[1]))
        return
    if given.tiny:
        given.workload, given.precision, given.rounds = "tiny", "fp32", 1
    load = os.getloadavg()[0]
    print(
        f"{cores()} cores, {platform.machine()}, load {load:.1f}, Python "
        f"{platform.python_version()}, torch {torch.__version__}, flwr {version('flwr')}, "
        f"ray {version('ray')}"
    )
    os.environ["PYTHONPATH"] = environment()["PYTHONPATH"]
    everything = [name for name in WORKLOADS if name != "tiny"]
    for workload in everything if given.workload == "all" else [given.workload]:
        for precision in TOLERANCE if given.precision == "all" else [given.precision]:
            config = config_of(workload, precision, given.data_root)
            print(f"\n{workload}, {precision}, {config.clients_per_round} clients a round\n")
            flower_cpus = [1, 2] if precision == "fp32" else [1]
            if given.tiny:  # its start takes half a minute, and is played by tests/engines
                flower_cpus = []
            folder = Path(tempfile.mkdtemp(prefix="fedsam-bench-"))
            try:
                rounds = given.rounds * LONGER[workload]
                compete(config, rounds, given.pfl, flower_cpus, folder)
            finally:
                shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
