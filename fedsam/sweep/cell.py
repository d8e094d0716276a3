"""A cell's process: ``fedsam.simulate``, asked to stop when the sweep that began it is gone.

The sweep holds the other end of a pipe; however it ends, the system closes that. Processes are
forked from one that has imported all this, so a cell begins at once.
"""

import os
import signal
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread

from fedsam.simulate.__main__ import main

PRELOADED = [
    *("fedsam.simulate.joint", "fedsam.simulate.progress", "fedsam.sweep.cell"),
    *("fedsam.engines.batched", "matplotlib.figure"),  # which a run imports when it needs them
]


def run_cells(files: Sequence[str], log: Path, sweep: Connection) -> None:
    """Run cells in this process, which ends with their exit code; ``log`` gets what they print."""
    Thread(target=_stop_with, args=(sweep,), daemon=True).start()
    with log.open("wb") as output:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(output.fileno(), stream.fileno())
    named = [word for file in files for word in ("--config", file)]
    sys.exit(main([*named, "--go-on", "--quiet"]))


def _stop_with(sweep: Connection) -> None:
    """Wait for the end of the sweep, then stop as by SIGTERM."""
    try:
        sweep.recv_bytes()
    except EOFError:
        os.kill(os.getpid(), signal.SIGTERM)
