"""Several runs at once: the clients of all of them train as one cohort.

A run that leaves most of a GPU idle leaves room for others: seeds, splits, rho, learning rates,
strategies. Each keeps its own model, plans and server, and ends where it would have ended alone.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from threading import Condition
from typing import Any

from fedsam.base.errors import TrainingError, UsageError, flag
from fedsam.base.system import Stop
from fedsam.config.schema import Config, keys
from fedsam.engines.batched import BatchedPrograms, BatchedRun
from fedsam.engines.local import LocalGrid
from fedsam.engines.threads import computing, one_compute_thread
from fedsam.runs.checkpoint import Snapshot
from fedsam.runs.folder import RunDir
from fedsam.simulate.build.steps import new_gradients
from fedsam.simulate.build.trainer import new_trainer, pinned
from fedsam.simulate.opening import tell
from fedsam.simulate.run import Outcome, new_threads, play_out, upcoming, warm_up
from fedsam.training.batched import stacked
from fedsam.training.client import ClientJob, Failed, Result, Trainer


def run_together(
    configs: Sequence[Config],
    watch: Callable[[int, dict[str, Any]], None] = lambda run, line: None,
    *,
    snapshots: Sequence[Snapshot | None] | None = None,
    stop: Stop | None = None,
) -> list[Outcome]:
    """Run several experiments, their rounds in step.

    Parameters
    ----------
    configs : sequence of Config
        What to run; alike in model, data set, minimizer, client, mini-batches and device.
    watch : callable
        Gets the run's number and each line of its metrics.jsonl, from that run's thread.
    snapshots : sequence of Snapshot or None, optional
        Where each run goes on in its folder ``out``; None: at its beginning.
    stop : Stop, optional
        Asked after each client whether to stop.

    Returns
    -------
    list of Outcome
        In the order of the configs.

    Raises
    ------
    UsageError
        If the configs do not go together, or one asks for what there is not.
    TrainingError
        If no client's update of some run could be used any more; the others went on to their end.
    """
    configs = [pinned(config) for config in configs]
    check_alike(configs)
    begins = snapshots or [None] * len(configs)
    for config, snapshot in zip(configs, begins, strict=True):
        RunDir.check(config.out, new=snapshot is None)
    stop = stop or Stop()
    with one_compute_thread(), ExitStack() as leaving:
        first, initial = new_trainer(configs[0])
        made = [(first, initial), *(new_trainer(config, like=first) for config in configs[1:])]
        leaving.enter_context(computing(first))
        every = [
            new_threads(c, trainer, stop) for c, (trainer, _) in zip(configs, made, strict=True)
        ]
        for config, threads in zip(configs, every, strict=True):
            leaving.callback(threads.close)
            tell(config, threads.trainer)
        for config, (trainer, start) in zip(configs, made, strict=True):
            warm_up(trainer, start.state, config.rate(1))
        _check_frozen(configs, [trainer for trainer, _ in made])
        if gradients := new_gradients(configs[0], first):
            stacked([trainer.method for trainer, _ in made], initial.state)  # or say why not
        rendezvous = Rendezvous(BatchedPrograms(every[0], gradients), len(configs))
        pool = leaving.enter_context(ThreadPoolExecutor(len(configs), "fedsam-run"))
        leaving.callback(rendezvous.close)  # before the pool waits for its threads

        def play(number: int) -> Outcome:
            config, threads = configs[number], every[number]
            executor = SharedExecutor(
                rendezvous, number, BatchedRun(threads.trainer, upcoming(config, threads.trainer))
            )
            nodes, start = range(config.clients), made[number][1]
            with one_compute_thread(), closing(executor):
                return play_out(
                    *(
                        config,
                        threads,
                        LocalGrid(threads, executor),
                        nodes,
                        start,
                        partial(watch, number),
                    ),
                    snapshot=begins[number],
                    stop=stop,
                )

        futures = [pool.submit(play, number) for number in range(len(configs))]
        rendezvous.serve()
        return [future.result() for future in futures]


class Rendezvous:
    """Where runs in threads of their own meet once a round; who serves it trains their clients.

    Parameters
    ----------
    programs : BatchedPrograms
        Train them.
    runs : int
        Seats.
    """

    def __init__(self, programs: BatchedPrograms, runs: int) -> None:
        self.programs = programs
        self.seated = set(range(runs))
        self.closed = False
        self.changed = Condition()
        self.waiting: dict[int, tuple[BatchedRun, Sequence[ClientJob]]] = {}
        self.done: dict[int, list[Result | Failed]] = {}

    def serve(self) -> None:
        """Train round after round until all seats are empty."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.seated == set(self.waiting))
                order, self.waiting = sorted(self.waiting.items()), {}
            if not order:
                return
            trained = self.programs.train([group for _, group in order])
            with self.changed:
                self.done |= {n: replies for (n, _), replies in zip(order, trained, strict=True)}
                self.changed.notify_all()

    def close(self) -> None:
        """Let the runs stop that still wait, or will."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()


class SharedExecutor:
    """Trains the clients of one run at a rendezvous."""

    def __init__(self, rendezvous: Rendezvous, number: int, run: BatchedRun) -> None:
        self.rendezvous = rendezvous
        self.number = number
        self.run = run

    def train(self, jobs: Sequence[ClientJob]) -> list[Result | Failed]:
        """Return what each job's client returns, once all runs have handed in theirs."""
        rendezvous = self.rendezvous
        with rendezvous.changed:
            rendezvous.waiting[self.number] = self.run, jobs
            rendezvous.changed.notify_all()
            rendezvous.changed.wait_for(lambda: self.number in rendezvous.done or rendezvous.closed)
            if self.number not in rendezvous.done:
                raise TrainingError("stopped with the runs beside it")
            return rendezvous.done.pop(self.number)

    def close(self) -> None:
        """Let the other runs go on without this one."""
        with self.rendezvous.changed:
            self.rendezvous.seated.discard(self.number)
            self.rendezvous.changed.notify_all()


def _check_frozen(configs: Sequence[Config], trainers: Sequence[Trainer]) -> None:
    """Raise UsageError if the runs' frozen parameters differ: one program has them once."""
    for number, trainer in enumerate(trainers):
        if trainer.layout.digest != trainers[0].layout.digest:
            raise UsageError(
                f"--seed {configs[number].seed}: the frozen parameters of run {number} are not "
                "those of run 0; runs in one program share them: give --weights, or train one by "
                "one"
            )


def check_alike(configs: Sequence[Config]) -> None:
    """Raise UsageError if the runs cannot share one program."""
    for number, config in enumerate(configs[1:], 1):
        for key in keys("shared"):
            mine, other = getattr(config, key), getattr(configs[0], key)
            if mine != other:
                raise UsageError(
                    f"{flag(key)} {mine}: run {number} differs from run 0 ({other}); runs in one "
                    "program share it"
                )
    if configs and configs[0].engine != "local":
        raise UsageError("--engine: runs in one program need the local engine")
    if many := next((config.processes for config in configs if config.processes), 0):
        raise UsageError(f"--processes {many}: runs in one program train in threads; leave it out")
