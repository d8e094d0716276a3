"""Processes: clients train in workers that were forked from this process, a core each.

Where a step takes milliseconds or less, most of it is Python, whose lock threads share: processes
have one each. A worker has images, split, model and method from the fork, without a copy. Vectors
go to and fro through memory that all of them share; of a round, one message a worker goes each way.
A worker has one compute thread, as a thread has, so a result is the same bytes.
"""

import gc
import logging
import mmap
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from multiprocessing.connection import Connection, Pipe, wait
from multiprocessing.reduction import ForkingPickler
from threading import Lock, Thread
from typing import Any, NamedTuple, NoReturn, TypeGuard, TypeVar

import torch
from torch import Tensor

from fedsam.base.errors import TrainingError, one_line, some
from fedsam.base.system import SIGNALS, Stop
from fedsam.base.timers import WAITING, timed
from fedsam.engines.codec import pack, unpack
from fedsam.engines.threads import ThreadExecutor, computing
from fedsam.training.client import (
    STATISTICS,
    ClientJob,
    Failed,
    Result,
    Trainer,
    attempt,
    longest_first,
)
from fedsam.training.flat_module import FlatModule

log = logging.getLogger("fedsam")
DEATHS = 10  # workers that may die without an answer in between: something else is wrong
LOOK = 0.1  # seconds between looks whether the run was asked to stop, or this process is alive
SMALL = 1e-2  # seconds that a core works on a step; in longer ones Python's lock is mostly free
WORTH = 4.0  # seconds that cores must have to work yet for a fork to pay
TIMED = 3  # rounds that are timed, after one that is not
STATE = "state"
Error = TypeVar("Error", bound=BaseException)
ALIGNED = 64  # bytes, as PyTorch's own tensors are
Written = dict[str, Any]  # vectors that were written: None, or packed where they have no place
FORKING = Lock()  # nobody forks while another's worker has two ends of its pipe


