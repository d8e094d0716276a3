"""Data sets in PyTorch's style, where data[row] is (image, label), as ours."""

from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from fedsam.base.errors import UsageError
from fedsam.data.datasets import Dataset
from fedsam.data.sources.listing import TESTING, TRAINING, Columns, in_memory, listed
from fedsam.data.sources.pictures import Encoded

if TYPE_CHECKING:
    from PIL import Image


@runtime_checkable
class MapStyle(Protocol):
    """What ``torch.utils.data.Dataset`` promises of a map-style data set."""

    def __getitem__(self, row: int, /) -> Any:
        """Return an image and its label."""
        ...

    def __len__(self) -> int:
        """Return how many there are."""
        ...


def from_torch(
    train: MapStyle,
    test: MapStyle | None = None,
    *,
    name: str = "mine",
    side: int = 0,
    channels: int = 3,
    crop: bool = True,
) -> Dataset:
    """Return a data set of ours from one of PyTorch's or torchvision's, or from a pair of them.

    Every item is read once and held in memory as bytes, so what is drawn anew each time belongs
    into --augment.

    Parameters
    ----------
    train, test : map-style data sets
        ``data[row]`` is (image, label): a picture of Pillow's, a tensor (C, H, W) or (H, W), or an
        array (H, W) or (H, W, C), of bytes or of floats in [0, 1]; and a whole number from 0.
        Without ``test`` a fifth of each class is held out.
    name : str
        What it is called.
    side, channels, crop
        As ``fedsam.data.sources.listing.in_memory`` has them.

    Raises
    ------
    UsageError
        If an item is no image with a label, or images are of several sizes.
    """
    where = f"--dataset {name}"
    parts = {TRAINING: train} if test is None else {TRAINING: train, TESTING[0]: test}
    items = [item for part, data in parts.items() for item in _items(where, part, data)]
    labels = [label for _, label in items]
    columns = Columns(
        [image for image, _ in items],
        np.array(list(map(str, labels))),
        parts=np.repeat(list(parts), [len(data) for data in parts.values()]),
    )
    classes = [str(number) for number in range(1 + max(labels, default=0))]
    listing = listed(name, where, columns, classes)
    return in_memory(listing, where, side=side, channels=channels, crop=crop)


def _items(where: str, part: str, data: MapStyle) -> Iterator[tuple[Encoded, int]]:
    """Yield the images and labels of a part."""
    for row in range(len(data)):
        item = data[row]
        here = f"{where}: {part} item {row}"
        if not isinstance(item, Sequence) or len(item) != 2:
            raise UsageError(f"{here}: must be (image, label), got {type(item).__name__}")
        image, label = item
        number = label.item() if isinstance(label, Tensor | np.generic) else label
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise UsageError(f"{here}: a label must be a whole number from 0, got {label!r:.40}")
        yield _encoded(here, image), number


def _encoded(here: str, image: Any) -> Encoded:
    """Return an image as a file without compression holds it."""
    from PIL import Image

    if not isinstance(image, Image.Image):
        image = _picture(here, image)
    file = BytesIO()
    image.save(file, "PPM" if image.mode in ("L", "RGB") else "TIFF")
    return Encoded(here, file.getvalue())


def _picture(here: str, pixels: Any) -> "Image.Image":
    """Return the picture that a tensor or an array of pixels shows."""
    from PIL import Image

    must = "must be a picture, or a tensor or array of bytes, or of floats in [0, 1]"
    if isinstance(pixels, Tensor):
        pixels = pixels.detach().cpu()
        pixels = pixels.movedim(0, -1) if pixels.dim() == 3 else pixels
        pixels = pixels.double() if pixels.is_floating_point() else pixels
    array = np.asarray(pixels)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.dtype.kind == "f":
        if not array.size or not (array.min() >= 0 and array.max() <= 1):
            raise UsageError(f"{here}: an image {must}: leave out what normalises it")
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8 or (array.ndim != 2 and array.shape[2:] != (3,)):
        raise UsageError(f"{here}: an image {must}, got {array.dtype} {array.shape}")
    return Image.fromarray(array)
