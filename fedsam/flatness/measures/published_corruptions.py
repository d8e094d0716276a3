"""CIFAR-10-C and CIFAR-100-C as published: a folder of NumPy files.

``labels.npy`` holds the test labels five times over, every other ``NAME.npy`` the images of one
corruption, uint8 (5 n, H, W, C): all n test images at severity 1, then at 2, up to 5. Hendrycks
and Dietterich (ICLR 2019, arXiv 1903.12261); n is 10,000.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsam.base.errors import UsageError

SEVERITIES = 5
BENCHMARK = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")  # published for validation
OFFICIAL = 10_000  # images at each severity


@dataclass(frozen=True)
class Published:
    """A folder that was found to be whole.

    Attributes
    ----------
    labels : Tensor
        int64 (n,), of the images at each severity.
    files : dict
        The file of each of the 19 corruptions that is there, in the published order.
    unknown : list of str
        Other .npy files in the folder, which are no part of the benchmark and are left alone.
    """

    labels: Tensor
    files: dict[str, Path]
    unknown: list[str]

    def images(self, corruption: str, severity: int) -> Tensor:
        """Return the images of a severity from 1 to 5, uint8 (n, H, W, C)."""
        n = len(self.labels)
        array = _array(self.files[corruption])
        return torch.from_numpy(array[n * (severity - 1) : n * severity].copy())


def read_published(folder: Path, shape: tuple[int, ...], labels: Tensor) -> Published:
    """Return the corruptions in a folder, of which only labels and headers are read yet.

    Parameters
    ----------
    folder : Path
        Holds labels.npy and a file for each corruption.
    shape : tuple of int
        (H, W, C) of the images that the model was trained on.
    labels : Tensor
        int64, of the clean test set.

    Raises
    ------
    UsageError
        If a file is missing, is not a plain NumPy array or holds something else.
    """
    path = folder / "labels.npy"
    if not path.is_file():
        raise UsageError(f"{path}: no such file; --folder takes an unpacked CIFAR-10-C.tar")
    array_of_labels = _array(path)
    count, kind = array_of_labels.size, array_of_labels.dtype.kind
    if array_of_labels.ndim != 1 or not count or count % SEVERITIES or kind not in "iu":
        raise UsageError(
            f"{path}: must hold {SEVERITIES} n integers, not {array_of_labels.dtype} "
            f"{array_of_labels.shape}"
        )
    blocks = array_of_labels.reshape(SEVERITIES, -1).astype(np.int64)
    if not (blocks == blocks[0]).all():
        raise UsageError(f"{path}: the labels of the {SEVERITIES} severities differ")
    of_images = torch.from_numpy(blocks[0])
    if len(of_images) == len(labels) and not torch.equal(of_images, labels):
        raise UsageError(f"{path}: these are not the labels of the run's test set")
    if int(of_images.min()) < 0 or int(of_images.max()) > int(labels.max()):
        raise UsageError(f"{path}: labels must lie in 0..{int(labels.max())}, as in the test set")
    there = {file.stem: file for file in sorted(folder.glob("*.npy")) if file != path}
    files = {name: there[name] for name in (*BENCHMARK, *EXTRA) if name in there}
    if not files:
        raise UsageError(f"{folder}: no corruption beside labels.npy, e.g. gaussian_noise.npy")
    wanted = (len(array_of_labels), *shape)
    for file in files.values():
        array = _array(file)
        if array.shape != wanted or array.dtype != np.uint8:
            raise UsageError(f"{file}: must be uint8 {wanted}, not {array.dtype} {array.shape}")
    return Published(of_images, files, [name for name in there if name not in files])


def _array(path: Path) -> NDArray[np.generic]:
    """Map a file: 150 MB each, of which one severity at a time is looked at."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UsageError(f"{path}: not a NumPy array of plain numbers: {error}") from error
