"""The Ray engine: clients train in actors that keep data and model, on one machine or many.

The global state goes into Ray's object store once a round; replies come back as arrays. An actor
has one compute thread, as a thread of the local engine has, so the bytes of a result depend
neither on how many actors there are nor on which of them trained a client. This is the only file
that imports ray.
"""

import logging
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # no warning at each start

import ray
import torch
from ray.exceptions import RayActorError
from torch import Tensor

from fedsam.engines.crew import keep_freed_memory
from fedsam.errors import TrainingError, UsageError
from fedsam.trainer import Job, Trained, Trainer
from fedsam.training import Vectors

log = logging.getLogger("fedsam")
DEATHS = 100  # actors that may die in one round before something else must be wrong


def arrays(vectors: Vectors | None) -> dict[str, Any]:
    """Return vectors as NumPy arrays."""
    return {name: vector.cpu().numpy() for name, vector in (vectors or {}).items()}


class Worker:
    """One actor: a trainer, a model, one compute thread."""

    def __init__(self, make: Callable[[], Trainer]) -> None:
        torch.set_num_threads(1)
        keep_freed_memory()
        self.trainer = make()
        self.replica = self.trainer.new_replica()
        self.state = torch.empty(0)
        self.sent: Vectors = {}

    def train(self, broadcast: Any, memory: Any, client: int, round: int, lr: float) -> Any:
        """Train one client; tensors travel as NumPy arrays, a broadcast of None is the last one."""
        if broadcast is not None:
            state, sent = broadcast
            self.state, self.sent = self._tensor(state), self._tensors(sent)
        job = Job(client, self.state, round, lr, self._tensors(memory), self.sent)
        done = self.trainer.train_client(self.replica, job)
        vectors = arrays(done.memory), arrays(done.reply)
        return done.state.cpu().numpy(), done.examples, done.steps, done.loss, *vectors

    def _tensor(self, array: Any) -> Tensor:
        return torch.tensor(array, device=self.trainer.layout.device)

    def _tensors(self, given: Any) -> dict[str, Tensor]:
        return {name: self._tensor(array) for name, array in given.items()}

    def pid(self) -> int:
        """Return the process id of this actor."""
        return os.getpid()


class Actors:
    """Ray actors that train clients.

    Parameters
    ----------
    trainer : Trainer
        The driver's own, which says how long a client takes.
    make : callable
        Makes the trainer in an actor; must be importable there.
    workers : int
        Actors; results do not depend on it.
    address : str
        Of a running cluster ("auto" for the one on this machine); "" starts Ray here.
    gpus : float
        GPUs an actor, fractions allowed.

    Raises
    ------
    UsageError
        If there is no cluster at the address, or it has not so many cores or GPUs.
    """

    def __init__(
        self,
        trainer: Trainer,
        make: Callable[[], Trainer],
        workers: int,
        address: str = "",
        gpus: float = 0.0,
    ) -> None:
        self.trainer = trainer
        self._connect(workers, address)
        have = ray.cluster_resources()
        for kind, needed in (("CPU", float(workers)), ("GPU", workers * gpus)):
            if needed > have.get(kind, 0.0):
                ray.shutdown()
                raise UsageError(
                    f"--workers {workers}: Ray has {have.get(kind, 0.0):g} {kind}s, "
                    f"{needed:g} are needed"
                )
        self._new = lambda: ray.remote(Worker).options(num_cpus=1, num_gpus=gpus).remote(make)
        self.workers = [self._new() for _ in range(workers)]

    @staticmethod
    def _connect(workers: int, address: str) -> None:
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        try:
            if not address:
                ray.init("local", num_cpus=workers, include_dashboard=False, **quiet)
                return
            if address != "auto":  # Ray itself would try for minutes
                host, _, port = address.rpartition(":")
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address, **quiet)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UsageError(
                f"--ray-address {address}: no Ray cluster there ({reason}); give auto or HOST:PORT"
            ) from error

    def train(self, jobs: Sequence[Job]) -> list[Trained]:
        """Train clients, the longest first; those of an actor that dies are trained by another."""
        sent: dict[int, Any] = {}
        for job in jobs:
            if id(job.state) not in sent:
                sent[id(job.state)] = ray.put((job.state.cpu().numpy(), arrays(job.sent)))
        waiting = self.trainer.longest_first(jobs)
        idle = list(range(len(self.workers)))
        holds: dict[int, int] = {}  # which state an actor has: fetching it takes a millisecond
        running: dict[Any, tuple[int, int]] = {}
        done: dict[int, Trained] = {}
        deaths = 0
        while len(done) < len(jobs):
            while waiting and idle:
                number, place = waiting.pop(0), idle.pop()
                job = jobs[number]
                new = None if holds.get(place) == id(job.state) else sent[id(job.state)]
                holds[place] = id(job.state)
                arguments = new, arrays(job.memory), job.client, job.round, job.lr
                running[self.workers[place].train.remote(*arguments)] = number, place
            (ready,), _ = ray.wait(list(running), num_returns=1)
            number, place = running.pop(ready)
            try:
                state, *rest = ray.get(ready)
            except RayActorError:
                deaths += 1
                if deaths > DEATHS:
                    raise TrainingError(f"{deaths} Ray actors died in one round") from None
                log.warning("a Ray actor died; client %d is trained again", jobs[number].client)
                self.workers[place] = self._new()
                del holds[place]
                waiting.insert(0, number)
            else:
                done[number] = self._trained(jobs[number].state.device, state, *rest)
            idle.append(place)
        return [done[number] for number in range(len(jobs))]

    @staticmethod
    def _trained(
        device: torch.device,
        state: Any,
        examples: int,
        steps: int,
        loss: float,
        memory: Any,
        reply: Any,
    ) -> Trained:
        """Return what an actor returned, as tensors."""
        back = [
            {name: torch.tensor(v, device=device) for name, v in vectors.items()}
            for vectors in (memory, reply)
        ]
        return Trained(torch.tensor(state, device=device), examples, steps, loss, *back)

    def close(self) -> None:
        """Let the actors go, and Ray too if it was started here."""
        ray.shutdown()
