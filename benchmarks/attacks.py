"""What a fifth of hostile clients does to an accuracy, by attack and by defence.

    python benchmarks/attacks.py --json attacks.json     # the table of docs/reliability.md

Digits, an MLP with BatchNorm, 15 clients that all train in each round, three of them hostile. What
they return is forged between the engine and the server, as bytes; the rest is a run like any other.
"""

import argparse
import gc
import json
import logging
import platform
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import torch
from flwr.app import Message, MessageType, RecordDict
from torch import Tensor, nn

from fedsam.base.errors import TrainingError
from fedsam.base.system import cores
from fedsam.base.vector import Layout
from fedsam.config.schema import Config, resolve
from fedsam.data.datasets import Dataset
from fedsam.data.sources.load import load
from fedsam.engines.flower import partition_answer
from fedsam.engines.local import LocalGrid
from fedsam.engines.threads import ThreadExecutor
from fedsam.messages import (
    ARRAYS,
    EXAMPLES,
    VectorRecord,
    model_of,
    only_record,
    plain_content,
    state_of,
)
from fedsam.server.grids import GridView
from fedsam.simulate.build.trainer import new_trainer
from fedsam.simulate.run import run

CLIENTS, HOSTILE = 15, 3  # n = 4 f + 3, as Bulyan needs; Krum needs 2 f + 3
SETTING: dict[str, Any] = {
    "clients": CLIENTS,
    "clients_per_round": CLIENTS,
    "rounds": 10,
    "eval_every": 10,
    "local_steps": 4,
    "lr": 0.2,
    "batch_size": 32,
    "dataset": "attacks:digits",
    "model": "attacks:Normed",
    "device": "cpu",
    "threads": 1,
    "quiet": True,
    "checkpoint_every": "0",
}
SPLITS: dict[str, dict[str, Any]] = {
    "IID": {"partition": "iid"},
    "Dirichlet, alpha 1": {"alpha": 1.0},
}
FLOWER = "flwr.serverapp.strategy:"
KRUM = {"num_malicious_nodes": HOSTILE}
TRIMMED = {"strategy": f"{FLOWER}FedTrimmedAvg", "strategy_options": {"beta": HOSTILE / CLIENTS}}
DEFENCES: dict[str, dict[str, Any]] = {
    "FedAvg": {},
    "FedAvg, --weighting equal": {"weighting": "equal"},
    "FedAvg, --max-norm 5": {"max_norm": 5.0},
    "FedAvg, --clip-norm 3": {"clip_norm": 3.0},
    "FedMedian": {"strategy": f"{FLOWER}FedMedian"},
    "FedTrimmedAvg": TRIMMED,
    "Krum": {"strategy": f"{FLOWER}Krum", "strategy_options": KRUM},
    "MultiKrum": {
        "strategy": f"{FLOWER}MultiKrum",
        "strategy_options": KRUM | {"num_nodes_to_select": CLIENTS - 2 * HOSTILE - 3},
        "weighting": "equal",
    },
    "Bulyan": {"strategy": f"{FLOWER}Bulyan", "strategy_options": KRUM},
    "FedASAM + SWA, FedTrimmedAvg": TRIMMED
    | {"algorithm": "fedasam", "rho": 0.2, "swa": True, "swa_start": 6, "swa_cycle": 2},
}


@cache
def _digits() -> Dataset:
    return load("digits", Path())


def digits() -> Dataset:
    """Return the digits, read once, with labels of the caller's own."""
    return replace(_digits(), train_labels=_digits().train_labels.clone())


class Normed(nn.Sequential):
    """64, 64 units with BatchNorm, 10."""

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        inputs = shape[0] * shape[1] * shape[2]
        super().__init__(
            nn.Flatten(),
            nn.Linear(inputs, 64),
            nn.BatchNorm1d(64),
            nn.ReLU(),
            nn.Linear(64, classes),
        )


def sign_flip(layout: Layout, before: Tensor, state: Tensor) -> Tensor:
    """Return w - (w_k - w): an update as long as an honest one."""
    return longer(layout, before, state, -1.0)


def large_norm(layout: Layout, before: Tensor, state: Tensor) -> Tensor:
    """Return w - 100 (w_k - w)."""
    return longer(layout, before, state, -100.0)


def longer(layout: Layout, before: Tensor, state: Tensor, factor: float) -> Tensor:
    """Return w + factor (w_k - w), with the buffers of an honest client."""
    P = layout.trainable
    return torch.cat([before[:P] + factor * (state[:P] - before[:P]), state[P:]])


def batchnorm_poison(layout: Layout, before: Tensor, state: Tensor) -> Tensor:
    """Return an honest model whose BatchNorm variances are 1e20."""
    entries = dict(layout.read(state.clone()))
    huge = {name: torch.full_like(entries[name], 1e20) for name in entries if "running_var" in name}
    return layout.write(entries | huge)


def not_a_number(layout: Layout, before: Tensor, state: Tensor) -> Tensor:
    """Return NaN."""
    return torch.full_like(state, torch.nan)


def honest(layout: Layout, before: Tensor, state: Tensor) -> Tensor:
    """Return what was trained."""
    return state


