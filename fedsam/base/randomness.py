"""The only place that makes a seed: every random number of a run is keyed, none is a stream.

A generator is a pure function of (seed, purpose, numbers...), e.g. ("plan", round, client).
So nothing depends on the order in which clients are trained, on the engine or on a restart.
The global random states of torch, NumPy and Python are set in one place, ``global_streams``, for
code that knows no other generator: under a lock, and they are put back as they were.
"""

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock

import numpy as np
import torch

_GLOBAL_STREAMS = Lock()  # there is one set of them in a process


def key(seed: int, purpose: str, *numbers: int) -> int:
    """Return the 63-bit seed that belongs to ``(seed, purpose, *numbers)``.

    A hash keeps neighbours apart: ``seed + client`` would make (42, 1) and (43, 0) the same.
    """
    text = repr((int(seed), purpose, *map(int, numbers))).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def torch_generator(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """Return a fresh CPU generator for this key."""
    return torch.Generator().manual_seed(key(seed, purpose, *numbers))


def numpy_generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """Return a fresh NumPy generator for this key."""
    return np.random.default_rng(key(seed, purpose, *numbers))


def uniform(keys: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return numbers in (0, 1) that belong to keys.

    A hash of key and position (twice MurmurHash3's finaliser) in whole numbers: the same on every
    device, for one client and for a cohort, and in a CUDA graph, where no generator can be.

    Parameters
    ----------
    keys : torch.Tensor
        int64 (...,) in [0, 2**31), e.g. one an image.
    shape : sequence of int
        Of the numbers of one key.
    dtype : torch.dtype
        Of the numbers, which have 23 bits.

    Returns
    -------
    torch.Tensor
        (..., *shape).
    """
    position = torch.arange(math.prod(shape), device=keys.device)
    mine = keys[..., None]
    bits = _scattered(_scattered(position ^ mine) + mine)
    return ((bits >> 9).to(dtype) + 0.5).mul(2.0**-23).unflatten(-1, tuple(shape))


def normal(keys: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return standard normal numbers that belong to keys: the quantiles at those of ``uniform``.

    Parameters and shape are those of ``uniform``; none is above 5.3 in size.
    """
    return torch.erfinv(2 * uniform(keys, shape, dtype) - 1).mul_(math.sqrt(2))


def _scattered(bits: torch.Tensor) -> torch.Tensor:
    """Return the finaliser of 32-bit MurmurHash3 (Appleby, 2011) of whole numbers."""
    bits = bits & 0xFFFFFFFF
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return bits ^ (bits >> 16)


@contextmanager
def global_streams(seed: int, purpose: str, *numbers: int) -> Iterator[None]:
    """Let code that knows only global generators draw from this key inside.

    torch's initialisers do, layers such as dropout, and Flower's strategies: its sampling Python's,
    its differential privacy NumPy's. The states of torch (CPU, and this thread's GPU where one is
    in use), NumPy and Python are put back as they were; one thread at a time is inside.
    """
    value = key(seed, purpose, *numbers)
    gpus = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with _GLOBAL_STREAMS, torch.random.fork_rng(gpus):
        of_python, of_numpy = random.getstate(), np.random.get_state()
        torch.default_generator.manual_seed(value)
        for gpu in gpus:
            torch.cuda.default_generators[gpu].manual_seed(value)
        np.random.seed(value % 2**32)
        random.seed(value)
        try:
            yield
        finally:
            np.random.set_state(of_numpy)
            random.setstate(of_python)


def drew(code: Callable[[], object]) -> bool:
    """Return whether ``code`` draws from a global generator of torch, NumPy or Python."""

    def states() -> tuple[bytes, ...]:
        of_torch = [torch.get_rng_state()]
        of_torch += [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
        others = repr((random.getstate(), np.random.get_state(legacy=False)))
        return *(state.numpy().tobytes() for state in of_torch), others.encode()

    with global_streams(0, "drew"):
        before = states()
        code()
        return states() != before


def sample_clients(seed: int, round: int, clients: int, cohort: int, attempt: int = 0) -> list[int]:
    """Draw the cohort of one round, uniformly and without replacement.

    Parameters
    ----------
    seed : int
        The run's seed.
    round : int
        Communication round, from 1.
    clients : int
        Population size; the cost does not grow with it.
    cohort : int
        Clients to draw.
    attempt : int
        Another cohort for each, where the one before failed.

    Returns
    -------
    list of int
        Partition ids in ascending order.
    """
    again = (attempt,) if attempt else ()
    drawn = numpy_generator(seed, "cohort", round, *again).choice(clients, cohort, replace=False)
    return sorted(drawn.tolist())
