"""Benchmark data sets as tensors in memory: digits, MNIST, CIFAR, SVHN, digit scenes, ...."""

import gzip
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsam.base.errors import UsageError, nearest
from fedsam.base.randomness import torch_generator
from fedsam.data import groups
from fedsam.data.groups import Groups

DEBIAN = Path("/usr/share/datasets")  # where Debian's package dataset-fashion-mnist puts its files
IDX = (  # the files of MNIST and those in its format, with their dimensions
    ("train-images-idx3-ubyte", 3),
    ("train-labels-idx1-ubyte", 1),
    ("t10k-images-idx3-ubyte", 3),
    ("t10k-labels-idx1-ubyte", 1),
)


@dataclass(frozen=True)
class Dataset:
    """Images and their targets, for training and for testing.

    Attributes
    ----------
    name : str
        What it is called.
    train_images, test_images : Tensor
        uint8 (N, C, H, W).
    train_labels, test_labels : Tensor
        int64 (N,), from 0 to ``classes - 1``; or masks, uint8 (N, H, W), that of each pixel.
    classes : int
        Number of classes.
    mean, std : tuple of float
        Of each channel over the training images, for pixel values in [0, 1].
    task : str
        What reads the labels, unless --task says something else.
    train_classes, test_classes : Tensor, optional
        int64 (N,), from 0: what splits and pictures sort images by. None: the labels.
    owners : Tensor, optional
        int64 (N,), from 0: whose a training image is, where the data say so (--partition natural).
    ignore : int, optional
        The target of pixels that are of no class, and of what lies outside of an image.
    test_groups : mapping, optional
        Rows of the test set, int64 (n,), that are also told of by this name; they may overlap.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    task: str = "classification"
    train_classes: Tensor | None = None
    test_classes: Tensor | None = None
    owners: Tensor | None = None
    ignore: int | None = None
    test_groups: Groups | None = None

    @property
    def classes_of_train(self) -> Tensor:
        """What splits sort the training images by."""
        return self.train_labels if self.train_classes is None else self.train_classes

    @property
    def classes_of_test(self) -> Tensor:
        """What splits sort the test images by."""
        return self.test_labels if self.test_classes is None else self.test_classes


def load(name: str, root: Path) -> Dataset:
    """Return a data set by name.

    Parameters
    ----------
    name : str
        One of ``LOADERS``.
    root : Path
        Folder that holds the data sets in torchvision's layout (for MNIST and Fashion-MNIST also
        the .gz files in a folder ``mnist`` or ``fashion-mnist``, Debian's layout). What is not
        there is downloaded into it.

    Raises
    ------
    UsageError
        If there is no such data set, it can't be downloaded, or its files are damaged.
    """
    if name not in LOADERS:
        raise UsageError(
            f"--dataset: no {name!r}{nearest(name, LOADERS)}; have {', '.join(LOADERS)}, "
            "or package.module:function"
        )
    dataset = LOADERS[name](root)
    check(dataset)
    return dataset


def check(dataset: Dataset) -> None:
    """Check a data set that somebody made.

    Raises
    ------
    UsageError
        One line that says what is wrong with it.
    """

    def require(holds: bool, what: str) -> None:
        if not holds:
            raise UsageError(f"--dataset {getattr(dataset, 'name', dataset)}: {what}")

    require(isinstance(dataset, Dataset), "the function must return a fedsam.data.datasets.Dataset")
    for part in ("train", "test"):
        images, labels = (getattr(dataset, f"{part}_{kind}") for kind in ("images", "labels"))
        require(
            _is(images, torch.uint8, 4),
            f"{part}_images must be a uint8 tensor (N, C, H, W), got {_told(images)}",
        )
        masks = _is(labels, torch.uint8, 3)
        require(
            masks or _is(labels, torch.int64, 1),
            f"{part}_labels must be an int64 tensor (N,), or uint8 (N, H, W), got {_told(labels)}",
        )
        require(images[:1].numel() > 0 or not len(images), f"{part}_images have no pixels")
        require(
            len(images) == len(labels) > 0, f"{part} has {len(images)} images, {len(labels)} labels"
        )
        if masks:
            same = images.shape[2:] == labels.shape[1:]
            sizes = f"{tuple(labels.shape[1:])} for images of {tuple(images.shape[2:])}"
            require(same, f"{part}_labels are of {sizes}")
        valid = labels if dataset.ignore is None else labels[labels != dataset.ignore]
        require(len(valid) > 0, f"{part}_labels are all {dataset.ignore}, which is ignored")
        inside = int(valid.min()) >= 0 and int(valid.max()) < dataset.classes
        but = "" if dataset.ignore is None else f", or be {dataset.ignore}"
        require(inside, f"{part}_labels must lie in 0..{dataset.classes - 1}{but}")
        if (classes := getattr(dataset, f"{part}_classes")) is not None:
            one_each = _is(classes, torch.int64, 1) and len(classes) == len(images)
            require(one_each, f"{part}_classes must be int64, one an image, got {_told(classes)}")
            require(int(classes.min()) >= 0, f"{part}_classes must be numbers from 0")
    if (owners := dataset.owners) is not None:
        one_each = _is(owners, torch.int64, 1) and len(owners) == len(dataset.train_images)
        require(one_each, f"owners must be int64, one a training image, got {_told(owners)}")
        held = owners.unique()
        require(
            torch.equal(held, torch.arange(len(held))),
            "owners must be numbers from 0, each of an image at least",
        )
    shape, other = dataset.train_images.shape[1:], dataset.test_images.shape[1:]
    require(shape == other, f"images of {tuple(shape)} for training and {tuple(other)} for testing")
    for name in ("mean", "std"):
        values = getattr(dataset, name)
        long = isinstance(values, tuple | list) and len(values) == shape[0]
        require(long, f"{name} must have {shape[0]} entries, one a channel")
        require(all(map(math.isfinite, values)), f"{name} must be finite")
    require(min(dataset.std) > 0, "std must be positive")
    if dataset.test_groups is not None:
        where = f"--dataset {dataset.name}: test_groups"
        groups.check(dataset.test_groups, len(dataset.test_labels), where)


def _is(value: object, dtype: torch.dtype, dimensions: int) -> bool:
    return isinstance(value, Tensor) and value.dtype == dtype and value.ndim == dimensions


def _told(value: object) -> str:
    """Return what a value is, for the one who expected something else."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return f"an object of type {type(value).__name__}"


