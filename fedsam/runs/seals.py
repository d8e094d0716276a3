"""Seals: SHA-256 by which a file is known to be what the run wrote."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedsam.base.errors import UsageError


def seal_of(content: bytes) -> str:
    """Return the seal of a file with this content."""
    return hashlib.sha256(content).hexdigest()


def own_seal(values: Mapping[str, Any]) -> str:
    """Return the seal that a JSON object can hold of its other values."""
    return seal_of(json.dumps(values, sort_keys=True).encode())


def sealed(path: Path, seals: Iterable[str], length: int | None = None) -> bytes:
    """Return what a file holds, its first ``length`` bytes if that is given.

    Raises
    ------
    UsageError
        If that is nothing that has one of the seals.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be read ({error.strerror}); put it back, or start the run anew"
        ) from error
    if length is not None and len(content) < length:
        raise UsageError(f"{path}: is shorter than it was; put it back, or start the run anew")
    if seal_of(content[:length]) not in seals:
        raise UsageError(
            f"{path}: was changed or damaged after the run wrote it (its checksum is another one); "
            "put it back as it was, or start the run anew"
        )
    return content[:length]
