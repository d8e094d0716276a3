"""Flower's own runtime as an engine: its simulation, or a SuperLink with SuperNodes."""

import time
from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedsam.base.errors import TrainingError
from fedsam.messages import CONFIG, PARTITION, number_in, only_record, plain_content
from fedsam.server.grids import GridView

POLL = 0.5  # seconds between looks for nodes that have not connected yet


class FlowerGrid(GridView):
    """Flower's Grid, to which records are handed in Flower's own classes: bytes, not tensors."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push messages through the grid behind, serialised."""
        return self.grid.push_messages(serialised(messages))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages through the grid behind, serialised, and return the replies."""
        return self.grid.send_and_receive(serialised(messages), timeout=timeout)


def serialised(messages: Iterable[Message]) -> list[Message]:
    """Return the messages with plain records; one that several messages carry is made once."""
    made: dict[int, ArrayRecord] = {}
    out = []
    for message in messages:
        message.content = plain_content(message.content, made)
        out.append(message)
    return out


def roll_call(grid: Grid, clients: int, timeout: float = 600.0) -> dict[int, int]:
    """Ask every node which partition it holds; node ids are random, partition ids are not.

    Parameters
    ----------
    grid : Grid
        Flower's.
    clients : int
        Partitions that must be there.
    timeout : float
        Seconds to wait for the nodes to connect, and again for their answers.

    Returns
    -------
    dict
        From partition id to node id.

    Raises
    ------
    TrainingError
        If a partition has no node, or two.
    """
    end = time.monotonic() + timeout
    while len(nodes := list(grid.get_node_ids())) < clients:
        if time.monotonic() > end:
            raise TrainingError(
                f"{len(nodes)} of --clients {clients} nodes connected within {timeout:g} s"
            )
        time.sleep(POLL)
    questions = [Message(RecordDict(), node, MessageType.QUERY) for node in nodes]
    found: dict[int, int] = {}
    for reply in grid.send_and_receive(questions, timeout=timeout):
        if reply.has_error():
            continue
        partition = int(number_in(only_record(reply.content.config_records), PARTITION))
        if partition in found:
            raise TrainingError(f"two nodes hold partition {partition}")
        found[partition] = reply.metadata.src_node_id
    missing = sorted(set(range(clients)) - set(found))
    if missing:
        raise TrainingError(f"no node holds partition {missing[0]} ({len(missing)} are missing)")
    return found


def partition_answer(message: Message, partition: int) -> Message:
    """Return a node's answer to the roll call."""
    content = RecordDict({CONFIG: ConfigRecord({PARTITION: partition})})
    return Message(content, reply_to=message)
