"""Whose partition is whose: a file of the server's, from SuperNodes' public keys to partitions."""

from contextlib import suppress
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
    load_ssh_public_key,
)
from flwr.serverapp import Grid

from fedsam.base.errors import UsageError, one_line


def owners(path: str, clients: int) -> dict[str, int]:
    """Return the partition of each public key in a file.

    A line is a partition, a space, and what stands in a SuperNode's ``.pub`` file; empty lines and
    those that begin with ``#`` are passed over::

        0 ecdsa-sha2-nistp384 AAAAE2VjZHNhLXNoYTItbmlzdHAzODQ... node-0

    Parameters
    ----------
    path : str
        The file.
    clients : int
        Partitions that there are: each must have a key, and one only.

    Returns
    -------
    dict
        From key, as ``keys_of`` writes it, to partition.

    Raises
    ------
    UsageError
        One line that names the file's line and says what would be right.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is no text file"
        raise UsageError(f"--node-keys {path}: {reason}") from error
    found: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            partition, key = _entry(line, clients)
            if key in found or partition in found.values():
                what = "this key" if key in found else f"partition {partition}"
                raise ValueError(f"{what} has a line before; a partition has one key")
        except (ValueError, UnsupportedAlgorithm) as error:
            raise UsageError(f"--node-keys {path}, line {number}: {one_line(error)}") from error
        found[key] = partition
    if missing := sorted(set(range(clients)) - set(found.values())):
        raise UsageError(
            f"--node-keys {path}: no key for partition {missing[0]}; each of --clients {clients} "
            "needs a line"
        )
    return found


def keys_of(grid: Grid) -> dict[int, str]:
    """Return the public key of each node in OpenSSH's form, as far as the SuperLink knows one.

    Whether a node has the private key is asked by the SuperLink, at every request, where it was
    started with ``--enable-supernode-auth``.
    """
    found = {}
    for node in grid.get_nodes():
        # without authentication a node may have registered anything
        with suppress(ValueError, UnsupportedAlgorithm):
            found[node.node_id] = _text(load_pem_public_key(node.public_key))
    return found


def _entry(line: str, clients: int) -> tuple[int, str]:
    """Return the partition and the key of a line."""
    words = line.split(maxsplit=1)
    if len(words) != 2 or not words[0].isdecimal():
        raise ValueError("must be a partition and a public key, '0 ecdsa-sha2-nistp384 ...'")
    if int(words[0]) >= clients:
        raise ValueError(f"partition {words[0]}: --clients {clients} have 0 to {clients - 1}")
    return int(words[0]), _text(load_ssh_public_key(words[1].strip().encode()))


def _text(key: object) -> str:
    """Return an elliptic-curve key in OpenSSH's form, without a comment."""
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError("must be an EC key, such as 'ssh-keygen -t ecdsa -b 384' makes")
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
