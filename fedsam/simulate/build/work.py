"""What a client does with its images in a round: mini-batches and augmentations."""

import math
from collections.abc import Sequence

from fedsam.base.errors import UsageError, flag
from fedsam.config import keys
from fedsam.config.schema import Config
from fedsam.data.augment import (
    Augmentation,
    Crop,
    Cutout,
    Double,
    Flip,
    Jitter,
    Keys,
    Mirror,
    Mixup,
    Noise,
    ResizedCrop,
    Rotation,
    Scale,
)
from fedsam.data.datasets import Dataset
from fedsam.data.partition import Partition
from fedsam.data.plan import Work

AUGMENTATIONS = {"cifar10": "crop+flip", "cifar100": "crop+flip", "svhn": "crop"}  # else none
CROP_PADDING = 4  # pixels, as in the paper
MOST_IMAGES = 50_000_000  # of a client in a round: its plan has then 0.4 GB


def new_work(config: Config, dataset: Dataset, *, draws: bool) -> Work:
    """Return what a client takes of its images in a round; ``draws``: its loss draws numbers."""
    augmentations = augmentations_of(config, dataset)
    augmentations += [Keys()] if draws else []  # last: the rest of a plan is the same without them
    return Work(
        config.batch_size,
        config.local_epochs,
        config.local_steps,
        tuple(augmentations),
        drop_last=config.drop_last,
    )


def check_work(config: Config, work: Work, partition: Partition) -> None:
    """Raise UsageError where a client's plan of a round, drawn up front, would fill the memory."""
    most = int(partition.sizes.max())
    key = "local_steps" if config.local_steps else "local_epochs"
    if not math.isfinite(config.local_epochs * most):
        images = math.inf
    else:
        images = work.steps(most) * max(work.cut(most), default=0)
    if images > MOST_IMAGES:
        raise UsageError(
            f"{flag(key)} {getattr(config, key):g}: a client would take {images:.3g} images "
            f"a round; {MOST_IMAGES:,} at most, as each is planned before"
        )


def augmentations_of(config: Config, dataset: Dataset) -> list[Augmentation]:
    """Return what is done to training images, in order."""
    augment: str = config.augment
    if augment == "auto":
        augment = AUGMENTATIONS.get(config.dataset, "none")
    of_text = {} if augment == "none" else keys.augmentations(augment)
    augmentations: list[Augmentation] = []
    augmentations += [Crop(CROP_PADDING)] if "crop" in of_text else []
    if "scale" in of_text:
        low, high, *size = of_text["scale"]
        augmentations += [Scale(low, high, (int(size[0]), int(size[1])) if size else None)]
    if "resized_crop" in of_text:
        low, high, height, width = of_text["resized_crop"]
        augmentations += [ResizedCrop(low, high, (int(height), int(width)))]
    shape = shape_after(augmentations, dataset)
    if config.cutout > min(shape):
        raise UsageError(f"--cutout {config.cutout}: the images' side is {min(shape)} pixels")
    augmentations += [_rotation(config, *shape)] if config.client_rotations else []
    augmentations += [Flip()] if "flip" in of_text else []
    augmentations += [Mirror()] if "mirror" in of_text else []
    augmentations += [Double()] if "double" in of_text else []
    augmentations += [Jitter(*of_text["jitter"])] if "jitter" in of_text else []
    noise = config.client_noise
    augmentations += [Noise(noise, config.clients)] if noise else []
    augmentations += [Cutout(config.cutout)] if config.cutout else []
    augmentations += [Mixup(config.mixup)] if config.mixup else []
    return augmentations


def shape_after(augmentations: Sequence[Augmentation], dataset: Dataset) -> tuple[int, int]:
    """Return height and width of training images once they are augmented."""
    _, height, width = dataset.shape
    for augmentation in augmentations:
        height, width = augmentation.shape((height, width))
    return height, width


def _rotation(config: Config, height: int, width: int) -> Rotation:
    rotation = Rotation(tuple(map(float, config.client_rotations.split(","))))
    if height != width and any(round(angle / 90) % 2 for angle in rotation.angles):
        raise UsageError(
            f"--client-rotations {config.client_rotations}: images of {height} x {width} pixels "
            "cannot be turned on their side; give angles within 45 degrees of 0 or 180"
        )
    return rotation
