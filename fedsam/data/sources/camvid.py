"""CamVid: frames of a drive, and masks of what they show."""

from pathlib import Path

import numpy as np

from fedsam.base.errors import UsageError
from fedsam.data.datasets import Dataset
from fedsam.data.sources.listing import Listing, Part, in_memory

CLASSES = (
    *("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car"),
    *("pedestrian", "bicyclist"),
)
IGNORED = 255
OWNED = 17  # frames of an owner: 22 in all, as many as FedSeg (CVPR 2023) has clients


def camvid(root: Path) -> Dataset:
    """CamVid, the split of SegNet's authors: 367 + 233 frames of a drive, masks of 11 classes.

    In the folder ``camvid``, as ``frames`` reads it. Not downloaded.
    """
    return in_memory(frames(root / "camvid"), "--data-root")


def frames(path: Path) -> Listing:
    """CamVid, the split of SegNet's authors: frames of a drive, their masks of 11 classes.

    An owner is 15 to 17 frames in a row of one sequence, 22 in all.

    Parameters
    ----------
    path : Path
        Folders ``train`` and ``test`` of frames, ``trainannot`` and ``testannot`` of masks, in
        which 11 is void. The name up to the first underscore is the sequence, which splits sort
        by, and of which test frames are told apart.

    References
    ----------
    Brostow et al., "Semantic object classes in video", Pattern Recognition Letters 2009;
    Badrinarayanan et al., "SegNet", TPAMI 2017.
    """
    files = {part: _files(path, part) for part in ("train", "test")}
    sequences = {part: [name.partition("_")[0] for name in files[part]] for part in files}
    names = sorted({*sequences["train"], *sequences["test"]})
    classes = {
        part: np.array([names.index(name) for name in sequences[part]], np.int64) for part in files
    }
    owners, begun = np.empty_like(classes["train"]), 0
    for sequence in np.unique(classes["train"]):
        rows = np.flatnonzero(classes["train"] == sequence)
        pieces = np.array_split(rows, round(len(rows) / OWNED) or 1)
        for number, piece in enumerate(pieces, begun):
            owners[piece] = number
        begun += len(pieces)
    values = np.arange(256, dtype=np.uint8)
    values[len(CLASSES)] = IGNORED
    train, test = (
        Part(
            [frame for frame, _ in files[part].values()],
            [mask for _, mask in files[part].values()],
            owners if part == "train" else None,
            classes=classes[part],
            groups=np.unique(classes[part], return_inverse=True)[1] if part == "test" else None,
        )
        for part in files
    )
    return Listing(
        "camvid",
        train,
        test,
        CLASSES,
        tuple(map(str, range(begun))),
        task="segmentation",
        ignore=IGNORED,
        mask_values=values,
        groups=tuple(sorted(set(sequences["test"]))),
    )


def _files(path: Path, part: str) -> dict[str, tuple[str, str]]:
    """Return the paths of each frame and its mask, by name."""
    frames, masks = (
        {file.stem: str(file) for file in sorted((path / folder).glob("*.*"))}
        for folder in (part, f"{part}annot")
    )
    if not frames or set(frames) != set(masks):
        odd = next(iter(sorted(set(frames) ^ set(masks))), None)
        raise UsageError(
            f"--dataset camvid: {path / part} and {part}annot must hold a frame and a mask each"
            + (f"; {odd} is in one of them only" if odd else ", and hold none")
        )
    return {name: (frames[name], masks[name]) for name in frames}