class SharedRows:
    """Rows of vectors, in memory that is shared with the processes that are forked from here on.

    Only what is written to takes memory. A vector is as aligned as a tensor of its own, on which
    the bytes of a product may depend.

    Parameters
    ----------
    rows : int
        How many.
    lengths : mapping
        The vectors of a row, by name: their length.
    dtype : torch.dtype
        Of all of them.
    """

    def __init__(self, rows: int, lengths: Mapping[str, int], dtype: torch.dtype) -> None:
        self._places: dict[str, slice] = {}
        width, unit = 0, ALIGNED // dtype.itemsize
        for name, length in lengths.items():
            self._places[name] = slice(width, width + length)
            width += -(-length // unit) * unit
        space = mmap.mmap(-1, max(1, rows * width) * dtype.itemsize)
        self._rows = torch.frombuffer(space, dtype=dtype)[: rows * width].view(rows, width)

    def write(self, row: int, vectors: Mapping[str, Tensor]) -> Written:
        """Write vectors; return their names, each with what has no such place, packed."""
        written: Written = {}
        for name, vector in vectors.items():
            place = self._rows[row, self._places[name]] if name in self._places else None
            if place is None or (place.shape, place.dtype) != (vector.shape, vector.dtype):
                written[name] = pack(vector)
            else:
                place.copy_(vector)
                written[name] = None
        return written

    def read(self, row: int, written: Written) -> dict[str, Tensor]:
        """Return vectors that were written: views, which change with what is written there next."""
        return {
            name: self._rows[row, self._places[name]]
            if packed is None
            else unpack(packed, self._rows.device)
            for name, packed in written.items()
        }


class Space:
    """What the two sides of a round's messages write into: rows for so many clients at a time.

    Parameters
    ----------
    trainer : Trainer
        Says which vectors there are.
    clients : int
        How many.
    """

    def __init__(self, trainer: Trainer, clients: int) -> None:
        layout, method = trainer.layout, trainer.method
        own = {STATISTICS: layout.size - layout.trainable} if trainer.local_statistics else {}
        kept = dict.fromkeys(method.memory, layout.trainable) | own
        beside = dict.fromkeys(method.exchanged, layout.trainable)
        result: dict[str, int] = {STATE: layout.size}
        result |= {f"memory {name}": length for name, length in kept.items()}
        result |= {f"reply {name}": length for name, length in beside.items()}
        self.clients = clients
        self.sent = SharedRows(clients, {STATE: layout.size} | beside, layout.dtype)
        self.kept = SharedRows(clients, kept, layout.dtype)
        self.results = SharedRows(clients, result, layout.dtype)


class Order(NamedTuple):
    """A job without its vectors: where they lie, and what is in no such place."""

    row: int
    client: int
    round: int
    lr: float
    sent_row: int
    sent: Written
    memory: Written | None


class Answer(NamedTuple):
    """A result without its vectors."""

    examples: int
    steps: int
    loss: float
    vectors: Written


class Worker(NamedTuple):
    """A process that trains clients, and this one's end of the pipe to it."""

    pid: int
    pipe: Connection


def portable(error: Error) -> Error | TrainingError:
    """Return an error as another process can be sent it, with its traceback as a note."""
    error.add_note("In a worker process:\n" + "".join(traceback.format_exception(error)))
    try:
        copy(error)
        ForkingPickler.dumps(error)
    except Exception:  # noqa: BLE001 a class that cannot be made anew from what it says of itself
        return TrainingError(f"a client failed: {type(error).__name__}: {one_line(error)}")
    return error


def train_one(trainer: Trainer, network: FlatModule, space: Space, order: Order) -> Answer | Failed:
    """Train one client in a worker; its vectors come from the space and go there."""
    sent = space.sent.read(order.sent_row, order.sent)
    state = sent.pop(STATE)
    memory = None if order.memory is None else space.kept.read(order.row, order.memory)
    job = ClientJob(order.client, state, order.round, order.lr, memory, sent)
    done = attempt(trainer, network, job)
    if isinstance(done, Failed):
        return Failed(done.reason, None if done.error is None else portable(done.error))
    vectors: dict[str, Tensor] = {STATE: done.state}
    vectors |= {f"memory {name}": vector for name, vector in done.memory.items()}
    vectors |= {f"reply {name}": vector for name, vector in done.reply.items()}
    return Answer(done.examples, done.steps, done.loss, space.results.write(order.row, vectors))


def serve(trainer: Trainer, space: Space, pipe: Connection, parent: int) -> NoReturn:
    """Train what comes through the pipe, until nobody is at its other end."""
    try:
        for number in SIGNALS:  # are the parent's affair
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        Thread(target=_end_with, args=(parent,), daemon=True).start()
        gc.freeze()  # to collect garbage among what was forked would copy it
        with computing(trainer):
            network = trainer.new_network()
            while True:
                orders = pipe.recv()
                answers: Any
                try:
                    answers = [train_one(trainer, network, space, order) for order in orders]
                except BaseException as error:  # noqa: BLE001  the parent raises it
                    answers = portable(error)
                pipe.send(answers)
    except (EOFError, OSError):  # the parent is gone, or has let this one go
        os._exit(0)
    except BaseException:  # noqa: BLE001  no frame of the parent's must run here
        traceback.print_exc()
    os._exit(1)


def _end_with(parent: int) -> None:
    """End this process when its parent has ended, however that did."""
    while os.getppid() == parent:
        time.sleep(LOOK)
    os._exit(0)


def deal(steps: Sequence[int], workers: int) -> list[list[int]]:
    """Return the numbers of the jobs of each worker: the longest first, to who has the least."""
    shares: list[list[int]] = [[] for _ in range(workers)]
    loads = [(0, worker) for worker in range(workers)]
    for number in longest_first(steps):
        load, least = min(loads)
        shares[least].append(number)
        loads[least] = load + max(1, steps[number]), least
    return shares


def unforkable(trainer: Trainer) -> str:
    """Return why no fork of this process can train a trainer's clients; "" if one can."""
    if trainer.layout.device.type != "cpu":
        return "the clients train on a GPU"
    if sys.platform != "linux":
        return "only Linux forks a process safely"
    if torch.accelerator.is_available():  # autograd has threads for it, which no fork has
        return "PyTorch sees a GPU and cannot be forked (CUDA_VISIBLE_DEVICES= hides it)"
    if trainer.train.stored:  # by threads, which no fork has
        return "the images are read from files"
    return ""


class ProcessExecutor:
    """Worker processes with one compute thread each; the results are those of threads.

    They are forked here, and again where one dies or a round has more clients than any before.

    Parameters
    ----------
    trainer : Trainer
        What they work on; its images lie in memory.
    processes : int
        How many.
    clients : int
        Of a round.
    stop : Stop, optional
        Asked while they work whether to go on.
    """

    def __init__(
        self, trainer: Trainer, processes: int, clients: int, stop: Stop | None = None
    ) -> None:
        self.trainer = trainer
        self._stop = stop or Stop()
        self._deaths = 0
        self._space = Space(trainer, clients)
        self.workers = [self._fork() for _ in range(processes)]

    def _fork(self) -> Worker:
        """Fork a worker off this process."""
        parent = os.getpid()
        with FORKING, warnings.catch_warnings():
            # of the other threads: they wait for work, and no worker needs them
            warnings.simplefilter("ignore", DeprecationWarning)
            here, there = Pipe()
            before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            try:
                pid = os.fork()
                if pid == 0:
                    here.close()
                    serve(self.trainer, self._space, there, parent)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            there.close()
        return Worker(pid, here)

    @timed(WAITING)
    def train(self, jobs: Sequence[ClientJob]) -> list[Result | Failed]:
        """Train clients; those of a worker that dies are trained again by another.

        Raises
        ------
        TrainingError
            If too many workers die.
        Interrupted
            If the run is asked to stop meanwhile; what the workers were at is given up.
        """
        self._stop.check()
        if len(jobs) > self._space.clients:
            self._space = Space(self.trainer, len(jobs))
            self.workers = [self._fork_anew(worker) for worker in self.workers]
        orders = self._orders(jobs)
        shares = deal([self.trainer.steps(job.client) for job in jobs], len(self.workers))
        pending = {number: share for number, share in enumerate(shares) if share}
        for number, share in pending.items():
            self._hand_out(number, [orders[n] for n in share])
        done: dict[int, Result | Failed] = {}
        while pending:
            pipes = {self.workers[number].pipe: number for number in pending}
            for ready in wait(list(pipes), LOOK):
                number = pipes[ready]  # type: ignore[index]
                answers = self._received(number, [orders[n] for n in pending[number]])
                if answers is not None:
                    results = map(self._result, pending[number], answers)
                    done |= zip(pending.pop(number), results, strict=True)
            self._stop.check()
        return [done[number] for number in range(len(jobs))]

    def _orders(self, jobs: Sequence[ClientJob]) -> list[Order]:
        """Write the vectors of jobs where the workers find them; return the rest."""
        space, orders = self._space, []
        sent: dict[int, tuple[int, Written]] = {}  # by a state's id, as many share one
        for row, (client, state, round, lr, memory, beside) in enumerate(jobs):
            if id(state) not in sent:
                sent[id(state)] = row, space.sent.write(row, {STATE: state, **(beside or {})})
            said = None if memory is None else space.kept.write(row, memory)
            orders.append(Order(row, client, round, lr, *sent[id(state)], said))
        return orders

    def _hand_out(self, number: int, orders: Sequence[Order]) -> None:
        """Let a worker begin; that it has died is seen when its answer is waited for."""
        try:
            self.workers[number].pipe.send(orders)
        except OSError:
            log.debug("worker %d is gone", number)

    def _received(self, number: int, orders: Sequence[Order]) -> Sequence[Answer | Failed] | None:
        """Return a worker's answers; of one that has died None, and another has its orders."""
        try:
            answers = self.workers[number].pipe.recv()
        except (EOFError, OSError):
            self._stop.check()
            self._replace(number, orders)
            return None
        if isinstance(answers, BaseException):
            raise answers
        self._deaths = 0
        return answers

    def _replace(self, number: int, orders: Sequence[Order]) -> None:
        """Let a new worker do what one had to do that has died."""
        how = _end(self.workers[number])
        self._deaths += 1
        if self._deaths > DEATHS:
            raise TrainingError(
                f"{self._deaths} worker processes died one after another; the last {how}"
            )
        clients = some([str(order.client) for order in orders])
        log.warning("a worker process died (%s); its clients are trained again: %s", how, clients)
        self.workers[number] = self._fork()
        self._hand_out(number, orders)

    def _fork_anew(self, worker: Worker) -> Worker:
        _end(worker)
        return self._fork()

    def _result(self, row: int, answer: Answer | Failed) -> Result | Failed:
        """Return a client's result, with copies of its vectors: who gets them may keep them."""
        if isinstance(answer, Failed):
            return answer
        read = self._space.results.read(row, answer.vectors)
        parts: dict[str, dict[str, Tensor]] = {"memory": {}, "reply": {}}
        state = read.pop(STATE).clone()
        for place, vector in read.items():
            part, _, name = place.partition(" ")
            parts[part][name] = vector.clone()
        return Result(state, answer.examples, answer.steps, answer.loss, **parts)

    def close(self) -> None:
        """End the workers, whatever they are at."""
        for worker in self.workers:
            _end(worker)
        self.workers = []


def _end(worker: Worker) -> str:
    """End a worker, or see that it has ended; return how."""
    worker.pipe.close()
    try:
        os.kill(worker.pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(worker.pid, 0)[1])
    except (ProcessLookupError, ChildProcessError):  # who waits for any child was told already
        return "unknown how"
    return f"exit code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"


class TimedExecutor:
    """Threads, whose first rounds are timed; processes from there on, where they pay.

    They pay where a step is small, ``SMALL``, and enough is left to do, ``WORTH``. Nothing but the
    time depends on it.

    Parameters
    ----------
    threads : ThreadExecutor
        Train first.
    fork : callable
        Returns the processes.
    rounds : int
        The run's last one.
    clock : callable
        Returns the seconds that the cores worked for this process: others may have them meanwhile.
    """

    def __init__(
        self,
        threads: ThreadExecutor,
        fork: Callable[[], ProcessExecutor],
        rounds: int,
        clock: Callable[[], float] = time.process_time,
    ) -> None:
        self.threads = threads
        self.processes: ProcessExecutor | None = None
        self._fork = fork
        self._rounds = rounds
        self._clock = clock
        self._warm = False
        self._timed: list[tuple[float, int]] = []  # seconds and steps of a round

    def train(self, jobs: Sequence[ClientJob]) -> list[Result | Failed]:
        """Train clients, in threads or processes."""
        if self.processes is not None:
            return self.processes.train(jobs)
        if len(self._timed) == TIMED:
            return self.threads.train(jobs)
        begin = self._clock()
        done = self.threads.train(jobs)
        seconds, steps = self._clock() - begin, sum(one.steps for one in done if _trained(one))
        if steps and self._warm:
            self._timed.append((seconds, steps))
        self._warm = self._warm or steps > 0
        if len(self._timed) == TIMED:
            self._choose(jobs[0].round)
        return done

    def _choose(self, round: int) -> None:
        """Choose by what the rounds up to this one took."""
        seconds, steps = map(sum, zip(*self._timed, strict=True))
        step, left = seconds / steps, seconds / TIMED * (self._rounds - round)
        if step < SMALL and left > WORTH:
            self.processes = self._fork()
            log.info(
                "engine    %d processes from round %d on, as a step takes %.2g ms",
                *(len(self.processes.workers), round + 1, 1e3 * step),
            )

    def close(self) -> None:
        """End the processes, if there are any."""
        if self.processes is not None:
            self.processes.close()


def _trained(done: Result | Failed) -> TypeGuard[Result]:
    return isinstance(done, Result)
