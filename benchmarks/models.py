"""Seconds of a client's round, model by model: ``python benchmarks/models.py``, for docs/models.md.

500 random images of 3 x 32 x 32, crop and flip, mini-batches of 64, SGD, fp32, one thread. CPU
time, of which other processes on the machine take little; the smaller of two rounds after a first
one.
"""

import argparse
import logging
import time

import torch
from ours import Ours

from fedsam.config.schema import resolve

MODELS: list[tuple[str, dict[str, str]]] = [
    *[("mlp", {}), ("cnn", {}), ("vit", {})],
    *[
        (name, {"norm": norm})
        for name in ("resnet20", "wrn16-4", "mobilenet-v2", "resnet18")
        for norm in ("group", "batch")
    ],
]
CLIENT = {"clients": 1, "clients_per_round": 1, "partition": "iid", "lr": 0.01}
WORK = {"batch_size": 64, "augment": "crop+flip", "device": "cpu", "threads": 1}


def seconds(name: str, options: dict[str, str], dataset: str) -> tuple[int, float]:
    """Return a model's parameters, and the seconds of a client's round."""
    model = {"dataset": dataset, "model": name, "model_options": options}
    ours = Ours(resolve(CLIENT | WORK | model))
    taken = []
    for _ in range(3):
        begin = time.process_time()
        ours.round()
        taken.append(time.process_time() - begin)
    ours.close()
    return ours.trainer.layout.trainable, min(taken[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="start, and measure next to nothing")
    given = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print("| `--model` | norm | parameters | seconds |\n| --- | --- | --- | --- |")
    for name, options in MODELS[:1] if given.tiny else MODELS:
        dataset = "shapes:a_few" if given.tiny else "shapes:one_client"
        parameters, taken = seconds(name, options, dataset)
        row = f"| `{name}` | {options.get('norm', '')} | {parameters:,} | {taken:.2f} |"
        print(row, flush=True)


if __name__ == "__main__":
    main()
