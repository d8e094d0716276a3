"""Flower's own runtime as an engine: its simulation, or a SuperLink with SuperNodes."""

import logging
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedsam.base.errors import TrainingError, UsageError
from fedsam.messages import CONFIG, PARTITION, plain_content
from fedsam.server import compat
from fedsam.server.grids import GridView
from fedsam.server.replies import guarded, partition_in, said

log = logging.getLogger("fedsam")
POLL = 0.5  # seconds between looks for nodes that have not connected yet
LINE = 10.0  # seconds between lines that say who is waited for
SETTLED = 3.0  # seconds without a new node after which a simulation has all of its nodes


class FlowerGrid(GridView):
    """Flower's Grid, to which records are handed in Flower's own classes: bytes, not tensors.

    Parameters
    ----------
    grid : Grid
        Flower's.
    roll : RollCall
        Told which nodes do not answer.
    """

    def __init__(self, grid: Grid, roll: "RollCall") -> None:
        super().__init__(grid)
        self.roll = roll

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push messages through the grid behind, serialised."""
        return self.grid.push_messages(serialised(messages))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages through the grid behind, serialised, and return the replies."""
        sent = serialised(messages)
        asked = {message.metadata.dst_node_id for message in sent}
        replies = list(self.grid.send_and_receive(sent, timeout=timeout))
        self.roll.note_silent(asked - {r.metadata.src_node_id for r in replies if r.has_content()})
        return replies


def serialised(messages: Iterable[Message]) -> list[Message]:
    """Return the messages with plain records; one that several messages carry is made once."""
    made: dict[int, ArrayRecord] = {}
    out = []
    for message in messages:
        message.content = plain_content(message.content, made)
        out.append(message)
    return out


class RollCall(Mapping[int, int]):
    """From partition id to node id: node ids are random, partition ids are not.

    A partition whose node did not answer is looked for among nodes that have joined since.

    Parameters
    ----------
    grid : Grid
        Flower's.
    clients : int
        Partitions that must be there.
    timeout : float
        Seconds to wait for the next node to connect, and for answers.

    Raises
    ------
    UsageError
        If a simulation has too few nodes.
    TrainingError
        If a partition has no node, or two.
    """

    def __init__(self, grid: Grid, clients: int, timeout: float = 600.0) -> None:
        self.grid = grid
        self.clients = clients
        self.timeout = timeout
        self._node_of: dict[int, int] = {}
        self._asked: dict[int, str] = {}  # nodes that answered, and what was wrong with the answer
        self._silent: set[int] = set()  # partitions whose node did not answer
        self._gather()

    def __getitem__(self, partition: int) -> int:
        """Return the node that holds a partition."""
        if partition in self._silent:
            self._look_for(partition)
        return self._node_of[partition]

    def __iter__(self) -> Iterator[int]:
        """Iterate over the partitions."""
        return iter(self._node_of)

    def __len__(self) -> int:
        """Return how many partitions there are."""
        return len(self._node_of)

    def note_silent(self, nodes: Collection[int]) -> None:
        """Take down which nodes did not answer."""
        self._silent |= {p for p, node in self._node_of.items() if node in nodes}

    def _gather(self) -> None:
        """Wait until there is a node for each partition, and say who is waited for."""
        simulated = compat.is_simulated(self.grid)
        patience = SETTLED if simulated else self.timeout
        most, end, say = 0, time.monotonic() + patience, time.monotonic() + LINE
        while True:
            nodes, now = list(self.grid.get_node_ids()), time.monotonic()
            enough = len(nodes) >= self.clients
            if enough or (now > say and not simulated):
                self._take(self._ask(self._new(nodes)))
            missing = [p for p in range(self.clients) if p not in self._node_of]
            if not missing:
                return
            if wrong := next((self._asked[n] for n in nodes if self._asked.get(n)), ""):
                raise self._nobody(missing, f"a node answered: {wrong}")
            if len(nodes) > most:
                most, end = len(nodes), now + patience
            elif now > end and simulated and not enough:
                raise UsageError(
                    f"--clients {self.clients}: the simulation has {len(nodes)} nodes; give "
                    f"--federation-config 'num-supernodes={self.clients}'"
                )
            elif now > end:
                raise self._nobody(missing, f"{len(nodes)} nodes are there")
            if now > say:
                say = now + LINE
                log.warning(
                    "waiting for nodes: %d of --clients %d are there; nobody holds %s",
                    *(len(nodes), self.clients, _named(missing)),
                )
            time.sleep(POLL)

    def _nobody(self, missing: list[int], why: str) -> TrainingError:
        return TrainingError(
            f"no node holds partition {missing[0]} ({len(missing)} are missing; {why})"
        )

    def _new(self, nodes: Iterable[int]) -> list[int]:
        return [node for node in nodes if node not in self._asked]

    def _ask(self, nodes: Iterable[int]) -> dict[int, int]:
        """Return which partitions these nodes hold, by node; those that say so."""
        questions = [Message(RecordDict(), node, MessageType.QUERY) for node in nodes]
        answers: dict[int, int] = {}
        if not questions:
            return answers
        for reply in self.grid.send_and_receive(questions, timeout=self.timeout):
            node = reply.metadata.src_node_id
            if reply.has_error():
                self._asked[node] = said(reply.error.reason or "an error without a reason")
                continue
            self._asked[node] = ""
            partition, reason = guarded(partial(partition_in, reply))
            if partition is None:
                log.warning("node %d left out: %s", node, reason)
            else:
                answers[node] = partition
        return answers

    def _take(self, answers: Mapping[int, int]) -> None:
        for node, partition in answers.items():
            if partition in self._node_of:
                raise TrainingError(f"two nodes hold partition {partition}")
            self._node_of[partition] = node

    def _look_for(self, partition: int) -> None:
        """Ask the nodes that have joined; one of them may have taken the place of one that left."""
        nodes = list(self.grid.get_node_ids())
        for node, held in self._ask(self._new(nodes)).items():
            log.warning("client %d: node %d holds it now", held, node)
            self._node_of[held] = node
            self._silent.discard(held)
        if partition in self._silent and self._node_of[partition] not in nodes:
            log.warning(
                "client %d: its node has left; a SuperNode with partition-id=%d takes its place",
                *(partition, partition),
            )


def _named(partitions: list[int]) -> str:
    """Return "partitions 1, 2, 3 and 7 more"."""
    first, more = ", ".join(map(str, partitions[:3])), len(partitions) - 3
    return f"partition{'s' * (len(partitions) > 1)} {first}" + f" and {more} more" * (more > 0)


def partition_answer(message: Message, partition: int) -> Message:
    """Return a node's answer to the roll call."""
    content = RecordDict({CONFIG: ConfigRecord({PARTITION: partition})})
    return Message(content, reply_to=message)
