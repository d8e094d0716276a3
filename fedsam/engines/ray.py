"""The Ray engine: clients train in actors that keep data and model, on one machine or many.

The global state goes into Ray's object store once a round; replies come back as arrays. An actor
has one compute thread, as a thread of the local engine has, so the bytes of a result depend
neither on how many actors there are nor on which of them trained a client. This is the only file
that imports ray, so a sweep's tasks are here too.
"""

import logging
import math
import os
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # no warning at each start

import ray
import torch
from ray.exceptions import ObjectLostError, RayActorError

from fedsam.base.errors import TrainingError, UsageError
from fedsam.engines.codec import to_arrays, to_tensors
from fedsam.engines.threads import keep_freed_memory
from fedsam.training.client import ClientJob, Failed, Result, Trainer, attempt, longest_first

log = logging.getLogger("fedsam")
DEATHS = 100  # actors that may die in one round before something else must be wrong
LOOK = 10.0  # seconds between looks whether an actor that is waited for has a place at all


class ClientActor:
    """One actor: a trainer, a model, one compute thread."""

    def __init__(self, make: Callable[[], Trainer]) -> None:
        torch.set_num_threads(1)
        keep_freed_memory()
        self.trainer = make()
        self.network = self.trainer.new_network()
        self.shared: dict[str, Any] = {}

    def train(
        self, broadcast: dict[str, Any] | None, own: dict[str, Any]
    ) -> dict[str, Any] | Failed:
        """Train one client; return the fields of its Result, or why there is none.

        The fields of its ClientJob come in two parts, what many clients share and its ``own``;
        tensors travel as NumPy arrays, a broadcast of None is the last one.
        """
        device = self.trainer.layout.device
        if broadcast is not None:
            self.shared = to_tensors(broadcast, device)
        job = ClientJob(**self.shared, **to_tensors(own, device))
        done = attempt(self.trainer, self.network, job)
        return done if isinstance(done, Failed) else to_arrays(done._asdict())

    def ready(self) -> None:
        """Answer: the actor has a place, and its data and model."""


class TaskPool:
    """Ray tasks, each in a process of its own.

    Parameters
    ----------
    cpus : int
        Cores of a task.
    gpus : float
        GPUs of a task, fractions allowed.
    address : str
        Of a running cluster; "" starts Ray here.
    """

    def __init__(self, cpus: int, gpus: float, address: str = "") -> None:
        connect(address, None)
        have = ray.cluster_resources()
        for kind, needed in (("CPU", cpus), ("GPU", gpus)):
            if needed > have.get(kind, 0.0):
                ray.shutdown()
                raise UsageError(
                    f"Ray has {have.get(kind, 0.0):g} {kind}s, a cell needs {needed:g}"
                )
        # a fresh process a task: what one leaves on a GPU is not the next one's
        self._options = {"num_cpus": cpus, "num_gpus": gpus, "max_calls": 1, "max_retries": 2}

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        """Call ``work`` somewhere, when there is room; what a lost node had is done elsewhere."""
        return ray.remote(**self._options)(lambda: work()).remote().future()

    def close(self) -> None:
        """End all tasks, and Ray too if it was started here."""
        ray.shutdown()


def connect(address: str, cores: int | None) -> None:
    """Join the cluster at ``address``, or start Ray on this machine with so many cores.

    Raises
    ------
    UsageError
        If there is no cluster at the address.
    """
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if not address:
            ray.init("local", num_cpus=cores, include_dashboard=False, **quiet)
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


def broadcasts(jobs: Sequence[ClientJob]) -> dict[int, Any]:
    """Put each state that jobs begin with into Ray's store, once; by the state's id."""
    sent: dict[int, Any] = {}
    for job in jobs:
        if id(job.state) not in sent:
            shared = {"state": job.state, "sent": job.sent}
            sent[id(job.state)] = ray.put(to_arrays(shared))
    return sent