def digits(root: Path) -> Dataset:
    """Scikit-learn's handwritten digits: 1,797 real images of 8 x 8 pixels, bundled with it.

    A fifth of each class is for testing, the same whatever the run's seed.
    """
    # its file alone: importing scikit-learn takes longer than importing PyTorch
    file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    table = np.loadtxt(str(file), delimiter=",")
    grey = (table[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)).round()
    images = torch.from_numpy(grey.astype(np.uint8))
    labels = torch.from_numpy(table[:, -1].astype(np.int64))
    rank = torch.empty_like(labels)  # of an image within its class, in the order of the file
    for digit in range(10):
        rank[labels == digit] = torch.arange(int((labels == digit).sum()))
    test = rank % 5 == 4
    parts = images[~test], labels[~test], images[test], labels[test]
    return Dataset("digits", *parts, 10, (0.3052,), (0.3760,))


def digit_scenes(root: Path) -> Dataset:
    """Two of scikit-learn's digits on a canvas of 16 x 16 pixels, and a mask of what lies where.

    2,000 canvases of the digits for training and 500 of those for testing, so that no digit is in
    both; the same whatever the run's seed. A mask says digit + 1 where there is ink (a pixel of 96
    or more), 255, which is nothing, at its rim (32 to 95), and 0 for the background. Splits sort
    canvases by their first digit. In small what M2NIST is.
    """
    whole = digits(root)
    train = _scenes(whole.train_images, whole.train_labels, 2000)
    test = _scenes(whole.test_images, whole.test_labels, 500)
    return Dataset(
        "digit-scenes",
        *train[:2],
        *test[:2],
        11,
        (0.1526,),
        (0.3065,),
        "segmentation",
        train[2],
        test[2],
        ignore=255,
    )