Forge = Callable[[Layout, Tensor, Tensor], Tensor]
# what is returned in place of the trained state, the examples that are named, the labels learnt
ATTACKS: dict[str, tuple[Forge, int | None, bool]] = {
    "none": (honest, None, False),
    "sign flip": (sign_flip, None, False),
    "large norm": (large_norm, None, False),
    "BatchNorm poison": (batchnorm_poison, None, False),
    "label flip": (honest, None, True),
    "NaN": (not_a_number, None, False),
    "sign flip, 1e6 examples": (sign_flip, 10**6, False),
}


class HostileGrid(GridView):
    """The local engine as nodes of Flower's, of which the first few are hostile.

    Parameters
    ----------
    grid : LocalGrid
        Trains; of hostile clients with labels 9 - y, where they learn wrong ones.
    attack : str
        Which of ``ATTACKS``.
    hostile : int
        How many.
    """

    def __init__(self, grid: LocalGrid, attack: str, hostile: int = HOSTILE) -> None:
        super().__init__(grid)
        self.layout, self.hostile = grid.trainer.layout, hostile
        self.forge, self.examples, flipped = ATTACKS[attack]
        if flipped:
            data = grid.trainer.train
            rows = torch.cat([grid.trainer.partition[client] for client in range(hostile)])
            data.targets[rows] = data.targets.max() - data.targets[rows]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Answer the roll call; let the clients train, and forge what the hostile ones return."""
        sent = list(messages)
        if all(message.metadata.message_type == MessageType.QUERY for message in sent):
            return [partition_answer(message, message.metadata.dst_node_id) for message in sent]
        replies = self.grid.send_and_receive(sent, timeout=timeout)
        models = {m.metadata.dst_node_id: model_of(m.content) for m in sent}
        for reply in replies:
            if reply.metadata.src_node_id < self.hostile:
                before = state_of(models[reply.metadata.src_node_id], self.layout)
                self._lie(reply.content, before)
            reply.content = plain_content(reply.content)
        return replies

    def _lie(self, content: RecordDict, before: Tensor) -> None:
        state = state_of(model_of(content), self.layout)
        content[ARRAYS] = VectorRecord(self.layout, self.forge(self.layout, before, state))
        if self.examples:
            only_record(content.metric_records)[EXAMPLES] = self.examples


def accuracy(config: Config, attack: str) -> float:
    """Return the final accuracy, NaN if the run could not go on."""
    trainer, _ = new_trainer(config)
    threads = ThreadExecutor(trainer, 1)
    try:
        outcome = run(config, flower=HostileGrid(LocalGrid(threads), attack))
    except TrainingError:
        return float("nan")
    finally:
        threads.close()
    return float(outcome.summary["final_accuracy"])


def cell(accuracies: list[float]) -> str:
    """Return mean and standard deviation in percent; how many runs ended early."""
    ended = sum(value != value for value in accuracies)
    if ended:
        return f"ended ({ended} of {len(accuracies)})"
    spread = stdev(accuracies) if len(accuracies) > 1 else 0.0
    return f"{100 * mean(accuracies):.1f} ± {100 * spread:.1f}"


def measure(
    title: str, setting: dict[str, Any], defences: Iterable[str], seeds: int
) -> Iterable[dict[str, Any]]:
    """Print a table, a row a defence; yield each run's accuracy."""
    print(f"\n{title}\n")
    print("| defence | " + " | ".join(ATTACKS) + " |")
    print("| --- |" + " ---: |" * len(ATTACKS))
    for defence in defences:
        cells = []
        for attack in ATTACKS:
            found = []
            for seed in range(seeds):
                with TemporaryDirectory() as folder:
                    keys = SETTING | setting | DEFENCES[defence]
                    config = resolve(keys | {"seed": seed, "out": f"{folder}/run"})
                    found.append(accuracy(config, attack))
                yield {
                    "split": title,
                    "defence": defence,
                    "attack": attack,
                    "seed": seed,
                    "accuracy": None if found[-1] != found[-1] else found[-1],
                }
            cells.append(cell(found))
        print(f"| {defence} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs of each cell")
    parser.add_argument("--split", choices=SPLITS, action="append", help="which (all)")
    parser.add_argument("--defence", choices=DEFENCES, action="append", help="which (all)")
    parser.add_argument("--json", type=Path, help="file for each run's accuracy")
    parser.add_argument("--tiny", action="store_true", help="start, and measure next to nothing")
    given = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    logging.getLogger("fedsam").setLevel(logging.ERROR)
    print(f"{cores()} cores, torch {torch.__version__}, Python {platform.python_version()}")
    gc.freeze()  # Flower's Bulyan collects garbage for each array of each client
    runs: list[dict[str, Any]] = []
    if given.tiny:
        tiny = SPLITS["IID"] | {"rounds": 1, "local_steps": 1}
        runs += measure("IID, one round", tiny, ["FedTrimmedAvg"], 1)
    else:
        for title in given.split or SPLITS:
            runs += measure(title, SPLITS[title], given.defence or DEFENCES, given.seeds)
    if given.json:
        given.json.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
