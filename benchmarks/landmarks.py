"""A population of Landmarks-User-160k's size, from CSV files to the first round's model.

    python benchmarks/landmarks.py

164,172 images for training and 19,526 for testing, those of a class alike, are made as small JPEG
files in the layout of the Google Landmarks Dataset v2, with the CSV files of 1,262 users whose
numbers of images are log-normal, 4 at least. They are packed, and a round of
``configs/paper/landmarks.yaml`` is played with 50 clients, with a small network and with
MobileNetV2 at ImageNet's strides. Making and packing are processes of their own, so that the peak
memory is that of the runs.
"""

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fedsam.base.system import cores
from fedsam.config.schema import resolve
from fedsam.pack.__main__ import main as pack
from fedsam.simulate.build.data import load_dataset, split
from fedsam.simulate.run import run

USERS, IMAGES, TESTS, CLASSES, COHORT = 1_262, 164_172, 19_526, 2_028, 50
LEAST, SPREAD = 4, 1.1  # images of a user; standard deviation of their logarithm
SCATTER = 0x9E3779B97F4A7C15  # an odd number, so that ids of 64 bits are all different
NETWORKS: dict[str, dict[str, Any]] = {  # the second is the paper's
    "cnn": {},
    "mobilenet-v2": {"strides": "imagenet"},
}
BLOCKS = 4  # colours along a side of an image


def sizes(users: int, images: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Return how many images each user holds."""
    shares = np.exp(SPREAD * generator.standard_normal(users))
    held = LEAST + np.floor(shares / shares.sum() * (images - LEAST * users)).astype(np.int64)
    held[: images - held.sum()] += 1
    return held


def picture(blocks: NDArray[np.uint8], side: int) -> bytes:
    """Return a JPEG of smooth colours, a third wider than high."""
    file = BytesIO()
    size = (side * 4 // 3, side)
    Image.fromarray(blocks).resize(size, Image.Resampling.BILINEAR).save(file, "JPEG")
    return file.getvalue()


def make(folder: Path, users: int, images: int, tests: int, classes: int, side: int) -> None:
    """Write CSV files and images."""
    generator = np.random.default_rng(0)
    total = images + tests
    labels = generator.permutation(np.arange(images) % classes)
    labels = np.concatenate([labels, generator.integers(classes, size=tests)])
    owners = np.repeat(np.arange(users), sizes(users, images, generator))
    names = [f"{(n + 1) * SCATTER % 2**64:016x}" for n in range(total)]
    for kind in {name[:3] for name in names}:
        (folder / "train" / Path(*kind)).mkdir(parents=True, exist_ok=True)
    pictures = [
        picture(blocks, side)
        for blocks in generator.integers(0, 256, (classes, BLOCKS, BLOCKS, 3), dtype=np.uint8)
    ]
    for name, label in zip(names, labels, strict=True):
        (folder / "train" / Path(*name[:3]) / f"{name}.jpg").write_bytes(pictures[label])
    lines = zip(owners, names[:images], labels[:images], strict=True)
    _write(folder / "federated_train.csv", "user_id,image_id,class", lines)
    _write(folder / "test.csv", "image_id,class", zip(names[images:], labels[images:], strict=True))


def _write(path: Path, header: str, lines: Iterator[tuple[Any, ...]]) -> None:
    path.write_text("\n".join([header, *(",".join(map(str, line)) for line in lines)]) + "\n")


def in_process(act: Callable[..., Any], *arguments: Any) -> float:
    """Return the seconds that a process takes."""
    begin = time.perf_counter()
    process = get_context("fork").Process(target=act, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{act.__name__} failed")
    return time.perf_counter() - begin


def packed(source: str, out: str, side: int) -> None:
    """Pack, and exit with the command's code."""
    sys.exit(pack(["landmarks", source, out, "--side", str(side)]))


@contextmanager
def timed(what: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    say(what, f"{time.perf_counter() - begin:.2f} s")


def say(what: str, value: str) -> None:
    print(f"| {what} | {value} |", flush=True)


def memory() -> float:
    """Return the most memory that this process had so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure(folder: Path, given: dict[str, Any]) -> None:
    """Load what was packed, split it, and play a round with each network."""
    config = resolve(given, "paper/landmarks")
    say("resident memory before, everything imported", f"{memory():.2f} GB")
    with timed("open the packed folder"):
        dataset = load_dataset(config)
    with timed("split by owners"):
        partition = split(config, dataset)
    held = partition.sizes
    say("images a client", f"{int(held.min())} to {int(held.max())}, median {int(held.median())}")
    del dataset, partition
    for model, options in NETWORKS.items():
        network = {"model": model, "model_options": options, "out": str(folder / model)}
        lines: list[dict[str, Any]] = []
        begin = time.perf_counter()
        run(resolve(given | network, "paper/landmarks"), lines.append)
        seconds = time.perf_counter() - begin
        summary = json.loads((folder / model / "summary.json").read_text())
        parameters = f"{summary['parameters']:,}"
        clients = lines[-1]["clients"]
        work = f"{len(clients)} clients, {int(held[clients].sum()):,} images"
        say(f"{model}, {parameters} parameters: round 1, {work}", f"{lines[-1]['seconds']:.1f} s")
        say(f"{model}: all of this run, two evaluations", f"{seconds:.1f} s")
        say(f"{model}: peak resident memory", f"{memory():.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=32, help="pixels, 32 at least (default: 32)")
    parser.add_argument("--tiny", action="store_true", help="start, and measure next to nothing")
    given = parser.parse_args()
    users, images, tests, classes, cohort = USERS, IMAGES, TESTS, CLASSES, COHORT
    if given.tiny:
        users, images, tests, classes, cohort = 5, 60, 10, 7, 2
    folder = Path(tempfile.mkdtemp(prefix="fedsam-landmarks-"))
    try:
        print(f"{cores()} cores, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}\n")
        print(f"| {images:,} + {tests:,} images, {users:,} users, side {given.side} | |")
        print("| --- | --- |")
        source, out = folder / "source", folder / "packed"
        seconds = in_process(make, source, users, images, tests, classes, given.side)
        say("make the images (no part of fedsam)", f"{seconds:.0f} s")
        seconds = in_process(packed, str(source), str(out), given.side)
        size = sum(file.stat().st_size for file in out.iterdir())
        say("pack them", f"{seconds:.0f} s, {size / 1e6:.0f} MB")
        run_of = {
            "dataset": str(out),
            "clients": users,
            "clients_per_round": cohort,
            "rounds": 1,
            "device": "cpu",
            "quiet": True,
        }
        measure(folder, run_of)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
