"""The Ray engine: clients train in actors that keep data and model, on one machine or many.

The global state goes into Ray's object store once a round; replies come back as arrays. An actor
has one compute thread, as a thread of the local engine has, so the bytes of a result depend
neither on how many actors there are nor on which of them trained a client. This is the only file
that imports ray, so a sweep's tasks are here too.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, NamedTuple

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # no warning at each start

import grpc
import ray
import torch
from ray.exceptions import RayError, RayTaskError

from fedsam.base.errors import TrainingError, UsageError, one_line
from fedsam.engines.codec import to_arrays, to_tensors
from fedsam.engines.threads import computing, keep_freed_memory
from fedsam.training.client import ClientJob, Failed, Result, Trainer, attempt, longest_first

log = logging.getLogger("fedsam")
DEATHS = 30  # actors that may die without a client's answer in between: something else is wrong
LOOK = 2.0  # seconds between looks whether an actor that is waited for has a place at all
ANSWER = 5.0  # seconds that the head of a cluster may take to say that it is one
ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"  # what it is asked


def enter(folder: str) -> None:
    """Let relative paths mean the folder of the command; on a node that has it not, nothing."""
    os.chdir(folder if os.path.isdir(folder) else os.sep)


class ClientActor:
    """One actor: a trainer, a model, one compute thread, in the folder of the command."""

    def __init__(self, make: Callable[[], Trainer], folder: str) -> None:
        enter(folder)
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
        with computing(self.trainer):
            done = attempt(self.trainer, self.network, job)
        if isinstance(done, Failed):  # its error may be of a class that is known here alone
            return Failed(done.reason, TrainingError(f"a client failed: {done.reason}"))
        return to_arrays(done._asdict())

    def ready(self) -> None:
        """Answer: the actor has a place, and its data and model."""


class TaskPool:
    """Ray tasks, each in a process of its own, in the folder of the command.

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
        self._leave = connect(address, None)
        have = ray.cluster_resources()
        for kind, needed in (("CPU", cpus), ("GPU", gpus)):
            if needed > have.get(kind, 0.0):
                self._leave()
                raise UsageError(
                    f"Ray has {have.get(kind, 0.0):g} {kind}s, a cell needs {needed:g}"
                )
        # a fresh process a task: what one leaves on a GPU is not the next one's
        self._options = {"num_cpus": cpus, "num_gpus": gpus, "max_calls": 1, "max_retries": 2}

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        """Call ``work`` somewhere, when there is room; what a lost node had is done elsewhere."""
        folder = os.getcwd()

        def task() -> Any:
            enter(folder)
            return work()

        return ray.remote(**self._options)(task).remote().future()

    def close(self) -> None:
        """End all tasks, and Ray too if it was started here."""
        self._leave()


def connect(address: str, cores: int | None) -> Callable[[], None]:
    """Use the Ray of this process, join a cluster, or start Ray with so many cores on this machine.

    Returns
    -------
    callable
        Leaves it, or ends what was started; a Ray that this process had is left alone.

    Raises
    ------
    UsageError
        If there is no cluster at the address.
    TrainingError
        If Ray does not start on this machine.
    """
    if ray.is_initialized():
        there = ray.get_runtime_context().gcs_address
        if address not in ("", "auto", there):
            raise UsageError(f"--ray-address {address}: this process uses the Ray at {there}")
        return lambda: None
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not address:
        try:
            ray.init("local", num_cpus=cores, include_dashboard=False, **quiet)
        except Exception as error:  # of a start that takes too long Ray raises no kind of its own
            raise TrainingError(
                f"Ray could not be started on this machine: {one_line(error)}"
            ) from error
        return ray.shutdown
    try:
        if address != "auto":  # Ray itself would try for minutes
            check_alive(address)
        ray.init(address, **quiet)
    except (OSError, ValueError, RuntimeError, RayError) as error:
        raise UsageError(
            f"--ray-address {address}: no Ray cluster there ({one_line(error)}); "
            "give auto or HOST:PORT"
        ) from error
    return ray.shutdown


def check_alive(address: str) -> None:
    """Ask whether the head of a Ray cluster listens at an address, HOST:PORT.

    Raises
    ------
    ConnectionError
        If nobody answers, or something else does.
    """
    if os.environ.get("RAY_USE_TLS", "0") != "0":  # certificates are Ray's own affair
        return
    with grpc.insecure_channel(address, (("grpc.enable_http_proxy", 0),)) as channel:
        try:
            channel.unary_unary(ALIVE)(b"", timeout=ANSWER)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAUTHENTICATED:  # so are tokens
                raise ConnectionError(f"{error.code().name}: {error.details()}") from error


def broadcasts(jobs: Sequence[ClientJob]) -> dict[int, Any]:
    """Put each state that jobs begin with into Ray's store, once; by the state's id."""
    sent: dict[int, Any] = {}
    for job in jobs:
        if id(job.state) not in sent:
            shared = {"state": job.state, "sent": job.sent}
            sent[id(job.state)] = ray.put(to_arrays(shared))
    return sent


class Lost(NamedTuple):
    """An answer of an actor that will not come, and why."""

    reason: str


