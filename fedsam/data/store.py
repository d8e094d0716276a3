"""Where pixels lie that do not fit the memory: files of which rows are read."""

from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from io import BytesIO, FileIO
from pathlib import Path
from threading import Lock
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsam.base.errors import UsageError, one_line
from fedsam.base.system import cores

WAITING = 512 << 20  # bytes of pixels that were read ahead and are not taken yet
ROW = 8  # bytes of a row's number
PIECE = 16  # images that a thread decodes before it takes others


@runtime_checkable
class Store(Protocol):
    """Images that are read when they are asked for.

    Attributes
    ----------
    shape : tuple of int
        (N, H, W, C).
    """

    shape: tuple[int, int, int, int]

    def __len__(self) -> int:
        """Return N."""
        ...

    def read(self, rows: Tensor) -> Tensor:
        """Return the images at ``rows``, int64 (n,) in any order, as uint8 (n, H, W, C)."""
        ...


class RawStore:
    """The pixels of an array file, row by row.

    They are read, not mapped: what was read is the page cache's, which all processes of a machine
    share and the kernel takes back, and a file that was cut short is an error, not a crash.

    Parameters
    ----------
    path : Path
        NumPy's .npy of uint8 (N, H, W, C).

    Raises
    ------
    UsageError
        If it is missing, cut short, or another array.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UsageError(f"{path}: cannot be read: {one_line(error)}") from error
        if not isinstance(array, np.memmap):
            raise UsageError(f"{path}: must be one array, a .npy file")
        if array.dtype != np.uint8 or array.ndim != 4 or not array.flags.c_contiguous:
            raise UsageError(
                f"{path}: must be uint8 (N, H, W, C) in C order, got {array.dtype} {array.shape}"
            )
        self.shape: tuple[int, int, int, int] = array.shape
        self._begin = array.offset

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, rows: Tensor) -> Tensor:
        """Return the images at ``rows``, int64 (n,), as uint8 (n, H, W, C)."""
        out = torch.empty(len(rows), *self.shape[1:], dtype=torch.uint8)
        size = out[:1].numel()
        with opened(self.path) as file:
            for row, into in zip(rows.tolist(), out.numpy(), strict=True):
                file.seek(self._begin + row * size)
                if file.readinto(into.data.cast("B")) != size:
                    raise UsageError(f"{self.path}: ends before its image {row}")
        return out


class EncodedStore:
    """Images as JPEG or PNG files, end to end in one; a few threads decode what is read.

    Parameters
    ----------
    path : Path
        The files' bytes.
    offsets : array
        int64 (N + 1,), where each begins, and the last ends.
    shape : tuple of int
        (H, W, C) of each.

    Raises
    ------
    UsageError
        If the file is missing, or has not as many bytes.
    """

    def __init__(self, path: Path, offsets: NDArray[np.int64], shape: tuple[int, int, int]) -> None:
        self.path, self.offsets = path, offsets
        self.shape = (len(offsets) - 1, *shape)
        with opened(path) as file:
            size = file.seek(0, 2)
        if size != offsets[-1]:
            raise UsageError(f"{path}: has {size} bytes, its index says {offsets[-1]}")

    def __len__(self) -> int:
        return self.shape[0]

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(cores(), "fedsam-decode")

    def read(self, rows: Tensor) -> Tensor:
        """Return the images at ``rows``, int64 (n,), as uint8 (n, H, W, C)."""
        out = torch.empty(len(rows), *self.shape[1:], dtype=torch.uint8)
        pieces = list(zip(rows.split(PIECE), out.split(PIECE), strict=True))
        if len(pieces) > 1:
            list(self._pool.map(self._read, *zip(*pieces, strict=True)))
        elif pieces:
            self._read(*pieces[0])
        return out

    def _read(self, rows: Tensor, out: Tensor) -> None:
        """Decode images into ``out``, uint8 (n, H, W, C)."""
        from PIL import Image

        mode = "L" if self.shape[-1] == 1 else "RGB"
        with opened(self.path) as file:
            for row, into in zip(rows.tolist(), out.numpy(), strict=True):
                begin, end = map(int, self.offsets[row : row + 2])
                file.seek(begin)
                content = file.read(end - begin)
                if len(content) != end - begin:
                    raise UsageError(f"{self.path}: ends before its image {row}")
                try:
                    with Image.open(BytesIO(content), formats=("JPEG", "PNG")) as image:
                        pixels = np.asarray(image.convert(mode))
                # what Pillow's readers raise of damaged files
                except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                    unknown = isinstance(error, Image.UnidentifiedImageError)
                    said = "no JPEG or PNG" if unknown else one_line(error)
                    raise UsageError(f"{self.path}: image {row} is damaged: {said}") from error
                if pixels.shape[:2] != into.shape[:2]:
                    raise UsageError(
                        f"{self.path}: image {row} is of {(*pixels.shape[:2], into.shape[2])}, its "
                        f"set of {into.shape}"
                    )
                into[:] = pixels.reshape(into.shape)


class SelectedStore:
    """Some rows of stores, those of one after those of another.

    Parameters
    ----------
    selected : sequence
        Stores of images of one shape, each with rows of it, int64 (n,).
    """

    def __init__(self, selected: Sequence[tuple[Store, Tensor]]) -> None:
        self._stores = [store for store, _ in selected]
        self._rows = torch.cat([rows for _, rows in selected])
        lengths = torch.tensor([len(rows) for _, rows in selected])
        self._store_of = torch.repeat_interleave(torch.arange(len(selected)), lengths)
        self.shape = (len(self._rows), *self._stores[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, rows: Tensor) -> Tensor:
        """Return the images at ``rows``, int64 (n,), as uint8 (n, H, W, C)."""
        out = torch.empty(len(rows), *self.shape[1:], dtype=torch.uint8)
        for number, store in enumerate(self._stores):
            here = self._store_of[rows] == number
            out[here] = store.read(self._rows[rows[here]])
        return out


def rows_of(held: Any, rows: Tensor) -> Any:
    """Return some rows, int64 (n,) or where bool (N,) holds, of a tensor or a store."""
    if isinstance(held, Tensor):
        return held[rows]
    return SelectedStore([(held, rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows)])


def joined(one: Any, other: Any) -> Any:
    """Return the rows of two tensors, or of two stores, one after the other."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.cat([one, other])
    return SelectedStore([(store, torch.arange(len(store))) for store in (one, other)])


