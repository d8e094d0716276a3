"""CamVid: frames of a drive, and masks of what they show."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedsam.base.errors import UsageError
from fedsam.data.datasets import Dataset


def camvid(root: Path) -> Dataset:
    """CamVid, the split of SegNet's authors: 367 + 233 frames of a drive, masks of 11 classes.

    Folders ``camvid/train`` and ``camvid/test`` of frames, and ``camvid/trainannot`` and
    ``camvid/testannot`` of masks, in which 11 is void; the name up to the first underscore is the
    sequence, by which splits sort frames. An owner is 15 to 17 frames in a row of one sequence, 22
    in all, as many as FedSeg (CVPR 2023) has clients. Not downloaded.

    References
    ----------
    Brostow et al., "Semantic object classes in video", Pattern Recognition Letters 2009;
    Badrinarayanan et al., "SegNet", TPAMI 2017.
    """
    parts = [_frames(root / "camvid", part) for part in ("train", "test")]
    (train, masks, sequences), (test, test_masks, test_sequences) = parts
    names = sorted({*sequences, *test_sequences})
    classes, test_classes = (
        torch.tensor([names.index(name) for name in of_part])
        for of_part in (sequences, test_sequences)
    )
    owners = torch.empty_like(classes)
    begun = 0
    for sequence in classes.unique():
        rows = (classes == sequence).nonzero()[:, 0]
        pieces = rows.tensor_split(round(len(rows) / 17) or 1)
        for number, piece in enumerate(pieces, begun):
            owners[piece] = number
        begun += len(pieces)
    pixels = train.float() / 255
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3), correction=0)
    return Dataset(
        "camvid",
        train,
        masks,
        test,
        test_masks,
        11,
        tuple(mean.tolist()),
        tuple(std.tolist()),
        "segmentation",
        classes,
        test_classes,
        owners,
        ignore=255,
        test_groups={
            name: (test_classes == number).nonzero()[:, 0]
            for number, name in enumerate(names)
            if name in test_sequences
        },
    )


def _frames(folder: Path, part: str) -> tuple[Tensor, Tensor, list[str]]:
    """Return frames (N, 3, H, W), masks (N, H, W) with 255 for void, and each one's sequence."""
    from PIL import Image, UnidentifiedImageError

    frames, masks = (
        {path.stem: path for path in sorted((folder / name).glob("*.*"))}
        for name in (part, f"{part}annot")
    )
    if not frames or set(frames) != set(masks):
        odd = next(iter(sorted(set(frames) ^ set(masks))), None)
        raise UsageError(
            f"--data-root: {folder / part} and {part}annot must hold a frame and a mask each"
            + (f"; {odd} is in one of them only" if odd else ", and hold none")
        )
    read: list[list[np.ndarray]] = [[], []]
    for paths, mode, into in zip((frames, masks), ("RGB", "L"), read, strict=True):
        for path in paths.values():
            try:
                with Image.open(path) as image:
                    into.append(np.asarray(image.convert(mode)))
            except (OSError, UnidentifiedImageError) as error:
                raise UsageError(f"--data-root: {path} cannot be read ({error})") from error
            if into[-1].shape[:2] != read[0][0].shape[:2]:
                raise UsageError(f"--data-root: {path} has another size than the first frame")
    pixels = torch.from_numpy(np.stack(read[0])).permute(0, 3, 1, 2).contiguous()
    said = torch.from_numpy(np.stack(read[1]))
    return pixels, said.where(said != 11, 255), [name.partition("_")[0] for name in frames]
