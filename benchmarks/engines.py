"""Engines side by side: fedsam's, bare PyTorch loops, BlazeFL, FedJAX, pfl, Flower's simulation.

    python benchmarks/engines.py                                   # random images for the CNN
    python benchmarks/engines.py --data-root data --pfl pflenv/bin/python
    python benchmarks/engines.py --workload digits --only local pfl --pfl pflenv/bin/python

--pfl is the Python of another environment that has pfl[pytorch], NumPy and PyTorch; so with the
other frameworks. The work is the same for all: model, first weights, split, mini-batches. Nobody is
timed whose weights after one round differ from the local engine's. Then rounds are played in turn;
Flower's runtime cannot be told when to play, so its rounds are one block, compared with local
rounds before and after it. Another framework that ends, is too slow or does other work gets a line
that says so.
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
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import yaml
from contest import (
    LIMIT,
    ROOT,
    Contestant,
    Ended,
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
from fedsam.training.batched_gradient import Vmapped

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
    # all of a population: 1,437 images, so each client has one or two
    "crowd": ("digits", {"clients": 1000, "clients_per_round": 1000, "partition": "iid"}),
    "tiny": ("digits", {"clients": 4, "clients_per_round": 2, "alpha": 100.0}),
}
LONGER = {
    "cnn": 1,
    "mlp": 3,
    "digits": 5,
    "crowd": 1,
    "tiny": 1,
}  # rounds of short workloads, times --rounds
TOLERANCE = {"fp32": 1e-4, "bf16": 0.05}  # relative to the largest weight
PEERS = ("blazefl", "fedjax", "pfl")
VERSIONS = """
import sys, sysconfig
from importlib.metadata import distributions
names = {d.name: d.version for d in distributions() if d.name in (sys.argv[1], "jax", "torch")}
python = sys.version.split()[0] + "t" * bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
print(", ".join(f"{n} {v}" for n, v in sorted(names.items())), "on Python", python)
"""
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
        player = Ours(config, gradients=Vmapped if engine == "vmap" else None)
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
    """Write what other frameworks' Pythons read: a NumPy archive, and settings as JSON."""
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


def saved(contestant: Contestant, path: Path) -> Weights:
    """Return a contestant's global model."""
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


def commands(config: Config) -> dict[str, list[str]]:
    """Return fedsam's engines and the bare loops, and what starts them."""
    many = cores()

    def engine(name: str, **more: object) -> list[str]:
        given = json.dumps(flat(config) | more)
        return [sys.executable, str(HERE / "engines.py"), "--serve", name, given]

    return {
        f"fedsam local, {many} threads": engine("local", threads=many, processes=0),
        f"fedsam local, {many} processes": engine("local", processes=many),
        "fedsam local, --cohort vmap": engine("vmap"),
        f"fedsam ray, {many} actors": engine("ray", engine="ray", workers=many),
        f"bare loop, {many} compute threads": engine("bare", threads=many),
        "bare loop, 1 compute thread": engine("bare", threads=1),
    }


