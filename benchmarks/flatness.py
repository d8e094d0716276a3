"""The largest eigenvalue of a Hessian: fedsam beside PyHessian and curvlinops.

    python benchmarks/flatness.py --data-root data --images 5000
    python benchmarks/flatness.py --data-root data --images 0      # all 50,000: hours on two cores

The paper's CNN after two rounds, so that its loss is no flat plain; all see the same images in the
same mini-batches, in their own way of a product with H: fedsam differentiates twice backwards, so
does PyHessian, curvlinops takes a Jacobian forwards of the gradient. First one product of each
with the same vector must agree; then products are timed in turn; then each searches lambda_1 to a
relative 0.001 as its users do: Lanczos, SciPy's eigsh on curvlinops' operator, PyHessian's power
iteration. The peers get PyTorch's own convolutions. What is not installed is left out.
"""

import argparse
import copy
import logging
import os
import platform
import time
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from statistics import median
from typing import Any

import numpy as np
import torch
from local import options
from ours import Ours
from torch import Tensor, nn

from fedsam.flatness.measures.hessian import TOLERANCE, Spectrum
from fedsam.flatness.objective import Objective
from fedsam.training.flat_module import FlatModule

Searched = tuple[float, int]  # lambda_1, and how many products it took
CHUNK = 128
AGREE = 2e-3  # a ReLU or a maximum that rounding turns over changes a product that much


class Fedsam:
    """Products and search as the measure ``hessian`` has them."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def product(self, v: Tensor) -> Tensor:
        return self.objective.curvature(self.objective.w, v)

    def search(self, start: Tensor) -> Searched:
        spectrum = Spectrum.of(self.objective, start, 1)
        return spectrum.top[0], spectrum.products


class Peer:
    """What a library's user has: a module, a loss, mini-batches."""

    package = ""

    def __init__(self, module: nn.Module, objective: Objective) -> None:
        self.module = module
        self.layout = objective.layout
        batches = map(objective.images.rows, objective.rows.split(objective.chunk))
        self.batches = [(batch.images, batch.targets) for batch in batches]
        self.count = 0
        self.prepare()

    def prepare(self) -> None:
        """Make the library's own object."""

    def parts(self, v: Tensor) -> list[Tensor]:
        return [entry.view(v).contiguous() for entry in self.layout.parameters]


class PyHessian(Peer):
    """Its products over mini-batches, and its power iteration."""

    package = "pyhessian"

    def prepare(self) -> None:
        self.hessian = import_module(self.package).hessian(
            self.module, nn.functional.cross_entropy, dataloader=self.batches, cuda=False
        )
        inner = self.hessian.dataloader_hv_product

        def counted(v: list[Tensor]) -> Any:
            self.count += 1
            return inner(v)

        self.hessian.dataloader_hv_product = counted

    def product(self, v: Tensor) -> Tensor:
        return self.layout.concatenate(self.hessian.dataloader_hv_product(self.parts(v))[1])

    def search(self, start: Tensor) -> Searched:
        self.count = 0
        torch.manual_seed(0)
        values, _ = self.hessian.eigenvalues(maxIter=100, tol=TOLERANCE, top_n=1)
        return float(values[0]), self.count


class Curvlinops(Peer):
    """Its linear operator, and SciPy's search on it."""

    package = "curvlinops"

    def prepare(self) -> None:
        named = dict(self.module.named_parameters())
        self.operator = import_module(self.package).HessianLinearOperator(
            self.module,
            nn.CrossEntropyLoss(),
            [named[entry.name] for entry in self.layout.parameters],
            self.batches,
            check_deterministic=False,
        )

    def product(self, v: Tensor) -> Tensor:
        self.count += 1
        return self.layout.concatenate(self.operator @ self.parts(v))

    def search(self, start: Tensor) -> Searched:
        from scipy.sparse.linalg import LinearOperator, eigsh

        self.count = 0
        size = len(start)

        def matvec(v: Any) -> Any:
            return self.product(torch.from_numpy(np.asarray(v, np.float32).ravel())).numpy()

        operator = LinearOperator((size, size), matvec=matvec, dtype=np.float32)
        found = eigsh(operator, 1, which="LA", tol=TOLERANCE, v0=start.numpy())
        return float(found[0][0]), self.count