@contextmanager
def opened(path: Path) -> Iterator[FileIO]:
    """Open a file of pixels, to be read without a buffer.

    Raises
    ------
    UsageError
        If it cannot be opened, or read in what runs inside.
    """
    try:
        with FileIO(path) as file:
            yield file
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {one_line(error)}") from error


Pixels = tuple[Tensor, Tensor]  # of some rows, and their targets


class Ahead:
    """Reads in the background what is expected to be asked for, and has it ready then.

    Parameters
    ----------
    read : callable
        From rows, int64 (n,), to what they hold.
    size : int
        Bytes of a row.
    most : int
        Bytes that may wait to be taken; one piece always may.
    """

    def __init__(self, read: Callable[[Tensor], Pixels], size: int, most: int = WAITING) -> None:
        self._read, self._size, self._most = read, size, most
        self._lock = Lock()
        self._expected: dict[bytes, Tensor] = {}  # not begun, in order
        self._reading: dict[bytes, Future[Pixels]] = {}  # begun, or read, and not taken
        self._takes: dict[bytes, int] = {}  # expected of these: two, by this cohort and the next
        self._last: Set[bytes] = frozenset()
        self._bytes = 0

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(
            1, "fedsam-ahead", initializer=torch.set_num_threads, initargs=(1,)
        )

    def expect(self, pieces: Sequence[Tensor]) -> None:
        """Expect these rows, piece by piece, after what was expected the last time.

        What was expected before that and was not taken is given up.
        """
        new = {_key(rows): rows for rows in pieces}
        with self._lock:
            stay = self._last | new.keys()
            for key in self._reading.keys() - stay:
                self._reading.pop(key).cancel()
                self._bytes -= len(key) // ROW * self._size
            self._expected = {k: r for k, r in self._expected.items() if k in stay}
            there = self._reading.keys() | self._expected.keys()
            self._takes = {key: 1 + (key in new) for key in there} | dict.fromkeys(
                new.keys() - there, 1
            )
            self._expected |= {key: rows for key, rows in new.items() if key not in there}
            self._last = new.keys()
            self._begin()

    def take(self, rows: Tensor) -> Pixels:
        """Return what rows, int64 (n,), hold: it is there already, or is read now."""
        key = _key(rows)
        with self._lock:
            self._takes[key] = self._takes.get(key, 1) - 1
            again = self._takes[key] > 0
            future = self._reading.get(key)
            if not again:
                self._takes.pop(key)
                self._expected.pop(key, None)
                self._reading.pop(key, None)
        if again and future is not None:
            return future.result()
        if future is None:
            return self._read(rows)
        try:
            return self._read(rows) if future.cancel() else future.result()
        finally:
            with self._lock:
                self._bytes -= len(rows) * self._size
                self._begin()

    def _begin(self) -> None:
        """Begin to read what may wait to be taken."""
        for key, rows in list(self._expected.items()):
            size = len(rows) * self._size
            if self._reading and self._bytes + size > self._most:
                break
            self._bytes += size
            self._reading[key] = self._pool.submit(self._read, self._expected.pop(key))


def _key(rows: Tensor) -> bytes:
    return rows.numpy().tobytes()
