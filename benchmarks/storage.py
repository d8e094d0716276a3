"""What it costs that pixels lie in files: decoding, and a run's time and memory.

    python benchmarks/storage.py

A data set of made images is packed as JPEG and raw, and trained from memory and from both, each in
a process of its own. The network, a small MLP, takes next to no time, so that reading is seen. A
rate is that of the fastest of many, as other work on the machine does not make it faster.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fedsam.base.system import cores
from fedsam.config.schema import resolve
from fedsam.data.datasets import Dataset
from fedsam.data.sources.listing import Listing, Part
from fedsam.data.sources.packed_folder import packed
from fedsam.data.sources.pictures import Encoded
from fedsam.data.store import Store
from fedsam.pack.writer import encoded, write
from fedsam.simulate.run import run

CLASSES, NOISE = (
    10,
    6,
)  # NOISE: standard deviation of a pixel, so that a JPEG is as large as a photo


def made(images: int, side: int, seed: int) -> Part:
    """Return images of smooth colours with noise."""
    generator = np.random.default_rng(seed)
    files = []
    for number in range(images):
        blocks = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(blocks).resize((side, side), Image.Resampling.BICUBIC))
        noisy = smooth + generator.normal(0, NOISE, smooth.shape)
        pixels = noisy.clip(0, 255).astype(np.uint8)
        files.append(Encoded(str(number), encoded(pixels, "jpeg")))
    return Part(files, np.arange(images, dtype=np.int64) % CLASSES)


def in_memory(folder: Path) -> Dataset:
    """Return the data set with its pixels in memory: a --dataset of its own."""
    dataset = packed(folder / "raw")

    def read(store: Store) -> torch.Tensor:
        return store.read(torch.arange(len(store))).permute(0, 3, 1, 2)

    train, test = read(dataset.train_images), read(dataset.test_images)
    return replace(dataset, train_images=train, test_images=test)


def decode(folder: Path, threads: int) -> None:
    """Print how many images a second so many threads decode."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    store = packed(folder / "jpeg").train_images
    rows = torch.randperm(len(store))
    fastest, cpu = 0.0, time.process_time()
    for chunk in rows.split(200):
        begin = time.perf_counter()
        store.read(chunk)
        fastest = max(fastest, len(chunk) / (time.perf_counter() - begin))
    each = f"{(time.process_time() - cpu) / len(rows) * 1000:.2f} ms an image"
    print(f"| decode JPEG, threads: {threads} | {fastest:,.0f} images/s | {each} | |", flush=True)


def train(folder: Path, where: str, rounds: int) -> None:
    """Print the time and the memory of a run from somewhere."""
    dataset = "storage:in_memory" if where == "memory" else str(folder / where)
    given: dict[str, Any] = {"dataset": dataset, "data_root": str(folder), "rounds": rounds}
    given |= {"partition": "iid", "model": "mlp", "model_options": {"hidden": 4}, "lr": 0.001}
    given |= {"eval_every": rounds, "device": "cpu", "checkpoint_every": 0}
    before = peak()
    lines: list[dict[str, Any]] = []
    cpu: list[float] = []

    def watch(line: dict[str, Any]) -> None:
        lines.append(line)
        cpu.append(time.process_time())

    run(resolve(given | {"out": str(folder / f"run {where}")}), watch)
    fastest = min(line["seconds"] for line in lines if line["round"]) * 1000
    each = f"{(cpu[-1] - cpu[0]) / rounds * 1000:.0f} ms a round"
    after = f"{peak() - before:.2f} GB over {before:.2f}"
    print(f"| train from {where} | {fastest:.0f} ms a round | {each} | {after} |", flush=True)


def peak() -> float:
    """Return the most memory that this process had so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=3000, help="for training (default: 3000)")
    parser.add_argument("--side", type=int, default=192, help="pixels (default: 192)")
    parser.add_argument("--rounds", type=int, default=20, help="of 10 of 100 clients (default: 20)")
    parser.add_argument("--tiny", action="store_true", help="start, and measure next to nothing")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)  # of the work, and its folder
    given = parser.parse_args()
    if given.tiny:
        given.images, given.side, given.rounds = 200, 16, 1
    if given.part:
        what, folder = given.part[0], Path(given.part[1])
        if what.isdecimal():
            return decode(folder, int(what))
        return train(folder, what, given.rounds)
    print(f"{cores()} cores, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}\n")
    print(f"| {given.images:,} images, {given.side} x {given.side} | fastest | CPU time | bytes |")
    print("| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(prefix="fedsam-storage-") as name:
        folder = Path(name)
        parts = made(given.images, given.side, 0), made(given.images // 10, given.side, 1)
        listing = Listing("made", *parts, tuple(map(str, range(CLASSES))))
        for encoding in ("jpeg", "raw"):
            begin = time.perf_counter()
            write(folder / encoding, listing, side=given.side, encoding=encoding)
            seconds = time.perf_counter() - begin
            size = sum(file.stat().st_size for file in (folder / encoding).iterdir()) / 1e6
            rate = f"{1.1 * given.images / seconds:,.0f} images/s"
            print(f"| pack as {encoding} | {rate} | | {size:,.0f} MB |", flush=True)
        for what in ("1", "2", "memory", "raw", "jpeg"):
            if given.tiny and what in ("1", "memory", "raw"):  # a start would take 50 times as long
                decode(folder, 1) if what == "1" else train(folder, what, given.rounds)
                continue
            words = ["--rounds", str(given.rounds), "--part", what, name]
            done = subprocess.run([sys.executable, __file__, *words], stderr=subprocess.PIPE)
            if done.returncode:
                sys.exit(done.stderr.decode()[-4000:])


if __name__ == "__main__":
    main()