def peer_commands(folder: Path, pythons: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the other frameworks that are told when to play, and what starts them."""
    many = cores()

    def peer(name: str, way: str, *launcher: str) -> list[str]:
        call = [pythons[name], *launcher, str(HERE / "peer.py"), name, str(folder)]
        return [*call, "--way", way, "--workers", str(many)]

    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(many)]
    rows = {
        f"BlazeFL, {many} threads": peer("blazefl", "threads"),
        f"BlazeFL, {many} processes": peer("blazefl", "processes"),
        "FedJAX, jit": peer("fedjax", "threads"),
        f"FedJAX, pmap over {many} devices": peer("fedjax", "devices"),
        f"pfl, 1 process of {many} threads": peer("pfl", "threads"),
        f"pfl, {many} processes": peer("pfl", "processes", *torchrun),
    }
    return {row: command for row, command in rows.items() if command[0]}


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
    limit : float
        Seconds without a new round after which the run is given up.
    """

    def __init__(self, config: Config, rounds: int, folder: Path, cpus: int, limit: float) -> None:
        folder.mkdir()
        self.limit = limit
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
            if now - last > self.limit:
                raise Ended(f"flwr run: no round for {self.limit:.0f} s; {self._last_line()}")
            time.sleep(0.1)

    def _last_line(self) -> str:
        return (self.log.read_text().strip().splitlines() or ["it wrote nothing"])[-1]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def row(name: str, seconds: list[float], to_local: float, start_up: float, memory: float) -> None:
    spread = f"{median(seconds):.4f} ({min(seconds):.4f} to {max(seconds):.4f})"
    print(f"| {name} | {to_local:.2f} | {spread} | {start_up:.1f} | {memory:.0f} |", flush=True)


def line(name: str, why: str) -> None:
    print(f"| {name} | {why.removeprefix(f'{name}: ')} | | | |", flush=True)


def enter(
    config: Config, folder: Path, pythons: Mapping[str, str], only: Sequence[str], limit: float
) -> tuple[list[Contestant], dict[str, str]]:
    """Start all contestants, the local engine first, and check that they do the same work.

    Returns
    -------
    list of Contestant
        Who may play.
    dict
        Other frameworks that may not, and why.
    """
    ours = commands(config)
    first = next(iter(ours))
    chosen = {n: c for n, c in ours.items() if n == first or is_wanted(n, only)}
    theirs = {
        n: c for n, c in peer_commands(folder / "given", pythons).items() if is_wanted(n, only)
    }
    if theirs:
        hand_over(config, folder / "given")
    contestants: list[Contestant] = []
    out: dict[str, str] = {}
    reference: Weights = {}
    for number, (name, command) in enumerate((chosen | theirs).items()):
        if config.precision != "fp32" and name.startswith("FedJAX"):
            out[name] = "fp32 only"
            continue
        try:
            log = folder / f"{number}.log"
            contestant = Contestant(name, command, log, limit=limit)
            weights = saved(contestant, folder / f"{number}.npz")
            reference = reference or weights
            check(name, weights, reference, TOLERANCE[config.precision])
        except (Ended, Mismatch) as error:
            if name not in theirs:
                raise
            out[name] = str(error)
        else:
            contestants.append(contestant)
    return contestants, out


def is_wanted(name: str, only: Sequence[str]) -> bool:
    return not only or any(word.lower() in name.lower() for word in only)


def compete(
    config: Config,
    rounds: int,
    folder: Path,
    *,
    pythons: Mapping[str, str],
    flower_cpus: list[int],
    only: Sequence[str],
    limit: float,
) -> None:
    """Check and time all engines on one workload, and print its table."""
    contestants, out = enter(config, folder, pythons, only, limit)
    print("| engine | to local | seconds a round (min to max) | start-up, s | memory, MB |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    take_turns(contestants, rounds, out)
    local = contestants[0]
    final = saved(local, folder / "final.npz")
    beside = list(local.seconds)
    for contestant in contestants:
        if contestant.name not in out:
            to_local = ratio(contestant.seconds, beside)
            start_up = contestant.start_up
            memory = contestant.memory() if contestant is local else contestant.close()
            row(contestant.name, contestant.seconds, to_local, start_up, memory)
    for name, why in out.items():
        line(name, why)
    for cpus in flower_cpus:
        name = f"Flower's simulation, {cpus} CPU a client"
        if not is_wanted(name, only):
            continue
        before = local.seconds[-rounds:]
        try:
            run = FlowerRun(config, rounds + 1, folder / f"flower{cpus}", cpus, limit)
            check(
                name, load_file(run.out / "model.safetensors"), final, TOLERANCE[config.precision]
            )
        except (Ended, Mismatch) as error:
            line(name, str(error))
            continue
        take_turns([local], rounds)
        to_local = median(run.seconds) / median(before + local.seconds[-rounds:])
        row(name, run.seconds, to_local, run.start_up, run.memory)
    local.close()
    for peer, python in pythons.items():
        if not python:
            line(peer, "not installed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", default="", help="folder with CIFAR-10 (else random images)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (short ones: more)")
    parser.add_argument("--workload", default="all", choices=[*WORKLOADS, "all"])
    parser.add_argument("--precision", default="all", choices=[*TOLERANCE, "all"])
    parser.add_argument(
        "--only", nargs="+", default=[], help="rows with one of these words in them"
    )
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds a round may take")
    for peer in PEERS:
        parser.add_argument(f"--{peer}", default="", help=f"Python of an environment with {peer}")
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
    pythons = {peer: getattr(given, peer) for peer in PEERS}
    for peer, python in pythons.items():
        if python:
            print(
                subprocess.run(
                    [python, "-c", VERSIONS, peer], capture_output=True, text=True
                ).stdout,
                end="",
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
                compete(
                    config,
                    rounds,
                    folder,
                    pythons=pythons,
                    flower_cpus=flower_cpus,
                    only=given.only,
                    limit=given.limit,
                )
            finally:
                shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
