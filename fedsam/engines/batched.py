"""Who trains a round's clients as one batched program, also those of several runs at once."""

import logging
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from fedsam.base.errors import TrainingError, UsageError
from fedsam.data.plan import Plan
from fedsam.engines.threads import ThreadExecutor
from fedsam.training.batched import Program, why_not
from fedsam.training.batched_gradient import Slots, Vmapped
from fedsam.training.client import ClientJob, Failed, Result, Trainer
from fedsam.training.method import Method

log = logging.getLogger("fedsam")


class BatchedRun(NamedTuple):
    """A run whose clients are trained in a batch.

    Attributes
    ----------
    trainer : Trainer
        The run's.
    upcoming : callable
        From a round to the clients that the run will most likely train in it.
    """

    trainer: Trainer
    upcoming: Callable[[int], list[int]]


class BatchedPrograms:
    """Train the clients of a round, of one run or of several, as one program.

    Parameters
    ----------
    threads : ThreadExecutor
        Train one by one what cannot be batched.
    gradients : type or None
        ``Slots`` or ``Vmapped``; None: do not batch.
    capture : bool
        On a GPU, replay steps from a CUDA graph.
    """

    def __init__(
        self,
        threads: ThreadExecutor,
        gradients: type[Slots | Vmapped] | None,
        *,
        capture: bool = True,
    ) -> None:
        self.threads = threads
        self.gradients = gradients
        self._checked: Method | None = None
        self._capture = capture and threads.trainer.layout.device.type == "cuda"
        self._programs: dict[tuple[int, ...], Program] = {}
        self._drawn: dict[tuple[int, int, int], Plan] = {}
        self._most = sys.maxsize  # clients at a time, until the memory is full

    def train(
        self, groups: Sequence[tuple[BatchedRun, Sequence[ClientJob]]]
    ) -> list[list[Result | Failed]]:
        """Train the jobs of each run; results are in the same order."""
        trainers = [run.trainer for run, jobs in groups for _ in jobs]
        every = [job for _, jobs in groups for job in jobs]
        trained = iter(self._train([run for run, _ in groups], trainers, every))
        return [[next(trained) for _ in jobs] for _, jobs in groups]

    def _train(
        self, runs: Sequence[BatchedRun], trainers: Sequence[Trainer], jobs: Sequence[ClientJob]
    ) -> list[Result | Failed]:
        gradients = self._usable_gradients(runs, jobs[0].round) if jobs else None
        if gradients is None:
            return self.threads.train(jobs, trainers)
        trained: list[Result | Failed] = []
        while len(trained) < len(jobs):
            part = slice(len(trained), len(trained) + self._most)
            try:
                trained += self._train_part(runs, trainers[part], jobs[part], gradients)
            except torch.OutOfMemoryError as error:
                self._halve(len(jobs[part]), error)
            except (UsageError, TrainingError):
                raise
            except Exception as error:  # noqa: BLE001  (one client's; one by one it is found)
                log.warning(
                    "cohort: %r: clients %s train one by one", error, clients_of(jobs[part])
                )
                trained += self.threads.train(jobs[part], trainers[part])
        return trained

    def _halve(self, clients: int, error: torch.OutOfMemoryError) -> None:
        """Train half as many clients at a time from now on."""
        if clients == 1:
            raise TrainingError("GPU: one client does not fit; a smaller --batch-size") from error
        self._programs.clear()
        self._most = (clients + 1) // 2
        torch.cuda.empty_cache()
        log.warning("cohort: out of memory with %d clients; now %d at a time", clients, self._most)

    def _train_part(
        self,
        runs: Sequence[BatchedRun],
        trainers: Sequence[Trainer],
        jobs: Sequence[ClientJob],
        gradients: type[Slots | Vmapped],
    ) -> list[Result]:
        key = tuple(map(id, trainers))
        if key not in self._programs:
            self._programs[key] = Program(trainers, gradients, capture=self._capture)
        program = self._programs[key]
        plans = [self._plan(t, job) for t, job in zip(trainers, jobs, strict=True)]
        program.begin(jobs, plans)
        self._draw_ahead(runs, jobs[0].round + 1)
        return program.end()

    def _usable_gradients(
        self, runs: Sequence[BatchedRun], round: int
    ) -> type[Slots | Vmapped] | None:
        """Return how to batch, if the model and the round's method can be, asked once."""
        method = self.threads.trainer.method.at(round)
        if self.gradients and method != self._checked:
            self._checked = method
            if reason := why_not([run.trainer for run in runs], self.gradients, round):
                log.warning("cohort: clients train one by one: %s", reason)
                self.gradients = None
        return self.gradients

    def _plan(self, trainer: Trainer, job: ClientJob) -> Plan:
        plan = self._drawn.get((id(trainer), job.round, job.client))
        return trainer.plan(job.client, job.round) if plan is None else plan

    def _draw_ahead(self, runs: Sequence[BatchedRun], round: int) -> None:
        """Draw the next round's plans, and read what they take, while the device works on this."""
        self._drawn = {
            (id(run.trainer), round, client): run.trainer.plan(client, round)
            for run in runs
            for client in run.upcoming(round)
        }
        runs[0].trainer.train.expect(plan.indices for plan in self._drawn.values())


def clients_of(jobs: Sequence[ClientJob]) -> str:
    """Return the jobs' clients, for a warning."""
    return ", ".join(str(job.client) for job in jobs)


class BatchedExecutor:
    """Trains the clients of one run in batches.

    Parameters
    ----------
    programs : BatchedPrograms
        Train them.
    run : BatchedRun
        The run.
    """

    def __init__(self, programs: BatchedPrograms, run: BatchedRun) -> None:
        self.programs = programs
        self.run = run

    def train(self, jobs: Sequence[ClientJob]) -> list[Result | Failed]:
        """Return what each job's client returns, in the jobs' order."""
        return self.programs.train([(self.run, jobs)])[0]
