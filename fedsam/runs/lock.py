"""One writer a folder: a lock that ends with its process, however that ends.

It is the operating system's lock (``flock``) on a file that stays; the file's text says who held it
last. Who only reads takes none.
"""

import errno
import logging
import os
import shutil
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import IO

from fedsam.base.errors import StorageError, UsageError
from fedsam.runs.files import CONFIG, LOCK

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("fedsam")
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
LOOK = 0.1  # seconds between two tries


class Lock:
    """The lock of a folder, held from its making until it is closed.

    Parameters
    ----------
    folder : Path
        That is there.
    patience : float
        Seconds to wait while another holds it.
    name : str
        Of the file.

    Raises
    ------
    UsageError
        If another holds it, in this process or elsewhere, or nothing can be written there.
    FileNotFoundError
        If there is no such folder.
    """

    def __init__(self, folder: Path, patience: float = 0.0, name: str = LOCK) -> None:
        self.folder = folder
        self.path = folder / name
        end = time.monotonic() + patience
        while (file := self._taken()) is None:
            if time.monotonic() >= end:
                raise UsageError(f"{folder}: {self._holder()} writes there; wait until it ends")
            time.sleep(LOOK)
        self._file = file
        file.truncate(0)
        file.write(f"{os.getpid()} {socket.gethostname()}\n".encode())

    def _taken(self) -> IO[bytes] | None:
        """Return the open file with its lock; None if another holds it."""
        try:
            file = self.path.open("ab", buffering=0)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise UsageError(f"{self.path}: cannot be written: {error.strerror}") from error
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                file.close()
                raise UsageError(f"{self.path}: cannot be locked: {error.strerror}") from error
            log.warning("%s: no locks here: let no other process write there", self.folder)
            return file
        if _same(file, self.path):
            return file
        file.close()  # it was removed with its folder just now
        return self._taken()

    def _holder(self) -> str:
        """Return who holds it, as far as the file says."""
        try:
            number, host = self.path.read_text().split()
        except (OSError, ValueError):  # it has it just now
            return "another process"
        return f"process {number} on {host}"

    def check(self) -> None:
        """Raise StorageError if the folder is not the one that was locked any more."""
        if not _same(self._file, self.path):
            raise StorageError(f"{self.folder}: was moved or removed while the run wrote there")

    def remove_folder(self) -> None:
        """Remove the folder with all that is in it; config.yaml last, as without it is no run."""
        entries = [path for path in self.folder.iterdir() if path != self.path]
        for path in sorted(entries, key=lambda path: path.name == CONFIG):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self.path.unlink()
        self.folder.rmdir()

    def close(self) -> None:
        """Let others have it."""
        self._file.close()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _same(file: IO[bytes], path: Path) -> bool:
    """Return whether an open file is the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