class RayExecutor:
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
    timeout : float
        Seconds after which a client that has not answered is given up, and its actor replaced.

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
        timeout: float = math.inf,
    ) -> None:
        self.trainer = trainer
        self.timeout = timeout
        connect(address, workers)
        have = ray.cluster_resources()
        for kind, needed in (("CPU", float(workers)), ("GPU", workers * gpus)):
            if needed > have.get(kind, 0.0):
                ray.shutdown()
                raise UsageError(
                    f"--workers {workers}: Ray has {have.get(kind, 0.0):g} {kind}s, "
                    f"{needed:g} are needed"
                )
        self.needs = {"CPU": 1.0, "GPU": gpus}
        self.workers = workers
        self._new = lambda: ray.remote(ClientActor).options(num_cpus=1, num_gpus=gpus).remote(make)
        self._idle: list[Any] = []
        # from a reply to come: the actor, and the number of its job (None: it is being started)
        self._pending: dict[Any, tuple[Any, int | None]] = {}
        self._since: dict[Any, float] = {}  # when their jobs were handed out
        for _ in range(workers):
            self._start()

    def _start(self) -> None:
        """Ask for one more actor; it gets a job when it has answered that it is there."""
        actor = self._new()
        self._pending[actor.ready.remote()] = actor, None

    def train(self, jobs: Sequence[ClientJob]) -> list[Result | Failed]:
        """Train clients, the longest first; those of an actor that dies are trained by another.

        An actor that is lost is asked for anew, and the others go on until it has a place.

        Raises
        ------
        TrainingError
            If no actor is left and none can be placed, or one cannot make its trainer.
        """
        sent = broadcasts(jobs)
        waiting = longest_first([self.trainer.steps(job.client) for job in jobs])
        holds: dict[int, int] = {}  # which broadcast an actor has: fetching it takes a millisecond
        done: dict[int, Result | Failed] = {}
        deaths = 0
        while len(done) < len(jobs):
            while waiting and self._idle:
                chosen, actor = waiting.pop(0), self._idle.pop()
                state = id(jobs[chosen].state)
                new = None if holds.get(id(actor)) == state else sent[state]
                holds[id(actor)] = state
                self._hand_out(actor, chosen, jobs[chosen], new)
            reply, late = self._next()
            actor, number = self._pending.pop(reply)
            self._since.pop(reply, None)
            if late and number is not None:
                ray.kill(actor)
                holds.pop(id(actor), None)
                self._start()
                done[number] = Failed(f"no answer within {self.timeout:g} s")
                continue
            try:
                answer = ray.get(reply)
            except (RayActorError, ObjectLostError) as error:  # lost: its node died with the reply
                if getattr(error, "actor_init_failed", False):  # another one would fail as well
                    reason = str(error).splitlines()[-1]
                    raise TrainingError(f"a Ray actor cannot start: {reason}") from None
                deaths += 1
                if deaths > DEATHS:
                    raise TrainingError(f"{deaths} Ray actors died in one round") from None
                holds.pop(id(actor), None)
                self._start()
                if number is not None:
                    waiting.insert(0, number)
                self._warn(None if number is None else jobs[number].client)
                continue
            self._idle.append(actor)
            if number is not None:
                failed = isinstance(answer, Failed)
                device = jobs[number].state.device
                done[number] = answer if failed else Result(**to_tensors(answer, device))
        return [done[number] for number in range(len(jobs))]

    def _hand_out(self, actor: Any, number: int, job: ClientJob, broadcast: Any) -> None:
        """Let an actor begin with a job."""
        own = {"client": job.client, "round": job.round, "lr": job.lr, "memory": job.memory}
        reply = actor.train.remote(broadcast, to_arrays(own))
        self._pending[reply] = actor, number
        self._since[reply] = time.monotonic()

    def _next(self) -> tuple[Any, bool]:
        """Wait for a reply, unless none can come; return it, and whether it is too late instead."""
        while True:
            wait = min(LOOK, self.timeout / 4)
            ready, _ = ray.wait(list(self._pending), num_returns=1, timeout=wait)
            if ready:
                return ready[0], False
            now = time.monotonic()
            for reply, since in self._since.items():
                if now - since > self.timeout:
                    return reply, True
            training = any(number is not None for _, number in self._pending.values())
            if not training and not any(map(self._fits, ray.nodes())):
                wanted = " and ".join(f"{n:g} {kind}" for kind, n in self.needs.items() if n)
                raise TrainingError(f"no Ray actor can be placed: no node has {wanted}")

    def _fits(self, node: dict[str, Any]) -> bool:
        have = node["Resources"] if node["Alive"] else {}
        return all(n <= have.get(kind, 0.0) for kind, n in self.needs.items())

    def _warn(self, client: int | None) -> None:
        """Say that an actor died, while it trained a client or (None) was being started."""
        absent = sum(number is None for _, number in self._pending.values())
        log.warning(
            "a Ray actor died; %s; %d of %d actors are left until another has a place",
            "it had no client yet" if client is None else f"client {client} is trained again",
            self.workers - absent,
            self.workers,
        )

    def close(self) -> None:
        """Let the actors go, and Ray too if it was started here."""
        ray.shutdown()
