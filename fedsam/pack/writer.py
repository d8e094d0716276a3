"""Writes a packed folder: each image decoded, brought to one size, encoded, and put end to end."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedsam.base.errors import StorageError, UsageError, one_line
from fedsam.base.system import write_whole
from fedsam.data.sources import packed_folder as folder
from fedsam.data.sources.listing import Listing, Part
from fedsam.data.sources.pictures import Levels, Picture, PictureError, all_of

QUALITY = 90  # of JPEG: a quarter of PNG's bytes, no difference that the eye sees


class Packed(NamedTuple):
    """An image as it is written, (H, W, C) and encoded, and its encoded mask, if it has one."""

    pixels: NDArray[np.uint8]
    content: bytes
    mask: bytes = b""


def write(
    out: Path,
    listing: Listing,
    *,
    side: int,
    encoding: str = "jpeg",
    channels: int = 3,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Pack a data set into a new folder, all of it or nothing.

    Parameters
    ----------
    out : Path
        The folder; it must not exist.
    listing : Listing
        What the data set consists of.
    side : int
        Pixels of the shorter side. Of images with labels the square in the middle is taken; images
        with masks keep the proportions of the first. 0: they are all of one size, and keep it.
    encoding : str
        "jpeg" (quality 90), "png" (no loss), or "raw" (no decoding); masks are always PNG.
    channels : int
        3, or 1 for grey.
    advance : callable
        Called after each image.

    Raises
    ------
    UsageError
        If the folder exists, or images cannot be read, or do not fit.
    StorageError
        If it cannot be written.
    """
    if out.exists():
        raise UsageError(f"{out}: exists already; give a folder that does not")
    beside = out.parent / f".{out.name}.part"  # a kill leaves this, the next try begins anew
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        _fill(beside, listing, side, encoding, channels, advance)
        beside.rename(out)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise StorageError(f"{out}: cannot be written: {one_line(error)}") from error
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _fill(
    out: Path,
    listing: Listing,
    side: int,
    encoding: str,
    channels: int,
    advance: Callable[[], None],
) -> None:
    """Write all files of a packed folder, meta.json last."""
    reader = Reader(listing, side, encoding, channels)
    levels = Levels(channels)
    for name, part in zip(folder.PARTS, (listing.train, listing.test), strict=True):
        masked = not isinstance(part.targets, np.ndarray)
        with ExitStack() as files:
            if encoding == "raw":
                path = out / folder.array(name, "images")
                images: Callable[[bytes], object] = files.enter_context(path.open("wb")).write
                images(_header((len(part), *reader.shape)))
            else:
                images = files.enter_context(_blob(out, name, "images"))
            masks = files.enter_context(_blob(out, name, "masks")) if masked else None
            for packed in reader.all_of(part):
                images(packed.content)
                if masks:
                    masks(packed.mask)
                if part is listing.train:
                    levels.add(packed.pixels)
                advance()
        for what, column in _columns(part).items():
            np.save(out / folder.array(name, what), column.astype(np.int64))
    meta = folder.Meta(
        name=listing.name,
        task=listing.task,
        classes=listing.classes,
        owners=listing.owners,
        domains=listing.domains,
        groups=listing.groups,
        ignore=listing.ignore,
        shape=reader.shape,
        encoding=encoding,
        mean=levels.mean,
        std=levels.std,
        files={path.name: folder.File.of(path) for path in sorted(out.iterdir())},
    )
    write_whole(out / folder.META, meta.model_dump_json(indent=1))