def plain(module: nn.Module) -> nn.Module:
    """Give a module PyTorch's own convolutions, where fedsam's model has others."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            layer.__class__ = nn.Conv2d
    return module


def contestants_of(objective: Objective) -> dict[str, Any]:
    """Return who measures an objective, by name: the peers that are installed, and fedsam."""
    module = plain(copy.deepcopy(objective.network.module)).eval()
    for parameter in module.parameters():  # a user's own tensors are no views of a vector
        parameter.data = parameter.data.clone()
    contestants: dict[str, Any] = {}
    for kind in (PyHessian, Curvlinops):
        if find_spec(kind.package) is None:
            print(f"{kind.package}: not installed")
        else:
            contestants[kind.package] = kind(copy.deepcopy(module), objective)
    return contestants | {"fedsam": Fedsam(objective)}


def check(contestants: Mapping[str, Any], v: Tensor) -> None:
    """Refuse to time who has another product."""
    reference = contestants["fedsam"].product(v)
    for name, one in contestants.items():
        off = float((one.product(v) - reference).norm() / reference.norm())
        if off > AGREE:
            raise SystemExit(f"{name}: not the same product: it differs by {off:.1e}")


def products(contestants: Mapping[str, Any], v: Tensor, turns: int) -> dict[str, list[list[float]]]:
    """Return CPU seconds and seconds of products that are made in turn, by name."""
    seconds: dict[str, list[list[float]]] = {name: [[], []] for name in contestants}
    for _ in range(turns):
        for name, one in contestants.items():
            begin = time.process_time(), time.perf_counter()
            one.product(v)
            end = time.process_time(), time.perf_counter()
            for times, a, b in zip(seconds[name], begin, end, strict=True):
                times.append(b - a)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", default="", help="folder with CIFAR-10 (else random images)")
    parser.add_argument("--images", type=int, default=1024, help="training images; 0: all")
    parser.add_argument("--turns", type=int, default=3, help="timed products of each")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="compute threads")
    parser.add_argument("--no-search", action="store_true", help="time products alone")
    parser.add_argument("--tiny", action="store_true", help="start, and measure next to nothing")
    given = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1 if given.tiny else given.threads)

    run = Ours(options(given.data_root, tiny=given.tiny)(threads=1))
    state = [run.round() for _ in range(2)][-1]
    run.close()
    trainer = run.trainer
    images = 64 if given.tiny else given.images or len(trainer.train)
    order = torch.randperm(len(trainer.train), generator=torch.Generator().manual_seed(0))
    network, rows = FlatModule(trainer.new_module()), order[:images].sort().values
    network.load(state)
    objective = Objective(
        network, state, trainer.task, trainer.train, rows, chunk=32 if given.tiny else CHUNK
    )
    contestants = contestants_of(objective)
    start = torch.randn(len(objective.w), generator=torch.Generator().manual_seed(1))
    v = start / start.norm()
    check(contestants, v)
    seconds = products(contestants, v, 1 if given.tiny else given.turns)
    begin = time.process_time()
    objective.gradient(objective.w)
    slope = time.process_time() - begin
    print(
        f"{len(objective.w):,} parameters, {images:,} images, {objective.chunk} at a time; torch "
        f"{torch.__version__}, {torch.get_num_threads()} compute threads, {platform.machine()}, "
        f"load {os.getloadavg()[0]:.1f}; a gradient: {slope:.2f} CPU seconds\n\n"
        "| | CPU seconds a product (min) | seconds (min) | to fedsam, median | lambda_1 | products "
        "| CPU seconds |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    for name, one in contestants.items():
        cpu, wall = seconds[name]
        ratio = median(a / b for a, b in zip(cpu, seconds["fedsam"][0], strict=True))
        row = f"| {name} | {min(cpu):.2f} | {min(wall):.2f} | {ratio:.2f} |"
        if given.no_search:
            print(f"{row} | | |")
            continue
        begin = time.process_time()
        value, count = one.search(start)
        used = time.process_time() - begin
        print(f"{row} {value:.5g} | {count} | {used:.1f} |", flush=True)


if __name__ == "__main__":
    main()
