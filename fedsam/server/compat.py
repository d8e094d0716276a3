"""Every touch of Flower's non-public modules, with the version that needs it.

tests/server/test_compat.py fails clearly when a new flwr moves one of them.
"""

from flwr.serverapp import Grid
from flwr.supercore.run import Run as Run
from flwr.supercore.task_identity import TaskIdentity


def new_run(run_id: int = 1) -> Run:
    """Return the run object of a Grid that belongs to no SuperLink."""
    return Run.create_empty(run_id)


def identify_process(run_id: int = 1) -> None:
    """Let this process build ``Message`` objects.

    flwr >= 1.41 takes run, node and task ids of a new message from a process-wide identity, which
    its own runtimes set at start-up. Where one of them has, it is left as it is.
    """
    if TaskIdentity._run_id is None:
        TaskIdentity.run_id = run_id
        TaskIdentity.node_id = 1
        TaskIdentity.task_id = 1


def is_simulated(grid: Grid) -> bool:
    """Return whether a Grid is that of Flower's simulation, which has all its nodes at once.

    By name: its module has moved before.
    """
    return type(grid).__name__ == "InMemoryGrid"