def received(reply: Any) -> Any:
    """Return what an actor answered, or Lost.

    Whatever Ray itself raises is a loss: actor or node have died, memory, object store or disk
    were full.

    Raises
    ------
    TrainingError
        If an actor cannot make its trainer: another one could not either.
    Exception
        What our code raised in the actor.
    """
    try:
        return ray.get(reply)
    except RayTaskError as error:
        if not isinstance(error.cause, RayError):
            ours = isinstance(error.cause, UsageError | TrainingError)
            raise error.cause if ours else error from None
        lost: RayError = error.cause
    except RayError as error:
        if getattr(error, "actor_init_failed", False):
            reason = str(error).splitlines()[-1]
            raise TrainingError(f"a Ray actor cannot start: {reason}") from None
        lost = error
    return Lost(f"{type(lost).__name__}: {one_line(lost)}")


@contextmanager
def ending_in_one_line() -> Iterator[None]:
    """Raise TrainingError, which ends a run in good order, where Ray fails in the driver itself."""
    try:
        yield
    except RayTaskError:  # what our code raised in an actor
        raise
    except RayError as error:
        raise TrainingError(f"Ray: {type(error).__name__}: {one_line(error)}") from error


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
        self._leave = connect(address, workers)
        have = ray.cluster_resources()
        for kind, needed in (("CPU", float(workers)), ("GPU", workers * gpus)):
            if needed > have.get(kind, 0.0):
                self._leave()
                raise UsageError(
                    f"--workers {workers}: Ray has {have.get(kind, 0.0):g} {kind}s, "
                    f"{needed:g} are needed"
                )
        self.needs = {"CPU": 1.0, "GPU": gpus}
        self.workers = workers
        folder = os.getcwd()
        actor = ray.remote(ClientActor).options(num_cpus=1, num_gpus=gpus)
        self._new = lambda: actor.remote(make, folder)
        self._idle: list[Any] = []
        # from a reply to come: the actor, and the number of its job (None: it is being started)
        self._pending: dict[Any, tuple[Any, int | None]] = {}
        self._since: dict[Any, float] = {}  # when their jobs were handed out
        self._holds: dict[int, int] = {}  # which broadcast an actor has: to fetch it takes 1 ms
        self._deaths = 0
        for _ in range(workers):
            self._start()

    def _start(self) -> None:
        """Ask for one more actor; it gets a job when it has answered that it is there."""
        actor = self._new()
        self._pending[actor.ready.remote()] = actor, None

    @ending_in_one_line()
    def wait_for_one(self) -> None:
        """Wait until an actor has a place, data and model.

        Raises
        ------
        TrainingError
            If an actor cannot make its trainer, or none can be placed.
        """
        while not self._idle:
            if isinstance(answer := self._take()[1], Lost):
                self._warn(None, answer.reason)

    @ending_in_one_line()
    def train(self, jobs: Sequence[ClientJob]) -> list[Result | Failed]:
        """Train clients, the longest first; those of an actor that is lost are trained by another.

        An actor that is lost is asked for anew, and the others go on until it has a place.

        Raises
        ------
        TrainingError
            If no actor is left and none can be placed, one cannot make its trainer, too many are
            lost, or the driver's own object store or disk is full.
        """
        sent = broadcasts(jobs)
        self._holds = {}
        waiting = longest_first([self.trainer.steps(job.client) for job in jobs])
        done: dict[int, Result | Failed] = {}
        while len(done) < len(jobs):
            while waiting and self._idle:
                chosen, actor = waiting.pop(0), self._idle.pop()
                state = id(jobs[chosen].state)
                new = None if self._holds.get(id(actor)) == state else sent[state]
                self._holds[id(actor)] = state
                self._hand_out(actor, chosen, jobs[chosen], new)
            number, answer = self._take()
            if isinstance(answer, Lost):
                if number is not None:
                    waiting.insert(0, number)
                self._warn(None if number is None else jobs[number].client, answer.reason)
            elif number is not None:
                failed = isinstance(answer, Failed)
                device = jobs[number].state.device
                done[number] = answer if failed else Result(**to_tensors(answer, device))
        return [done[number] for number in range(len(jobs))]

    def _take(self) -> tuple[int | None, Any]:
        """Wait for the next answer; an actor that is lost, or too late, is replaced.

        Returns
        -------
        tuple
            The number of the actor's job (None: it was being started), and its answer: the fields
            of a Result, Failed or Lost.
        """
        reply, late = self._next()
        actor, number = self._pending.pop(reply)
        self._since.pop(reply, None)
        answer = Failed(f"no answer within {self.timeout:g} s") if late else received(reply)
        if not late and not isinstance(answer, Lost):
            self._idle.append(actor)
            self._deaths = self._deaths if number is None else 0
            return number, answer
        ray.kill(actor)  # it may live, on a node whose store is full
        self._holds.pop(id(actor), None)
        if isinstance(answer, Lost):
            self._deaths += 1
            if self._deaths > DEATHS:
                raise TrainingError(
                    f"{self._deaths} Ray actors died one after another; the last: {answer.reason}"
                )
        self._start()
        return number, answer

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

    def _warn(self, client: int | None, reason: str) -> None:
        """Say that an actor died, while it trained a client or (None) was being started."""
        absent = sum(number is None for _, number in self._pending.values())
        log.warning(
            "a Ray actor died; %s; %d of %d actors are left until another has a place (%s)",
            "it had no client yet" if client is None else f"client {client} is trained again",
            self.workers - absent,
            self.workers,
            reason,
        )

    def close(self) -> None:
        """Let the actors go, and Ray too if it was started here."""
        for actor in [*self._idle, *(actor for actor, _ in self._pending.values())]:
            ray.kill(actor)
        self._leave()
