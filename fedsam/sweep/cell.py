"""A cell's process: ``fedsam.simulate``, asked to stop when the sweep that began it is gone.

The sweep holds the other end of a pipe at this process's standard input; however it ends, the
system closes that.
"""

import os
import signal
import sys
from threading import Thread

from fedsam.base.system import end_at_once


def stop_with_sweep() -> None:
    """Wait for the end of standard input, then stop as by SIGTERM."""
    os.read(sys.stdin.fileno(), 1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    end_at_once()
    Thread(target=stop_with_sweep, daemon=True).start()
    from fedsam.simulate.__main__ import main

    sys.exit(main())