class Reader:
    """Brings images, and the masks that belong to them, to one size, and encodes them.

    Parameters
    ----------
    listing : Listing
        Whose images.
    side, encoding, channels
        As ``write`` has them.

    Attributes
    ----------
    shape : tuple of int
        (H, W, C) of every image.
    """

    def __init__(self, listing: Listing, side: int, encoding: str, channels: int) -> None:
        self.listing, self.side = listing, side
        self.encoding, self.channels = encoding, channels
        masked = not isinstance(listing.train.targets, np.ndarray)
        height = width = side
        if masked or not side:
            height, width = _size_of_first(listing, channels)
        if masked and side:
            height, width = (round(n * side / min(height, width)) for n in (height, width))
        self.shape = (height, width, channels)

    def all_of(self, part: Part) -> Iterator[Packed]:
        """Yield the images of a part in their order, made by a few threads."""
        if isinstance(part.targets, np.ndarray):
            return all_of(part.images, self._image, self.listing.name)
        pairs = list(zip(part.images, part.targets, strict=True))
        return all_of(pairs, self._pair, self.listing.name)

    def _image(self, picture: Picture) -> Packed:
        pixels = self._fitted(self.listing.image(picture, self.channels), name_of(picture))
        return Packed(pixels, encoded(pixels, self.encoding))

    def _pair(self, pair: tuple[Picture, str]) -> Packed:
        picture, path = pair
        whole, mask = self.listing.pair(pair, self.channels)
        pixels = self._fitted(whole, name_of(picture))
        fitted = self._fitted(mask[..., None], path, Image.Resampling.NEAREST)
        return Packed(pixels, encoded(pixels, self.encoding), encoded(fitted, "png"))

    def _fitted(
        self,
        pixels: NDArray[np.uint8],
        name: str,
        resampling: Image.Resampling = Image.Resampling.BILINEAR,
    ) -> NDArray[np.uint8]:
        """Return pixels (H, W, C) scaled to just cover the size of all, and the middle of them."""
        height, width = self.shape[:2]
        if pixels.shape[:2] == (height, width):
            return pixels
        if not self.side:
            sizes = " and ".join(f"{h} x {w}" for h, w in (pixels.shape[:2], (height, width)))
            raise PictureError(f"{name} (images of {sizes} pixels: give a --side)")
        high, wide = pixels.shape[:2]
        to, of = (height, high) if height * wide >= width * high else (width, wide)
        high, wide = max(height, int(to * high / of)), max(width, int(to * wide / of))
        image = as_image(pixels).resize((wide, high), resampling)
        top, left = round((high - height) / 2), round((wide - width) / 2)
        image = image.crop((left, top, left + width, top + height))
        return np.asarray(image).reshape(height, width, -1)


def _size_of_first(listing: Listing, channels: int) -> tuple[int, int]:
    """Return the height and width of the first image that can be read, if one can."""
    for picture in listing.train.images:
        with suppress(PictureError):  # it is named with the others, when all are read
            height, width, _ = listing.image(picture, channels).shape
            return height, width
    return 1, 1


def name_of(picture: Picture) -> str:
    """Return what messages call a picture."""
    return picture if isinstance(picture, str) else picture.name


def as_image(pixels: NDArray[np.uint8]) -> Image.Image:
    """Return an image of pixels (H, W, C) with C = 1 or 3."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def encoded(pixels: NDArray[np.uint8], encoding: str) -> bytes:
    """Return pixels (H, W, C) as a JPEG or PNG file, or as they are."""
    if encoding == "raw":
        return pixels.tobytes()
    file = BytesIO()
    options = {"quality": QUALITY} if encoding == "jpeg" else {}
    as_image(pixels).save(file, encoding, **options)
    return file.getvalue()


def _columns(part: Part) -> dict[str, NDArray[np.int64]]:
    """Return the arrays of a part by their names in the folder."""
    columns = {"owners": part.owners, "domains": part.domains, "groups": part.groups}
    if isinstance(part.targets, np.ndarray):
        columns["targets"] = part.targets
    else:
        nothing = np.zeros(len(part), np.int64)
        columns["classes"] = next(
            (c for c in (part.classes, part.domains) if c is not None), nothing
        )
    return {what: column for what, column in columns.items() if column is not None}


@contextmanager
def _blob(out: Path, part: str, what: str) -> Iterator[Callable[[bytes], None]]:
    """Yield what appends a file to a blob; at the end, write where each begins."""
    offsets = [0]
    with (out / folder.blob(part, what)).open("wb") as file:

        def append(content: bytes) -> None:
            file.write(content)
            offsets.append(offsets[-1] + len(content))

        yield append
    np.save(out / folder.index(part, what), np.array(offsets, np.int64))


def _header(shape: tuple[int, ...]) -> bytes:
    """Return what stands before the pixels in a .npy file."""
    file = BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    return file.getvalue()
