"""Flower's own runtime as an engine: its simulation, or a SuperLink with SuperNodes."""

import logging
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedsam.base.errors import TrainingError, UsageError
from fedsam.engines.node_keys import keys_of
from fedsam.messages import CONFIG, PARTITION, plain_content
from fedsam.server import compat
from fedsam.server.grids import GridView
from fedsam.server.replies import guarded, partition_in, said

log = logging.getLogger("fedsam")
POLL = 0.5  # seconds between looks for nodes that have not connected yet
LINE = 10.0  # seconds between lines that say who is waited for
SETTLED = 3.0  # seconds without a new node after which as many nodes as clients are all of them
ANSWER = 60.0  # seconds in which a deployed node says what it holds; doubled while one does not
MUTE = "it does not say which partition it holds"


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
        return self.grid.push_messages(
            serialised(m for m in messages if m.metadata.dst_node_id >= 0)
        )

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages through the grid behind, serialised, and return the replies."""
        sent = serialised(m for m in messages if m.metadata.dst_node_id >= 0)
        if not sent:
            return []
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

    A partition belongs to the node whose public key stands beside it in ``owners``; without
    ``owners``, to the node that said so first. A node that says anything else, or nothing, is left
    out and named in one line: it cannot stop the others. Nodes that hold nothing are asked again,
    more and more rarely, when a partition is wanted whose node did not answer.

    Parameters
    ----------
    grid : Grid
        Flower's.
    clients : int
        Partitions that there are.
    timeout : float
        Seconds to wait for the next node to connect.
    owners : mapping, optional
        From public key to partition id, as ``node_keys.owners`` returns it.
    needed : int
        Partitions with a node below which the run does not begin.

    Raises
    ------
    UsageError
        If a simulation has too few nodes, or ``owners``.
    TrainingError
        If fewer than ``needed`` partitions have a node.
    """

    def __init__(
        self,
        grid: Grid,
        clients: int,
        timeout: float = 600.0,
        *,
        owners: Mapping[str, int] | None = None,
        needed: int = 1,
    ) -> None:
        self.grid = grid
        self.clients = clients
        self.timeout = timeout
        self.owners = owners
        self.needed = needed
        self._node_of: dict[int, int] = {}
        self._silent: set[int] = set()  # partitions whose node did not answer, or that have none
        self._left_out: dict[int, str] = {}  # nodes, and why
        self._asked: dict[int, tuple[int, float]] = {}  # nodes: how often, when they may be again
        self._answer = timeout if compat.is_simulated(grid) else min(ANSWER, timeout)
        self._gather()

    def __getitem__(self, partition: int) -> int:
        """Return the node that holds a partition; where none does, a number below 0."""
        if partition in self._silent:
            self._look_for(partition)
        return self._node_of.get(partition, ~partition)

    def __iter__(self) -> Iterator[int]:
        """Iterate over the partitions that have a node."""
        return iter(self._node_of)

    def __len__(self) -> int:
        """Return how many partitions have a node."""
        return len(self._node_of)

    def note_silent(self, nodes: Collection[int]) -> None:
        """Take down which nodes did not answer."""
        self._silent |= {p for p, node in self._node_of.items() if node in nodes}

    def _gather(self) -> None:
        """Wait until there is a node for each partition, and say who is waited for."""
        simulated = compat.is_simulated(self.grid)
        if simulated and self.owners is not None:
            raise UsageError("--node-keys: a simulation's nodes have no keys; leave it out")
        most, since, say = 0, time.monotonic(), time.monotonic() + LINE
        while True:
            nodes, now = list(self.grid.get_node_ids()), time.monotonic()
            enough = len(nodes) >= self.clients
            if enough or (now > say and not simulated):
                self._take(self._ask(nodes))
            missing = [p for p in range(self.clients) if p not in self._node_of]
            if not missing:
                return
            if len(nodes) > most:
                most, since = len(nodes), now
            mute = [node for node in nodes if self._left_out.get(node) == MUTE]
            coming = not enough or bool(mute)
            if now - since > (self.timeout if coming and not simulated else SETTLED):
                if simulated and not enough:
                    raise UsageError(
                        f"--clients {self.clients}: the simulation has {len(nodes)} nodes; give "
                        f"--federation-config 'num-supernodes={self.clients}'"
                    )
                return self._begin_without(missing, nodes)
            for node in mute:  # at once; a slow node needs more time, and is no worse for it
                self._asked.pop(node, None)
            if now > say:
                say = now + LINE
                log.warning(
                    "waiting for nodes: %d of --clients %d are there; nobody holds %s",
                    *(len(nodes), self.clients, _named(missing)),
                )
            time.sleep(POLL)

    def _begin_without(self, missing: list[int], nodes: list[int]) -> None:
        """Let the run begin without some partitions, unless too few have a node."""
        if len(self._node_of) < self.needed:
            wrong = next((node for node in nodes if node in self._left_out), None)
            why = f"{len(nodes)} nodes are there"
            if wrong is not None:
                why = f"node {wrong}: {self._left_out[wrong]}"
            raise TrainingError(
                f"no node holds partition {missing[0]} ({len(missing)} are missing; {why})"
            )
        log.warning("the run begins without %s; a node may still join", _named(missing))
        self._silent |= set(missing)

    def _ask(self, nodes: Iterable[int]) -> dict[int, int]:
        """Return which partitions nodes hold, by node; of those whose turn it is and that may."""
        due, keys, answers = self._due(nodes), dict[int, str](), dict[int, int]()
        if due and self.owners is not None:
            keys = keys_of(self.grid)
            for node in [node for node in due if keys.get(node) not in self.owners]:
                due.remove(node)
                self._leave_out(node, "its key is not in --node-keys")
        if not due:
            return answers
        questions = [Message(RecordDict(), node, MessageType.QUERY) for node in due]
        for reply in self.grid.send_and_receive(questions, timeout=self._answer):
            node = reply.metadata.src_node_id
            if node not in due:
                continue
            due.remove(node)
            partition, reason = self._claimed(reply, keys.get(node, ""))
            if partition is None:
                self._leave_out(node, reason)
            else:
                answers[node] = partition
        for node in due:
            self._leave_out(node, MUTE)
            times, _ = self._asked[node]  # a round that waits for it takes a tenth longer at most
            self._asked[node] = times, time.monotonic() + 10 * self._answer
        if due:
            self._answer = min(2 * self._answer, self.timeout)
        return answers

    def _claimed(self, reply: Message, key: str) -> tuple[int | None, str]:
        """Return the partition that a node says it holds, or why it does not hold it."""
        if reply.has_error():
            return None, f"it answered: {said(reply.error.reason or 'an error without a reason')}"
        partition, reason = guarded(partial(partition_in, reply))
        if partition is None:
            return None, reason
        if partition >= self.clients:
            return None, f"it says partition {partition}, --clients {self.clients} have fewer"
        if self.owners is not None and self.owners[key] != partition:
            return None, f"it says partition {partition}, its key's is {self.owners[key]}"
        return partition, ""

    def _due(self, nodes: Iterable[int]) -> list[int]:
        """Return the nodes that hold nothing and were not asked just now; they are asked."""
        now, holders, due = time.monotonic(), set(self._node_of.values()), []
        for node in nodes:
            times, again = self._asked.get(node, (0, 0.0))
            if node not in holders and now >= again:
                self._asked[node] = times + 1, now + LINE * 2**times
                due.append(node)
        return due

    def _take(self, answers: Mapping[int, int]) -> list[int]:
        """Give partitions that have no node, or a silent one, to nodes; return the partitions."""
        taken = []
        for node, partition in answers.items():
            if partition in self._node_of and partition not in self._silent:
                holder = self._node_of[partition]
                self._leave_out(node, f"it says partition {partition}, which node {holder} holds")
                continue
            self._node_of[partition] = node
            self._silent.discard(partition)
            self._left_out.pop(node, None)
            taken.append(partition)
        return taken

    def _leave_out(self, node: int, why: str) -> None:
        """Say once why a node holds nothing."""
        if self._left_out.get(node) != why:
            log.warning("node %d left out: %s", node, why)
        self._left_out[node] = why

    def _look_for(self, partition: int) -> None:
        """Ask the nodes that hold nothing; one of them may take the place of one that left."""
        nodes = list(self.grid.get_node_ids())
        for held in self._take(self._ask(nodes)):
            log.warning("client %d: node %d holds it now", held, self._node_of[held])
        if partition in self._silent and self._node_of.get(partition) not in {None, *nodes}:
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
