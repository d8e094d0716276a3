"""What partial training saves: ``python benchmarks/partial.py``, for docs/pretrained.md.

torchvision's ViT-B/16 on random images of 224 x 224: two clients of 8 images in mini-batches of 4,
SGD, fp32, a thread each. It begins with a file of random weights for ImageNet's 1,000 classes, as
with a pretrained one; each row is a process of its own. A message is the model as Flower sends it.
Seconds are of the second round; CPU time is that of all threads, of which other processes on the
machine take little.
"""

import argparse
import json
import logging
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from ours import Ours
from safetensors.torch import save_file
from torchvision.models import vit_b_16

from fedsam.config.schema import resolve
from fedsam.messages import VectorRecord
from fedsam.models.vit import ViT

HEAD: dict[str, Any] = {"train": "heads"}
WAYS: dict[str, dict[str, Any]] = {
    "all": {},
    "head": HEAD,
    "head, LoRA of rank 8": HEAD | {"lora": 8},
    "head, LoRA of rank 8 with A fixed": HEAD | {"lora": 8, "lora_options": {"freeze": "a"}},
}
WORK = {"clients": 2, "clients_per_round": 2, "partition": "iid", "batch_size": 4, "lr": 0.01}
SMALL = {"dim": 24, "depth": 1, "heads": 2}
LINE = "| {} | {} | {} | {} | {} | {} |"


def measured(way: str, file: str, *, tiny: bool) -> dict[str, float]:
    """Return what a row says, of this process."""
    model: dict[str, Any] = {"dataset": "shapes:imagenet", "model": "torchvision.models:vit_b_16"}
    if tiny:
        model = {"dataset": "shapes:a_few", "model": "vit", "model_options": SMALL}
    ours = Ours(resolve(WORK | model | WAYS[way] | {"weights": file, "device": "cpu"}))
    ours.round()
    wall, cpu = time.perf_counter(), time.process_time()
    state = ours.round()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    layout = ours.trainer.layout
    sent = sum(len(array.data) for array in VectorRecord(layout, state).values())
    ours.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"trained": layout.trainable, "sent": sent, "wall": wall, "cpu": cpu, "peak": peak}


def in_a_process(way: str, file: str, *, tiny: bool) -> dict[str, float]:
    """Return the same of a process of its own."""
    call = [sys.executable, __file__, "--row", way, file, *(["--tiny"] if tiny else [])]
    done = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True)
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="start, and measure next to nothing")
    parser.add_argument("--row", nargs=2, metavar=("WAY", "FILE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    for name in ("flwr", "fedsam"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if given.row:
        print(json.dumps(measured(*given.row, tiny=given.tiny)))
        return
    heads = ("what trains", "parameters", "MB a message", "wall s", "CPU s", "peak GiB")
    print(LINE.format(*heads), "| --- | --- | --- | --- | --- | --- |", sep="\n")
    with TemporaryDirectory() as folder:
        file = str(Path(folder) / "vit.safetensors")
        torch.manual_seed(0)
        network = ViT((3, 32, 32), 1000, **SMALL) if given.tiny else vit_b_16()
        save_file(network.state_dict(), file)
        del network
        for way in list(WAYS)[-1:] if given.tiny else WAYS:
            row = in_a_process(way, file, tiny=given.tiny)
            sizes = f"{row['trained']:,}", f"{row['sent'] / 1e6:.3f}"
            rest = f"{row['wall']:.1f}", f"{row['cpu']:.1f}", f"{row['peak']:.2f}"
            print(LINE.format(way, *sizes, *rest), flush=True)


if __name__ == "__main__":
    main()
