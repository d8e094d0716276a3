"""The Ray engine: clients train in actors that keep data and model, on one machine or many.

A call to an actor carries many clients, there and back as one array of bytes; an actor gets the
global state with its first call of a round. What is small travels inside the call, as ``bytes``:
then Ray neither pickles nor stores anything, and a call costs what an empty one does. What is large
goes into Ray's object store, the global state once a round, and is mapped from there.

Who trains which clients is decided as actors become free: one that does takes, of those that are
left, the longest first, as many as make ``CALL`` seconds of work by the seconds a step that were
last measured, but no more than its share of the steps among the actors that are free, and at least
one (no more, as long as nothing has been measured). So a round that is shorter than that is one
call an actor, in a longer one a fast actor takes from a slow one, and where a client takes long
each is a call. (Of a generator that streams results back each would cost half of what a call does.)

An actor has one compute thread, as a thread of the local engine has, so the bytes of a result
depend neither on how many actors there are nor on which of them trained a client. This is the only
file that imports ray, so a sweep's tasks are here too.
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
from fedsam.engines.codec import Bytes, pack, unpack
from fedsam.engines.threads import computing, keep_freed_memory
from fedsam.training.client import ClientJob, Failed, Result, Trainer, attempt, longest_first

log = logging.getLogger("fedsam")
DEATHS = 30  # actors that may die without a client's answer in between: something else is wrong
LOOK = 2.0  # seconds between looks whether an actor that is waited for has a place at all
ANSWER = 5.0  # seconds that the head of a cluster may take to say that it is one
CALL = 0.05  # seconds of training that a call is to carry: it costs one to two thousandths itself
USUAL = 100 << 10  # bytes up to which a Ray of others carries a value inside a call, by default
INSIDE = 1 << 20  # ... and ours: from one or two MiB on its store is faster
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
        self.shared: Any = None

    def train(self, shared: Bytes | bytes | None, own: Bytes | bytes) -> Bytes | bytes:
        """Train clients; return the seconds it took, and their results or why there are none.

        The fields of their ClientJobs come in two parts: what they share, where that is not what
        the last call brought, and what each has of its ``own``.
        """
        device = self.trainer.layout.device
        if shared is not None:
            self.shared = unpack(shared, device)
        state, sent = self.shared
        jobs = [
            ClientJob(client, state, round, lr, memory, sent)
            for client, round, lr, memory in unpack(own, device)
        ]
        begin = time.perf_counter()
        with computing(self.trainer):
            done = [attempt(self.trainer, self.network, job) for job in jobs]
        # a client's error may be of a class that is known here alone: only the reason travels
        answers = [one.reason if isinstance(one, Failed) else one for one in done]
        return carried(pack([time.perf_counter() - begin, answers]))

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
            config = {"max_direct_call_object_size": INSIDE}
            ray.init(
                "local", num_cpus=cores, include_dashboard=False, _system_config=config, **quiet
            )
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


def carried(packed: Bytes) -> Bytes | bytes:
    """Return bytes as Ray carries them best: few as ``bytes``, not pickled; many are mapped."""
    return packed.tobytes() if packed.nbytes <= INSIDE else packed


def answers_of(packed: Bytes | bytes, device: torch.device) -> tuple[float, list[Result | Failed]]:
    """Return the seconds that an actor trained, and what came of its clients."""
    seconds, answers = unpack(packed, device)
    return seconds, [
        Failed(answer, TrainingError(f"a client failed: {answer}"))
        if isinstance(answer, str)
        else Result(*answer)
        for answer in answers
    ]


def fitting(waiting: Sequence[int], steps: Sequence[int], most: float) -> list[int]:
    """Return the first of the jobs that wait, and of the rest all that fit into ``most`` steps."""
    chosen, taken = [waiting[0]], steps[waiting[0]]
    for number in waiting[1:]:
        if taken + steps[number] <= most:
            chosen.append(number)
            taken += steps[number]
    return chosen


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
        Seconds after which a client that has not answered is given up, and its actor replaced;
        where one is given, each client is a call of its own.

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
        self._inside = USUAL if address or ray.is_initialized() else INSIDE
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
        options: dict[str, Any] = {"num_cpus": 1, "num_gpus": gpus, "enable_task_events": False}
        actor = ray.remote(ClientActor).options(**options)
        self._new = lambda: actor.remote(make, folder)
        self._idle: list[Any] = []
        # from a reply to come: the actor, and the numbers of its jobs (None: it is being started)
        self._pending: dict[Any, tuple[Any, list[int] | None]] = {}
        self._since: dict[Any, float] = {}  # when their jobs were handed out
        self._holds: dict[int, int] = {}  # the id of the state that an actor has from this round
        self._pace: float | None = None  # seconds a step, as last measured
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
                self._warn([], answer.reason)

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
        states: dict[int, Any] = {}  # as they travel, by their ids
        self._holds = {}
        steps = [max(1, self.trainer.steps(job.client)) for job in jobs]
        waiting = longest_first(steps)
        done: dict[int, Result | Failed] = {}
        while len(done) < len(jobs):
            while waiting and self._idle:
                chosen = self._deal(waiting, jobs, steps)
                taken = set(chosen)
                waiting = [number for number in waiting if number not in taken]
                self._hand_out(self._idle.pop(), chosen, jobs, states)
            numbers, answer = self._take()
            if isinstance(answer, Lost):
                waiting[:0] = numbers or []
                self._warn([jobs[number].client for number in numbers or []], answer.reason)
            elif isinstance(answer, Failed):
                done |= dict.fromkeys(numbers or [], answer)
            elif numbers:
                seconds, answers = answers_of(answer, jobs[numbers[0]].state.device)
                self._pace = seconds / sum(steps[number] for number in numbers)
                done |= zip(numbers, answers, strict=True)
        return [done[number] for number in range(len(jobs))]

    def _deal(
        self, waiting: Sequence[int], jobs: Sequence[ClientJob], steps: Sequence[int]
    ) -> list[int]:
        """Return which of the jobs that wait go into the next call; all begin with one state."""
        if self._pace is None or self.timeout < math.inf:
            return [waiting[0]]
        share = sum(steps[number] for number in waiting) / len(self._idle)
        together = [n for n in waiting if jobs[n].state is jobs[waiting[0]].state]
        return fitting(together, steps, min(share, CALL / self._pace))

    def _take(self) -> tuple[list[int] | None, Any]:
        """Wait for the next answer; an actor that is lost, or too late, is replaced.

        Returns
        -------
        tuple
            The numbers of the actor's jobs (None: it was being started), and its answer, packed,
            or Failed or Lost in its place.
        """
        reply, late = self._next()
        actor, numbers = self._pending.pop(reply)
        self._since.pop(reply, None)
        answer = Failed(f"no answer within {self.timeout:g} s") if late else received(reply)
        if not late and not isinstance(answer, Lost):
            self._idle.append(actor)
            self._deaths = self._deaths if numbers is None else 0
            return numbers, answer
        ray.kill(actor)  # it may live, on a node whose store is full
        self._holds.pop(id(actor), None)
        if isinstance(answer, Lost):
            self._deaths += 1
            if self._deaths > DEATHS:
                raise TrainingError(
                    f"{self._deaths} Ray actors died one after another; the last: {answer.reason}"
                )
        self._start()
        return numbers, answer

    def _hand_out(
        self,
        actor: Any,
        numbers: list[int],
        jobs: Sequence[ClientJob],
        states: dict[int, Any],
    ) -> None:
        """Let an actor train some jobs, which begin with the same state."""
        first = jobs[numbers[0]]
        key = id(first.state)
        if key not in states:
            shared = carried(pack([first.state, first.sent]))
            states[key] = shared if len(shared) <= self._inside else ray.put(shared)
        new = None if self._holds.get(id(actor)) == key else states[key]
        self._holds[id(actor)] = key
        mine = [jobs[number] for number in numbers]
        own = pack([[job.client, job.round, job.lr, job.memory] for job in mine])
        reply = actor.train.remote(new, carried(own))
        self._pending[reply] = actor, numbers
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
            training = any(numbers is not None for _, numbers in self._pending.values())
            if not training and not any(map(self._fits, ray.nodes())):
                wanted = " and ".join(f"{n:g} {kind}" for kind, n in self.needs.items() if n)
                raise TrainingError(f"no Ray actor can be placed: no node has {wanted}")

    def _fits(self, node: dict[str, Any]) -> bool:
        have = node["Resources"] if node["Alive"] else {}
        return all(n <= have.get(kind, 0.0) for kind, n in self.needs.items())

    def _warn(self, clients: Sequence[int], reason: str) -> None:
        """Say that an actor died, and which clients it was training."""
        absent = sum(numbers is None for _, numbers in self._pending.values())
        which = f"{'clients' if clients[1:] else 'client'} {', '.join(map(str, clients))}"
        again = f"{which} {'are' if clients[1:] else 'is'} trained again"
        log.warning(
            "a Ray actor died; %s; %d of %d actors are left until another has a place (%s)",
            again if clients else "it had no client yet",
            self.workers - absent,
            self.workers,
            reason,
        )

    def close(self) -> None:
        """Let the actors go, and Ray too if it was started here."""
        for actor in [*self._idle, *(actor for actor, _ in self._pending.values())]:
            ray.kill(actor)
        self._leave()
