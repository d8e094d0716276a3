"""Threads: every core its own model, one client or one batch of images at a time."""

import ctypes
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedsam.base.system import Stop
from fedsam.base.timers import WAITING, carried, timed
from fedsam.data.groups import Places
from fedsam.data.images import Images
from fedsam.tasks import answer_of
from fedsam.training import batchnorm
from fedsam.training.client import ClientJob, Failed, Result, Trainer, attempt, longest_first
from fedsam.training.flat_module import FlatModule

Item = TypeVar("Item")
Output = TypeVar("Output")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt, in bytes
# fixed, as what is summed must not depend on the number of threads or on a machine's caches
EVALUATION_BATCH = 500  # images
EVALUATION_PIXELS = (
    128 * 32 * 32
)  # on a CPU: what layers make of more has left the caches when read
LEAST_BATCH = 16  # but so many of any size, for what a layer does once a batch


@contextmanager
def one_compute_thread() -> Iterator[None]:
    """Let what is summed on this thread not depend on the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def on_device(device: torch.device, precision: str) -> Iterator[None]:
    """Let new streams and graphs be on this GPU, its float32 products TF32's or exact ones.

    A CPU's are exact, whatever ``torch.set_float32_matmul_precision`` said.
    """
    on_gpu = "tf32" if precision == "tf32" else "ieee"
    backends: Any = torch.backends
    wanted = {
        **dict.fromkeys((backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn), on_gpu),
        **dict.fromkeys(
            (backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn), "ieee"
        ),
    }
    before = {operation: operation.fp32_precision for operation in wanted}
    for operation, value in wanted.items():
        operation.fp32_precision = value
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            yield
    finally:
        for operation, value in before.items():
            operation.fp32_precision = value


@contextmanager
def computing(trainer: Trainer) -> Iterator[None]:
    """Let this process compute as a trainer says: what every engine enters where clients train."""
    with one_compute_thread(), on_device(trainer.layout.device, trainer.precision):
        yield


def keep_freed_memory() -> None:
    """Let glibc keep what the threads free, for their next step.

    By default it hands large blocks back to the kernel, which clears them again page by page: with
    two threads on the paper's CNN, 98,000 page faults and 7% of a round. Elsewhere: does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)  # its upper limit
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def evaluated_at_a_time(images: Images) -> int:
    """Return how many images go through a network together where it is evaluated."""
    most = images.at_a_time(EVALUATION_BATCH)
    if images.padded.device.type != "cpu":
        return most
    return min(most, max(LEAST_BATCH, EVALUATION_PIXELS // (images.height * images.width)))


class ThreadExecutor:
    """Threads with one compute thread each, and as many networks of the model.

    Parameters
    ----------
    trainer : Trainer
        What they work on.
    threads : int
        How many; results do not depend on it.
    stop : Stop, optional
        Asked before each piece of work whether to go on.
    upcoming : callable
        From a round to the clients that the run will most likely train in it.
    """

    def __init__(
        self,
        trainer: Trainer,
        threads: int,
        stop: Stop | None = None,
        upcoming: Callable[[int], list[int]] = lambda round: [],
    ) -> None:
        keep_freed_memory()
        self.trainer = trainer
        self.number = threads
        self.upcoming = upcoming
        self._stop = stop or Stop()
        self._networks: SimpleQueue[FlatModule] = SimpleQueue()
        for _ in range(threads):
            self._networks.put(trainer.new_network())
        self._pool = ThreadPoolExecutor(
            threads, "fedsam", initializer=torch.set_num_threads, initargs=(1,)
        )

    @timed(WAITING)
    def map(
        self,
        work: Callable[[FlatModule, Item], Output],
        items: Sequence[Item],
        *,
        to_the_end: bool = False,
    ) -> list[Output]:
        """Return ``work(network, item)`` for each item; they are started in the given order.

        ``to_the_end``: also where the run was asked to stop.
        """

        def run(item: Item) -> Output:
            if not to_the_end:
                self._stop.check()
            network = self._networks.get()
            try:
                return work(network, item)
            finally:
                self._networks.put(network)

        return list(self._pool.map(carried(run), items))

    def train(
        self, jobs: Sequence[ClientJob], trainers: Sequence[Trainer] | None = None
    ) -> list[Result | Failed]:
        """Train clients, as many at a time as there are threads; results are in the jobs' order.

        Each by this executor's trainer, or, where jobs of several runs come together, by its own.
        """
        if jobs and trainers is None and self.trainer.train.stored:
            following = jobs[0].round + 1
            self.trainer.expect(self.upcoming(following), following)
        mine = trainers or [self.trainer] * len(jobs)
        order = longest_first([t.steps(job.client) for t, job in zip(mine, jobs, strict=True)])
        done = self.map(lambda network, n: attempt(mine[n], network, jobs[n]), order)
        by_number = dict(zip(order, done, strict=True))
        return [by_number[number] for number in range(len(jobs))]

    def evaluate(
        self, state: Tensor, images: Images, rows: Tensor | None = None
    ) -> dict[str, float]:
        """Return the task's metrics of a model (S,) on some images (all if ``rows`` is None)."""
        rows = torch.arange(len(images)) if rows is None else rows

        def work(network: FlatModule, batch: Tensor) -> Tensor:
            return self.trainer.statistics(network, state, images, batch)[0]

        parts = self.map(work, rows.split(evaluated_at_a_time(images)))
        return self.trainer.task.metrics(torch.stack(parts).sum(0))

    def evaluate_by_group(
        self, state: Tensor, images: Images, places: Places
    ) -> tuple[dict[str, float], dict[int, dict[str, float]]]:
        """Return the task's metrics of a model (S,) on all images, and on each group's, by number.

        Every image goes through the model once; groups without images have no metrics.
        """

        def work(network: FlatModule, rows: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
            inside = places.within(int(rows[0]), int(rows[-1]) + 1)
            whole, *parts = self.trainer.statistics(
                network, state, images, rows, list(inside.values())
            )
            return whole, dict(zip(inside, parts, strict=True))

        chunks = torch.arange(len(images)).split(evaluated_at_a_time(images))
        wholes, totals = [], dict[int, Tensor]()
        for whole, parts in self.map(work, chunks):
            wholes.append(whole)
            for group, part in parts.items():
                totals[group] = totals[group] + part if group in totals else part
        metrics = self.trainer.task.metrics
        by_group = {group: metrics(totals[group]) for group in sorted(totals)}
        return metrics(torch.stack(wholes).sum(0)), by_group

    def answers(self, state: Tensor, images: Images, rows: Tensor) -> Tensor | None:
        """Return what a model (S,) says of each pixel of some images, if the task is of that kind.

        Also of a run that was asked to stop.
        """
        trainer = self.trainer

        def work(network: FlatModule, rows: Tensor) -> Tensor | None:
            network.load(state)
            network.module.eval()
            with torch.no_grad(), trainer.drawing("evaluation", int(rows[0])):
                output = network.forward(images.rows(rows.to(trainer.layout.device)).images)
            return answer_of(trainer.task, output)

        (answer,) = self.map(work, [rows], to_the_end=True)
        return answer

    def update_bn(self, state: Tensor, images: Images, rows: Tensor) -> Tensor:
        """Return a model (S,) with BatchNorm statistics of some images, not augmented.

        Also of a run that was asked to stop: the model that it leaves has them, too.
        """
        layout = self.trainer.layout

        def work(network: FlatModule, batch: Tensor) -> Tensor:
            pixels = images.rows(batch.to(layout.device)).images
            return batchnorm.of_batch(network, state, pixels)

        # of one size, as each counts the same
        batches = rows.tensor_split(math.ceil(len(rows) / images.at_a_time(EVALUATION_BATCH)))
        return batchnorm.updated(state, self.map(work, batches, to_the_end=True), layout)

    def close(self) -> None:
        """End the threads; work that has not begun is dropped."""
        self._pool.shutdown(cancel_futures=True)
