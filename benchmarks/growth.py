"""How a round grows: with clients a round, and with clients in the population.

    python benchmarks/growth.py
    python benchmarks/growth.py --only ray --rounds 200      # beside the local engine

Every number of clients runs in a process of its own, through ``simulate.run.run``; the rounds
are played in turn. In the table of populations each client holds one image of 1 x 8 x 8 random
pixels and takes 10 steps with it, so that a round is the same work in every population.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from threading import Thread
from typing import Any

import torch
from contest import Contestant, environment, ratio, serve, take_turns

from fedsam.base.system import cores
from fedsam.config.schema import resolve
from fedsam.data.partitions.splits import METHODS
from fedsam.simulate.build.data import load_dataset, split
from fedsam.simulate.run import run

HERE = Path(__file__).resolve().parent
ALWAYS = {"device": "cpu", "eval_every": 10**6, "quiet": True}
TABLES = ("cohorts", "ray", "populations", "splits")
DIGITS = {"clients": 100}
ENGINES = ("local", "ray")
COHORTS: tuple[int, ...] = (1, 10, 100)
POPULATIONS = {100: "hundred", 10_000: "ten_thousand", 1_000_000: "million"}
SPLITS: dict[str, dict[str, int]] = {
    "dirichlet": {},
    "iid": {},
    "shards": {"shards": 1},
    "quantity": {},
}


def serve_run(given: dict) -> None:
    """Play the rounds of a whole run, as told on standard input."""
    told: SimpleQueue[bool] = SimpleQueue()
    seconds: SimpleQueue[float] = SimpleQueue()

    def watch(line: dict[str, Any]) -> None:
        if line["round"]:
            seconds.put(line["seconds"])
        told.get()

    def play() -> float:
        told.put(True)
        return seconds.get()

    Thread(target=run, args=(resolve(given), watch), daemon=True).start()
    serve(play)


def contestants(runs: dict[str, dict], folder: Path) -> Iterator[Contestant]:
    """Start a process for each run."""
    for number, (name, keys) in enumerate(runs.items()):
        given = ALWAYS | {"rounds": 10**6, "out": str(folder / str(number))} | keys
        command = [sys.executable, str(HERE / "growth.py"), "--serve", json.dumps(given)]
        yield Contestant(name, command, folder / f"{number}.log")


def compete(runs: dict[str, dict], rounds: int) -> None:
    """Time the runs in turn and print a table, ratios to the first."""
    folder = Path(tempfile.mkdtemp(prefix="fedsam-growth-"))
    try:
        players = list(contestants(runs, folder))
        take_turns(players, rounds)
        print("| | to the first | ms a round (min to max) | start-up, s | peak memory, MB |")
        print("| --- | --- | --- | --- | --- |")
        for player in players:
            ms = [1e3 * s for s in player.seconds]
            times = f"{median(ms):.2f} ({min(ms):.2f} to {max(ms):.2f})"
            base = ratio(player.seconds, players[0].seconds)
            start_up = player.start_up
            memory = player.close()
            print(f"| {player.name} | {base:.2f} | {times} | {start_up:.1f} | {memory:.0f} |")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def partition_times(populations: Mapping[int, str]) -> None:
    """Print how long each way of splitting takes."""
    print("| partition | " + " | ".join(f"{n:,} clients" for n in populations) + " |")
    print("| --- |" + " --- |" * len(populations))
    sets = {n: load_dataset(resolve({"dataset": f"shapes:{s}"})) for n, s in populations.items()}
    for name, options in SPLITS.items():
        assert name in METHODS
        cells = []
        for clients, dataset in sets.items():
            config = resolve(
                {
                    "clients": clients,
                    "partition": name,
                    "partition_options": options,
                    "alpha": 1.0,
                }
            )
            begin = time.perf_counter()
            split(config, dataset)
            cells.append(f"{time.perf_counter() - begin:.3f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def cohort_times(cohorts: Sequence[int], rounds: int) -> None:
    """Time the local engine with so many clients a round."""
    print("\nClients a round of 100, digits, --engine local\n")
    compete({f"{n}": DIGITS | {"clients_per_round": n} for n in cohorts}, rounds // 2)


def ray_times(cohorts: Sequence[int], rounds: int) -> None:
    """Time Ray beside the local engine, both with as many threads or actors as there are cores."""
    for n in cohorts:
        print(f"\n{n} clients a round of 100, digits, --engine\n")
        compete({e: DIGITS | {"clients_per_round": n, "engine": e} for e in ENGINES}, rounds)


def population_times(populations: Mapping[int, str], rounds: int) -> None:
    """Time the local engine with so many clients in the population."""
    print("\nClients in the population, 10 a round, --engine local\n")
    same = {"partition": "iid", "local_steps": 10, "model": "digits-cnn"}
    runs = {
        f"{n:,}": same | {"clients": n, "dataset": f"shapes:{s}"} for n, s in populations.items()
    }
    compete(runs, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50, help="timed rounds of each number")
    parser.add_argument("--only", choices=TABLES, help="measure one of the tables")
    parser.add_argument("--tiny", action="store_true", help="start, and measure next to nothing")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve_run(json.loads(given.serve))
        return
    rounds, cohorts, populations = given.rounds, COHORTS, POPULATIONS
    tables = [given.only] if given.only else list(TABLES)
    if given.tiny:
        rounds, cohorts, populations = 2, (1,), {100: "hundred"}
        tables = [table for table in tables if table != "ray"]  # its start takes ten seconds
    os.environ["PYTHONPATH"] = environment()["PYTHONPATH"]
    print(f"{cores()} cores, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    if "cohorts" in tables:
        cohort_times(cohorts, rounds)
    if "ray" in tables:
        ray_times(cohorts, rounds)
    if "populations" in tables:
        population_times(populations, rounds)
    if "splits" in tables:
        print("\nSeconds to split as many images, one each\n")
        partition_times(populations)


if __name__ == "__main__":
    main()
