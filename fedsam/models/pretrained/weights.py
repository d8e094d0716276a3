"""The first weights of a network out of a safetensors file, by their ``state_dict`` names."""

import hashlib
import logging
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fedsam.base.errors import UsageError, one_line

log = logging.getLogger("fedsam")
PICKLES = (b"PK\x03\x04", b"\x80")  # how a .pth begins, a zip archive or, of old, the pickle alone
NAMED = 4  # tensors that a message names


def checksum(file: str) -> str:
    """Return the SHA-256 of a file of weights, in hex.

    Raises
    ------
    UsageError
        If it cannot be read.
    """
    try:
        with Path(file).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"--weights {file}: cannot be read: {error.strerror}") from error


@torch.no_grad()
def load_weights(module: nn.Module, file: str, classes: int, sha256: str = "") -> None:
    """Set the parameters and buffers of a network to those of a file; what is left is logged.

    Tensors that the file does not hold stay as they were initialised, and so does a head for
    another number of classes: one whose first dimension alone differs, and is the number of
    classes here or a multiple of it. A norm's scale and offset have the same names and shapes in
    BatchNorm as in GroupNorm.

    Parameters
    ----------
    module : nn.Module
        Changed in place.
    file : str
        Names as in the ``state_dict``; all may have one word in front that the others lack, such
        as ``net.`` or ``module.``.
    classes : int
        Of the data set.
    sha256 : str
        What the file's must be; "": any.

    Raises
    ------
    UsageError
        If it is no file of safetensors, or another one than the checksum's, no name in it is the
        network's, a tensor beside the head has another shape, or one holds numbers that are not
        finite.
    """
    here = f"--weights {file}"
    if sha256 and (found := checksum(file)) != sha256:
        raise UsageError(
            f"{here}: is another file than --weights-sha256 says: it has {found[:8]}..., not "
            f"{sha256[:8]}..."
        )
    tensors = _read(file)
    own = module.state_dict(keep_vars=True)
    pairs = _same(own, tensors)
    if not pairs:
        raise UsageError(
            f"{here}: none of its names is the model's; it has {_some(tensors)}, "
            f"the model {_some(own)}"
        )
    head = []
    for name, theirs in pairs.items():
        tensor, given = own[name], tensors[theirs]
        if not torch.isfinite(given).all():
            raise UsageError(f"{here}: {theirs!r} holds numbers that are not finite")
        if tensor.shape == given.shape:
            tensor.copy_(given)
        elif _of_head(tensor, given, classes):
            head.append(name)
        else:
            raise UsageError(
                f"{here}: {theirs!r} has shape {tuple(given.shape)}, the model's is "
                f"{tuple(tensor.shape)}; give the --model-options that the file was trained with"
            )
    _tell(here, head, [n for n in own if n not in pairs], set(tensors) - set(pairs.values()))


def _tell(here: str, head: list[str], missing: list[str], unused: Collection[str]) -> None:
    """Say in the log what is not as in the file."""
    left = {
        "as initialised, of another shape": head,
        "as initialised, not in the file": missing,
        "not the model's": sorted(unused),
    }
    said = [f"{what}: {_some(names)}" for what, names in left.items() if names]
    if said:
        log.warning("%s: %s", here, "; ".join(said))


def _read(file: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with Path(file).open("rb") as stream:
            begin = stream.read(9)  # of a .safetensors: the length of a JSON mapping, and that
        if begin.startswith(PICKLES) and not begin.endswith(b"{"):
            raise UsageError(
                f"--weights {file}: is a pickle, which could run code and is not opened; two lines "
                "in docs/pretrained.md make a .safetensors of it"
            )
        tensors: dict[str, Tensor] = load_file(file)
    except OSError as error:
        raise UsageError(f"--weights {file}: cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UsageError(
            f"--weights {file}: damaged, or no .safetensors: {one_line(error)}"
        ) from error
    return tensors


def _same(own: Collection[str], theirs: Collection[str]) -> dict[str, str]:
    """Return names of the model with those in the file that mean the same tensors."""
    found = []
    for a in ({n: n for n in own}, _without_first(own)):
        for b in ({n: n for n in theirs}, _without_first(theirs)):
            found.append({a[name]: b[name] for name in a if name in b})
    return max(found, key=len)


def _without_first(names: Collection[str]) -> dict[str, str]:
    """Return names by what follows their first word, if all have the same one."""
    rests = {name.partition(".")[2]: name for name in names}
    return rests if len({name.partition(".")[0] for name in names}) == 1 else {}


def _of_head(own: Tensor, given: Tensor, classes: int) -> bool:
    return (
        own.dim() == given.dim() > 0
        and own.shape[1:] == given.shape[1:]
        and own.shape[0] % classes == 0
    )


def _some(names: Collection[str] | Mapping[str, Tensor]) -> str:
    """Return a few names, and how many more there are."""
    first, more = list(names)[:NAMED], len(names) - NAMED
    return ", ".join(first) + f" and {more} more" * (more > 0)
