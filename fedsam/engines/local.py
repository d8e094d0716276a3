"""The local engine: a Flower Grid in this process, over one device or all its cores.

On a CPU one client is one core: the crew's threads train a client each, with one compute thread,
so a client's arithmetic, and with it every byte of a result, does not depend on how many cores
there are. On a GPU clients train one after the other.
"""

from collections.abc import Iterable, Sequence

from flwr.app import Error, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedsam import wire
from fedsam.engines import compat
from fedsam.engines.crew import Crew
from fedsam.replica import Replica
from fedsam.wire import VectorRecord


class LocalGrid(Grid):
    """Flower's Grid over the clients of one process; a node's id is its partition's.

    Parameters
    ----------
    crew : Crew
        Trains and evaluates the clients.
    """

    def __init__(self, crew: Crew) -> None:
        self.crew = crew
        self.trainer = crew.trainer
        self._run = compat.new_run()
        self._replies: dict[str, Message] = {}
        self._sent = 0
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

    def _train(self, messages: Sequence[Message]) -> list[RecordDict]:
        """Train the addressed clients, longest first so that no core idles at the end."""
        trainer, layout = self.trainer, self.trainer.layout
        clients = [message.metadata.dst_node_id for message in messages]

        def work(replica: Replica, row: int) -> RecordDict:
            arrays, round, lr = wire.instruction(messages[row].content)
            state = wire.state_of(arrays, layout)
            trained = trainer.train_client(replica, clients[row], state, round, lr)
            record = VectorRecord(layout, trained.state)
            return wire.trained(record, trained.examples, trained.steps, trained.loss)

        longest_first = sorted(range(len(clients)), key=lambda row: -trainer.steps(clients[row]))
        contents = dict(zip(longest_first, self.crew.map(work, longest_first), strict=True))
        return [contents[row] for row in range(len(messages))]

    def _answer(self, message: Message) -> Message:
        """Answer one evaluate message: the client's own training images, in eval mode."""
        if message.metadata.message_type != MessageType.EVALUATE:
            kind = message.metadata.message_type
            return Message(Error(0, f"a fedsam client does not answer {kind!r}"), reply_to=message)
        arrays = wire.only(message.content.array_records)
        state = wire.state_of(arrays, self.trainer.layout)
        rows = self.trainer.partition[message.metadata.dst_node_id]
        metrics = self.crew.evaluate(state, self.trainer.train, rows)
        return Message(wire.evaluated(metrics, len(rows)), reply_to=message)
