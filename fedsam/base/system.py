"""What the operating system offers: whole files, cores, and signals that ask a run to stop."""

import gc
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from fedsam.base.errors import UsageError

LONGEST_NAME, LONGEST_PATH = 255, 4000  # bytes: what file systems take
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run that was asked to stop, and did.

    Attributes
    ----------
    signal : int
        By which it was asked.
    folder : Path or None
        Where its checkpoint lies; None if it has none.
    round : int
        The last one that is done.
    """

    def __init__(
        self, signal: int = signal.SIGINT, folder: Path | None = None, round: int = 0
    ) -> None:
        super().__init__("interrupted")
        self.signal = signal
        self.folder = folder
        self.round = round

    @property
    def advice(self) -> str:
        """How to go on."""
        if self.folder is None:
            return ""
        return f"; go on with: python -m fedsam.simulate --resume {shown(self.folder)}"


class Stop:
    """Whether, and by which signal, a run was asked to stop."""

    def __init__(self) -> None:
        self.signal = 0

    def check(self) -> None:
        """Raise Interrupted if it was."""
        if self.signal:
            raise Interrupted(self.signal)


class Signalled(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, where it may come at any moment."""

    def __init__(self, signal: int) -> None:
        super().__init__("interrupted")
        self.signal = signal


def _say(line: bytes) -> None:
    """Write to stderr from a signal's handler: no print, it may be in the middle of one."""
    with suppress(OSError):  # nobody reads it any more
        os.write(2, line)


def end_at_once() -> None:
    """Let SIGINT and SIGTERM end the process in one line: while there is nothing to lose."""

    def end(number: int, frame: FrameType | None) -> None:
        _say(b"fedsam: interrupted\n")  # no exception: it could come out of any import
        os._exit(128 + number)

    for number in SIGNALS:
        signal.signal(number, end)


@contextmanager
def importing(heavy: str) -> Iterator[None]:
    """Search for no garbage while much is imported, which takes an eighth of a start.

    Modules stay: where ``heavy`` is imported inside for the first time, later searches leave out
    what there is by then.
    """
    first, searching = heavy not in sys.modules, gc.isenabled()
    gc.disable()
    try:
        yield
        if first:
            gc.freeze()
    finally:
        if searching:
            gc.enable()


@contextmanager
def raising() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise Signalled in what runs inside."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Signalled(number)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def listening() -> Iterator[Stop]:
    """Let SIGINT and SIGTERM ask what runs inside to stop; a second one ends the process."""
    stop = Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.signal:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        stop.signal = number
        _say(b"\nstopping after the clients at hand; again: now\n")

    before = {number: signal.signal(number, ask) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def shown(path: Path) -> str:
    """Return a path as a word of a command that can be copied into a shell."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def version(package: str) -> str:
    """Return the version of an installed package; of one that is not: "checkout"."""
    from importlib import metadata  # not cheap, and seldom asked

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "checkout"


def expanded(path: str | os.PathLike[str]) -> str:
    """Return a path with ``~`` and ``$VAR`` or ``${VAR}`` as the shell would read them.

    Raises
    ------
    UsageError
        If there is no such variable, or no file can have such a name.
    """
    text = os.fspath(path)
    for braced, plain in re.findall(r"\$(?:\{(\w+)\}|(\w+))", text, re.ASCII):
        if (braced or plain) not in os.environ:
            raise UsageError(f"the environment has no variable {braced or plain}")
    whole = os.path.expanduser(os.path.expandvars(text))
    try:
        name = whole.encode()
    except UnicodeEncodeError as error:
        raise UsageError("holds a character that is none") from error
    if b"\0" in name:
        raise UsageError("holds the character NUL, which no path can")
    if len(name) > LONGEST_PATH or max(map(len, name.split(b"/"))) > LONGEST_NAME:
        raise UsageError(f"is too long for a path; a name has {LONGEST_NAME} bytes at most")
    return whole


def write_whole(path: Path, content: bytes | str | Iterable[bytes | memoryview]) -> None:
    """Write a file so that a kill or a power cut leaves the old one, or the new one, or none.

    The content, maybe in parts, is written beside it, forced to the disk, and renamed.
    """
    whole = content.encode() if isinstance(content, str) else content
    parts = [whole] if isinstance(whole, bytes) else whole
    beside = path.parent / f".{path.name}.part"
    try:
        with beside.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # of the new name
    finally:
        os.close(folder)
