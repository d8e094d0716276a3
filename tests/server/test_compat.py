"""What we touch of Flower's inside: fails here when a new flwr moves it."""

import importlib
import inspect
import subprocess
import sys

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedsam.server import compat

MEND = "flwr changed: see fedsam/server/compat.py"


def test_a_process_can_build_messages():
    compat.identify_process()
    message = Message(RecordDict(), 3, MessageType.TRAIN)
    reply = Message(RecordDict(), reply_to=message)
    assert reply.metadata.src_node_id == 3, MEND


def test_an_identity_that_flower_set_is_left_alone():
    code = (
        "from flwr.supercore.task_identity import TaskIdentity as T\n"
        "T.run_id, T.node_id, T.task_id = 7, 8, 9\n"
        "from fedsam.server.compat import identify_process\n"
        "identify_process()\n"
        "print(T.run_id, T.node_id, T.task_id)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["7", "8", "9"], MEND


def test_a_run_can_be_made():
    assert compat.new_run(5).run_id == 5, MEND


def test_the_grid_of_a_simulation_is_known_by_its_name():
    from flwr.superlink.grid import HttpGrid, InMemoryGrid

    grids = [object.__new__(kind) for kind in (InMemoryGrid, HttpGrid)]
    assert [compat.is_simulated(grid) for grid in grids] == [True, False], MEND
    source = inspect.getsource(importlib.import_module("flwr.simulation.run_simulation"))
    assert "grid = InMemoryGrid(" in source, MEND


def test_the_seam_has_the_members_that_we_implement():
    assert Grid.__abstractmethods__ == {
        "set_run",
        "run",
        "create_message",
        "get_node_ids",
        "push_messages",
        "pull_messages",
        "send_and_receive",
    }, MEND
    assert Strategy.__abstractmethods__ == {
        "configure_train",
        "aggregate_train",
        "configure_evaluate",
        "aggregate_evaluate",
        "summary",
    }, MEND
