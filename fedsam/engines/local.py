"""The local engine: a Flower Grid in this process, over one device or all its cores.

On a CPU one client is one core: the threads train a client each, with one compute thread,
so a client's arithmetic, and with it every byte of a result, does not depend on how many cores
there are. On a GPU clients train one after the other.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from flwr.app import ArrayRecord, Error, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedsam.base.timers import timed
from fedsam.engines.codec import job_of, reply_of
from fedsam.engines.threads import ThreadExecutor
from fedsam.messages import evaluate_reply, of_kind, only_record, state_of
from fedsam.server import compat
from fedsam.training.client import ClientJob, Failed, Result
from fedsam.training.method import Vectors


class Executor(Protocol):
    """Whoever trains clients."""

    def train(self, jobs: Sequence[ClientJob]) -> list[Result | Failed]:
        """Return what each job's client returns, in the jobs' order."""
        ...


class LocalGrid(Grid):
    """Flower's Grid over the clients of one process; a node's id is its partition's.

    Parameters
    ----------
    threads : ThreadExecutor
        Evaluate, and train the clients.
    executor : Executor, optional
        Trains the clients in place of the threads: actors elsewhere.
    """

    def __init__(self, threads: ThreadExecutor, executor: Executor | None = None) -> None:
        self.threads = threads
        self.executor = executor or threads
        self.trainer = threads.trainer
        self._run = compat.new_run()
        self.memories: dict[int, Vectors] = {}  # of the clients that have trained, if they keep any
        self._replies: dict[str, Message] = {}
        self._sent = 0
        self._trained = False  # any client so far
        compat.identify_process()

    def set_run(self, run: compat.Run) -> None:
        """Set the run this Grid belongs to."""
        self._run = run

    @property
    def run(self) -> compat.Run:
        """The run this Grid belongs to."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a new message (the deprecated way; ``Message(...)`` is the same)."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all clients."""
        return range(len(self.trainer.partition))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Answer the messages at once and keep the replies for ``pull_messages``."""
        ids = []
        for reply in self.send_and_receive(messages):
            self._sent += 1
            ids.append(str(self._sent))
            self._replies[ids[-1]] = reply
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to these messages that were not pulled yet."""
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    @timed("messages")
    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Let the clients answer: train messages as one cohort, then the others one by one."""
        messages = sorted(messages, key=lambda message: message.metadata.dst_node_id)
        training = [m for m in messages if m.metadata.message_type == MessageType.TRAIN]
        contents = dict(zip(map(id, training), self._train(training), strict=True))
        return [
            Message(contents[id(m)], reply_to=m) if id(m) in contents else self._answer(m)
            for m in messages
        ]

    def _train(self, messages: Sequence[Message]) -> list[RecordDict | Error]:
        """Train the addressed clients and return the contents of their replies."""
        layout, jobs = self.trainer.layout, []
        read: dict[int, ClientJob] = {}  # messages may share their content: it is read once
        for message in messages:
            client, content = message.metadata.dst_node_id, message.content
            if id(content) not in read:
                read[id(content)] = job_of(content, layout, client, None)
            job = read[id(content)]
            jobs.append(job._replace(client=client, memory=self.memories.get(client)))
        trained = self.executor.train(jobs)
        self._stop_if_nobody_can(trained)
        self._remember(jobs, trained)
        return [
            Error(0, done.reason) if isinstance(done, Failed) else reply_of(layout, done)
            for done in trained
        ]

    def _stop_if_nobody_can(self, trained: Sequence[Result | Failed]) -> None:
        """Raise what a client's code raised, where it did in all of them and none has trained yet.

        That is a mistake in it, and no second attempt helps. One client of many may be alone in it.
        """
        raised = [done.error for done in trained if isinstance(done, Failed) and done.error]
        several = len(raised) >= min(2, len(self.trainer.partition))
        if raised and several and len(raised) == len(trained) and not self._trained:
            raise raised[0]
        self._trained = self._trained or any(isinstance(done, Result) for done in trained)

    def _remember(self, jobs: Sequence[ClientJob], trained: Sequence[Result | Failed]) -> None:
        """Keep what the clients keep; one whose vectors are not finite keeps what it had."""
        ended = [
            (job, done)
            for job, done in zip(jobs, trained, strict=True)
            if isinstance(done, Result) and done.memory
        ]
        if not ended:
            return
        sums = [sum(v.sum() for v in done.memory.values()) for _, done in ended]
        finite = torch.stack([torch.as_tensor(s) for s in sums]).isfinite().tolist()
        for (job, done), usable in zip(ended, finite, strict=True):
            if usable:
                self.memories[job.client] = done.memory

    def _answer(self, message: Message) -> Message:
        """Answer one evaluate message: the client's own training images, in eval mode."""
        if message.metadata.message_type != MessageType.EVALUATE:
            kind = message.metadata.message_type
            return Message(Error(0, f"a fedsam client does not answer {kind!r}"), reply_to=message)
        arrays = only_record(of_kind(message.content, ArrayRecord))
        state = state_of(arrays, self.trainer.layout)
        client = message.metadata.dst_node_id
        state = self.trainer.own_state(state, self.memories.get(client))
        rows = self.trainer.partition[client]
        metrics = self.threads.evaluate(state, self.trainer.train, rows)
        return Message(evaluate_reply(metrics, len(rows)), reply_to=message)