def _scenes(ink: Tensor, labels: Tensor, many: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return canvases (M, 1, 16, 16), their masks, and the labels of their first digits."""
    generator = torch_generator(many, "digit scenes")
    decks = [torch.randperm(len(ink), generator=generator) for _ in range(2 * many // len(ink) + 1)]
    chosen = torch.cat(decks)[: 2 * many].view(2, many)
    # a digit in each half, shifted along the cut, which is upright or level
    shifts = torch.randint(0, 9, (2, many, 1, 1), generator=generator)
    upright = torch.rand(many, 1, 1, generator=generator) < 0.5
    images = torch.zeros(many, 16, 16, dtype=torch.uint8)
    masks = torch.zeros_like(images)
    canvas, pixel = torch.arange(many)[:, None, None], torch.arange(8)
    for half in (0, 1):
        pixels, cls = ink[chosen[half], 0], labels[chosen[half], None, None] + 1
        along, across = shifts[half] + pixel, 8 * half + pixel[:, None]
        rows = torch.where(upright, along.mT, across)
        columns = torch.where(upright, across.mT, along)
        images[canvas, rows, columns] = pixels
        said = torch.where(pixels >= 96, cls, torch.where(pixels >= 32, 255, 0))
        masks[canvas, rows, columns] = said.to(torch.uint8)
    return images[:, None], masks, labels[chosen[0]]


def mnist(root: Path) -> Dataset:
    """LeCun's handwritten digits: 60,000 + 10,000 images of 28 x 28 pixels."""
    return _idx("mnist", "MNIST", root, (0.1307,), (0.3081,))


def fashion_mnist(root: Path) -> Dataset:
    """Zalando's articles of clothing: 60,000 + 10,000 images of 28 x 28 pixels."""
    return _idx("fashion-mnist", "FashionMNIST", root, (0.2860,), (0.3530,))


def cifar10(root: Path) -> Dataset:
    """CIFAR-10: 50,000 + 10,000 colour images of 32 x 32 pixels, with its true statistics."""
    statistics = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    return _cifar("cifar10", "CIFAR10", "cifar-10-batches-py", root, *statistics)


def cifar100(root: Path) -> Dataset:
    """CIFAR-100: 50,000 + 10,000 colour images of 32 x 32 pixels, with its true statistics."""
    statistics = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    return _cifar("cifar100", "CIFAR100", "cifar-100-python", root, *statistics)


def svhn(root: Path) -> Dataset:
    """Street View House Numbers: 73,257 + 26,032 colour images of 32 x 32 pixels."""
    sets = [
        _torchvision("svhn", "SVHN", root, "train_32x32.mat and test_32x32.mat", split=split)
        for split in ("train", "test")
    ]
    train, test = (
        (torch.from_numpy(np.ascontiguousarray(s.data)), torch.from_numpy(s.labels).long())
        for s in sets
    )
    return Dataset("svhn", *train, *test, 10, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))


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


LOADERS: dict[str, Callable[[Path], Dataset]] = {
    "digits": digits,
    "digit-scenes": digit_scenes,
    "mnist": mnist,
    "fashion-mnist": fashion_mnist,
    "camvid": camvid,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "svhn": svhn,
}


def _cifar(
    name: str, cls: str, folder: str, root: Path, mean: tuple[float, ...], std: tuple[float, ...]
) -> Dataset:
    sets = [
        _torchvision(name, cls, root, f"the folder {folder}", train=part) for part in (True, False)
    ]
    train, test = (
        (torch.from_numpy(s.data).permute(0, 3, 1, 2), torch.tensor(s.targets, dtype=torch.int64))
        for s in sets
    )
    return Dataset(name, *train, *test, len(sets[0].classes), mean, std)


def _torchvision(name: str, cls: str, root: Path, files: str, **part: Any) -> Any:
    """Return one of torchvision's data sets; it checks what is there, and downloads what is not."""
    from torchvision import datasets

    make = getattr(datasets, cls)
    try:
        return make(root, download=True, **part)
    # RuntimeError: wrong checksum; HTTPException: a server's nonsense, which is no OSError
    except (OSError, RuntimeError, HTTPException) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise UsageError(
            f"--data-root {root}: {name} is missing there, or damaged, and cannot be downloaded "
            f"({reason}); put {files} there, as torchvision names them"
        ) from error


def _idx(
    name: str, cls: str, root: Path, mean: tuple[float, ...], std: tuple[float, ...]
) -> Dataset:
    """Return MNIST or a data set in its format, from where its four files are."""
    for folder in (root / name, root / cls / "raw", DEBIAN / name):
        if all(any(folder.glob(f"{file}*")) for file, _ in IDX):
            break
    else:
        _torchvision(name, cls, root, f"its four .gz files in a folder {name}")
        folder = root / cls / "raw"
    images, labels, test_images, test_labels = (_read_idx(folder, *file) for file in IDX)
    train, test = (images[:, None], labels.long()), (test_images[:, None], test_labels.long())
    return Dataset(name, *train, *test, 10, mean, std)


def _read_idx(folder: Path, name: str, dimensions: int) -> Tensor:
    """Return the array of an IDX file of bytes, compressed or not: magic, sizes, data."""
    plain, packed = folder / name, folder / f"{name}.gz"
    file = plain if plain.is_file() else packed
    try:
        content = plain.read_bytes() if file == plain else gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"--data-root: {file} is missing or damaged ({error})") from error
    begin = 4 + 4 * dimensions
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, begin, 4)]
    magic = b"\0\0\x08" + bytes([dimensions])
    if content[:4] != magic or len(content) != begin + math.prod(shape):
        raise UsageError(f"--data-root: {file} is damaged: not an IDX file of its own size")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=begin).reshape(shape).copy())
