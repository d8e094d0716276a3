"""Views of a Grid: the same seam with something more or less to see."""

from collections.abc import Iterable, Sequence

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedsam.base.system import Stop
from fedsam.server import compat


class GridView(Grid):
    """A Grid that passes everything on to another; what differs is overridden.

    Parameters
    ----------
    grid : Grid
        The one behind.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def set_run(self, run: compat.Run) -> None:
        """Set the run of the grid behind."""
        self.grid.set_run(run)

    @property
    def run(self) -> compat.Run:
        """The run of the grid behind."""
        return self.grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a new message."""
        return self.grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Return the node ids of the grid behind."""
        return self.grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push messages through the grid behind."""
        return self.grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull replies from the grid behind."""
        return self.grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages through the grid behind and return the replies."""
        return self.grid.send_and_receive(messages, timeout=timeout)


class CohortGrid(GridView):
    """A Grid of which only one round's cohort can be seen.

    Flower's strategies sample from ``get_node_ids``; shown just the sampled clients, any of them
    takes part in seeded sampling without knowing.

    Parameters
    ----------
    grid : Grid
        The one behind.
    nodes : sequence of int
        The cohort's.
    stop : Stop, optional
        Asked whether to go on.
    """

    def __init__(self, grid: Grid, nodes: Sequence[int], stop: Stop | None = None) -> None:
        super().__init__(grid)
        self.nodes = nodes
        self.stop = stop or Stop()

    def get_node_ids(self) -> Iterable[int]:
        """Return the cohort's node ids; a strategy that waits for more is stopped here, too."""
        self.stop.check()
        return list(self.nodes)
