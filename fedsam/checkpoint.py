"""Checkpoints: what a run needs to go on, as two files that are there whole or not at all.

``round-00000150.safetensors`` holds tensors, ``round-00000150.json`` all else, the checksum of the
first and one of its own. The JSON is written last: without it there is no checkpoint.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fedsam.base.system import write_whole

log = logging.getLogger("fedsam")
FOLDER = "checkpoints"
KEPT = 2


@dataclass(frozen=True)
class Snapshot:
    """A run after a round.

    Attributes
    ----------
    round : int
        The last one that is done.
    tree : dict
        What JSON can hold.
    tensors : dict
        By name, as they were when it was taken.
    """

    round: int
    tree: dict[str, Any]
    tensors: dict[str, Tensor]


def save(run: Path, snapshot: Snapshot) -> None:
    """Write a checkpoint into a run's folder; the one before is kept, older ones are not."""
    from safetensors.torch import save as dump_tensors

    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    name = f"round-{snapshot.round:08d}"
    # each by itself: safetensors takes no tensors that share memory
    whole = {n: t.detach().cpu().contiguous().clone() for n, t in snapshot.tensors.items()}
    data = dump_tensors(whole)
    write_whole(folder / f"{name}.safetensors", data)
    body = {"round": snapshot.round, "tensors": _sum(data), "tree": snapshot.tree}
    write_whole(folder / f"{name}.json", json.dumps(body | {"self": _own_sum(body)}))
    for old in names(run)[:-KEPT]:
        (folder / f"{old}.json").unlink()
        (folder / f"{old}.safetensors").unlink(missing_ok=True)


def names(run: Path) -> list[str]:
    """Return the names of a run's checkpoints, the oldest first."""
    return sorted(path.stem for path in (run / FOLDER).glob("round-*.json"))


def load(run: Path) -> Snapshot | None:
    """Return a run's newest checkpoint that is not damaged; warn of those that are."""
    for name in reversed(names(run)):
        try:
            return _read(run / FOLDER, name)
        except (OSError, ValueError, KeyError) as error:
            log.warning("checkpoint %s is damaged (%s); the one before is used", name, error)
    return None


def _read(folder: Path, name: str) -> Snapshot:
    from safetensors.torch import load as load_tensors

    body = json.loads((folder / f"{name}.json").read_text())
    if not isinstance(body, dict):
        raise ValueError("its JSON is no mapping")
    own = body.pop("self")
    if own != _own_sum(body):
        raise ValueError("its JSON has another checksum")
    data = (folder / f"{name}.safetensors").read_bytes()
    if _sum(data) != body["tensors"]:
        raise ValueError("its tensors have another checksum")
    return Snapshot(body["round"], body["tree"], load_tensors(data))


def _sum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _own_sum(body: dict[str, Any]) -> str:
    return _sum(json.dumps(body, sort_keys=True).encode())
