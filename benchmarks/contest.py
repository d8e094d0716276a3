"""Contestants in processes of their own, which play a round when they are told to.

So each one's start-up and memory are its own, and rounds of all can be timed in turn. Imports
nothing but the standard library: pfl's side runs in another environment.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LIMIT = 240.0  # seconds that an answer may take


class Ended(SystemExit):
    """A contestant is out of the contest."""


def serve(play: Callable[[], float], save: Callable[[str], None] | None = None) -> None:
    """Play rounds as the lines on standard input say, until it ends.

    Parameters
    ----------
    play : callable
        Plays a round and returns its seconds.
    save : callable, optional
        Writes the global model to the file that it is given.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    for line in sys.stdin:
        word, _, argument = line.strip().partition(" ")
        if word == "save" and save is not None:
            save(argument)
        print(json.dumps(play() if word == "round" else None), file=answers, flush=True)


class Contestant:
    """A process that serves rounds.

    Parameters
    ----------
    name : str
        What its row is called.
    command : sequence of str
        Starts it.
    log : Path
        Gets its standard error.
    extra : mapping, optional
        Additions to the environment.
    limit : float
        Seconds that an answer may take, the first one with its start.

    Raises
    ------
    Ended
        It has ended, or gave no answer in time and was ended; from ``round`` and ``ask``, too.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        extra: Mapping[str, str] | None = None,
        limit: float = LIMIT,
    ) -> None:
        self.name, self.log, self.limit = name, log, limit
        self.seconds: list[float] = []
        begin = time.perf_counter()
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment() | dict(extra or {}),
            )
        self.ask("round")
        self.until_first = time.perf_counter() - begin

    def ask(self, line: str) -> Any:
        """Send one line and return the answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: there is no answer either
        if not select.select([self.process.stdout], [], [], self.limit)[0]:
            end(tree({self.process.pid}))
            self.process.wait()
            raise Ended(f"{self.name}: no answer within {self.limit:.0f} s")
        answer = self.process.stdout.readline()
        if not answer:
            self.process.wait()
            last = (self.log.read_text().strip().splitlines() or ["it wrote nothing"])[-1]
            raise Ended(f"{self.name}: ended: {last}")
        return json.loads(answer)

    def round(self) -> None:
        """Play a timed round."""
        self.seconds.append(self.ask("round"))

    @property
    def start_up(self) -> float:
        """Seconds from the command to the end of its first round, less a round's median."""
        return self.until_first - median(self.seconds)

    def memory(self) -> float:
        """Return the peak memory of its process tree so far, in MB."""
        return peak_memory(tree({self.process.pid}))

    def close(self) -> float:
        """End it; return the peak memory of its process tree in MB."""
        memory = self.memory()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        return memory


def environment() -> dict[str, str]:
    """Return an environment in which fedsam and the benchmarks' modules can be imported."""
    paths = [str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


def take_turns(
    contestants: Sequence[Contestant], rounds: int, out: dict[str, str] | None = None
) -> None:
    """Let each play a round, then again, so that all see the machine at the same speed.

    Where ``out`` is given, it takes the names of those who end on the way, and why; the others go
    on. Without the first one there is no contest.
    """
    for _ in range(rounds):
        for contestant in contestants:
            if out and contestant.name in out:
                continue
            try:
                contestant.round()
            except Ended as ended:
                if out is None or contestant is contestants[0]:
                    raise
                out[contestant.name] = str(ended)


def ratio(mine: Sequence[float], base: Sequence[float]) -> float:
    """Return the median of the ratios within a turn."""
    return median(a / b for a, b in zip(mine, base, strict=True))


def tree(roots: set[int]) -> set[int]:
    """Return these processes and all below them."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            after_name = (entry / "stat").read_text().rpartition(")")[2]
        except OSError:  # ended meanwhile
            continue
        parents[int(entry.name)] = int(after_name.split()[1])
    found = set(roots)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def marked(mark: str) -> set[int]:
    """Return the processes that have ``mark`` in their command or environment."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            text = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
        except OSError:
            continue
        if mark.encode() in text and int(entry.name) != os.getpid():
            found.add(int(entry.name))
    return found


def peak_memory(processes: set[int]) -> float:
    """Return the sum of the processes' largest resident sizes in MB.

    Pages that several share (libraries, Ray's object store) count for each of them.
    """
    kilobytes = 0
    for pid in processes:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            continue
        kilobytes += sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return kilobytes / 1000


def end(processes: set[int]) -> None:
    """Kill what is left of these processes."""
    for pid in processes:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
