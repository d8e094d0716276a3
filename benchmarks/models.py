"""Seconds of a client's round, model by model: ``python benchmarks/models.py``, for docs/models.md.

500 random images of 3 x 32 x 32, crop and flip, mini-batches of 64, SGD, fp32, one thread. CPU
time, of which other processes on the machine take little; the smaller of two rounds after a short
one.
"""

import time

import torch
from fedsam.clients.corrections.fedavg import FedAvg
from fedsam.clients.minimizers.sgd import SGD

from fedsam.base.vector import Layout
from fedsam.config.plugins import find
from fedsam.data.images import Images
from fedsam.data.partition import Partition
from fedsam.data.plan import Work
from fedsam.engines.threads import keep_freed_memory
from fedsam.tasks.classification import Classification
from fedsam.training.client import ClientJob, Trainer
from fedsam.training.method import Method

CLIENT = Partition(torch.arange(500), torch.tensor([0, 500]))
MODELS = [
    *[("mlp", {}), ("cnn", {}), ("vit", {})],
    *[
        (name, {"norm": norm})
        for name in ("resnet20", "wrn16-4", "mobilenet-v2", "resnet18")
        for norm in ("group", "batch")
    ],
]


def seconds(name: str, options: dict[str, str]) -> tuple[int, float]:
    """Return a model's parameters, and the seconds of a client's round."""
    module = find("model", name, "fedsam.models")((3, 32, 32), 10, **options)
    pixels = torch.randint(0, 256, (500, 3, 32, 32), dtype=torch.uint8)
    images = Images(pixels, torch.arange(500) % 10, (0.5,) * 3, (0.25,) * 3, padding=4)
    layout, method, task = Layout.of(module), Method(SGD(), FedAvg()), Classification()
    taken = []
    for work in (Work(64, local_steps=1), *2 * [Work(64, crop=4, flip=True)]):
        trainer = Trainer(images, images, CLIENT, lambda: module, layout, method, task, work, 0)
        network = trainer.new_network()
        begin = time.process_time()
        trainer.train_client(network, ClientJob(0, network.state.clone(), 1, 0.01))
        taken.append(time.process_time() - begin)
    return layout.trainable, min(taken[1:])


if __name__ == "__main__":
    torch.set_num_threads(1)
    keep_freed_memory()
    print("| `--model` | norm | parameters | seconds |\n| --- | --- | --- | --- |")
    for name, options in MODELS:
        parameters, taken = seconds(name, options)
        row = f"| `{name}` | {options.get('norm', '')} | {parameters:,} | {taken:.2f} |"
        print(row, flush=True)
