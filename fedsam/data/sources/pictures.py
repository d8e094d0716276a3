"""One picture: from a file of any kind to pixels of one kind."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedsam.base.errors import UsageError, one_line, some
from fedsam.base.system import cores

if TYPE_CHECKING:
    from PIL import Image

Item = TypeVar("Item")  # a picture, maybe with what belongs to it
Read = TypeVar("Read")  # what is made of it
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
ORIENTATION = 0x0112  # EXIF's tag, and how Pillow turns each of its values upright
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
SIXTEEN_BITS = 257  # 65535 / 255
AT_A_TIME = 256  # pictures that a pool is given, so that few wait decoded


@dataclass(frozen=True)
class Encoded:
    """A picture that lies in no file of its own.

    Attributes
    ----------
    name : str
        What messages call it.
    content : bytes
        A JPEG, PNG, ... as a file would hold it.
    """

    name: str
    content: bytes


Picture = str | Encoded  # a str is a path


class Levels:
    """How often each level of a byte occurs, by channel: mean and deviation follow exactly.

    Parameters
    ----------
    channels : int
        Of the pixels.
    """

    def __init__(self, channels: int) -> None:
        self.counts = np.zeros((channels, 256), np.int64)

    def add(self, pixels: NDArray[np.uint8]) -> None:
        """Count the levels of pixels (..., C)."""
        for channel, counts in enumerate(self.counts):
            counts += np.bincount(pixels[..., channel].ravel(), minlength=256)

    @property
    def mean(self) -> tuple[float, ...]:
        """Of each channel, in [0, 1]."""
        return tuple((self._shares @ np.linspace(0, 1, 256)).tolist())

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel, of pixel values in [0, 1]."""
        from_mean = np.linspace(0, 1, 256) - np.array(self.mean)[:, None]
        return tuple(np.sqrt((self._shares * from_mean**2).sum(1)).tolist())

    @property
    def _shares(self) -> NDArray[np.float64]:
        return self.counts / self.counts.sum(1, keepdims=True)


class PictureError(ValueError):
    """A picture that cannot be read, and why."""


def read(
    picture: Picture,
    side: int = 0,
    channels: int = 3,
    *,
    crop: bool = True,
    size: tuple[int, int] | None = None,
) -> NDArray:
    """Return a picture's pixels.

    It is turned upright as its EXIF says (torchvision's ImageFolder leaves it as it lies), and made
    RGB or grey as Pillow's ``convert`` does: what is transparent keeps its colour, CMYK and
    palettes become RGB. 16 bits are scaled to 8, not clipped. Of several frames the first is taken.

    Parameters
    ----------
    picture : str or Encoded
        A path, or the content of a file.
    side : int
        Pixels of the square that is made of it, bilinear with antialiasing; 0: as it is.
    channels : int
        3, or 1 for grey.
    crop : bool
        Scale the shorter side and cut the centre out, as torchvision's Resize and CenterCrop do;
        False: scale both sides, whatever becomes of the proportions.
    size : tuple of int, optional
        Height and width that it is pressed to before all of this, bicubic.

    Returns
    -------
    array
        uint8 (H, W, C).

    Raises
    ------
    PictureError
        If it is damaged, no picture, or of a kind whose white nobody knows.
    """
    image = _opened(picture, "RGB" if channels == 3 else "L")
    if size:
        image = _pressed(image, size, "BICUBIC")
    if side:
        image = _square(image, side) if crop else image.resize((side, side), _bilinear())
    return np.asarray(image).reshape(image.height, image.width, channels)


def read_mask(path: str, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """Return the bytes of a mask (H, W): grey levels, or a palette's numbers, as they are.

    Parameters
    ----------
    path : str
        The file.
    size : tuple of int, optional
        Height and width that it is pressed to; of each pixel the nearest is taken.

    Raises
    ------
    PictureError
        If it cannot be read, or holds colours.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            if (mode := image.mode) not in ("L", "P"):
                raise PictureError(f"must be grey of 8 bits, or have a palette; it is {mode}")
            return np.array(_pressed(image, size, "NEAREST") if size else image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        said = "no picture" if isinstance(error, Image.UnidentifiedImageError) else one_line(error)
        raise PictureError(f"{path} ({said})") from error


def _pressed(image: "Image.Image", size: tuple[int, int], between: str) -> "Image.Image":
    """Return a picture of another height and width, whatever becomes of its proportions."""
    from PIL import Image

    return image.resize((size[1], size[0]), Image.Resampling[between])


def all_of(pictures: Sequence[Item], read: Callable[[Item], Read], where: str) -> Iterator[Read]:
    """Yield what ``read`` makes of each picture, in their order; a few threads decode.

    Raises
    ------
    UsageError
        At the end, if some could not be read: the first five, why, and how many.
    """
    unreadable: list[str] = []

    def attempt(row: int) -> Read | PictureError:
        try:
            return read(pictures[row])
        except PictureError as error:
            return error

    with ThreadPoolExecutor(cores()) as pool:
        for start in range(0, len(pictures), AT_A_TIME):
            rows = range(start, min(start + AT_A_TIME, len(pictures)))
            for result in pool.map(attempt, rows):
                if isinstance(result, PictureError):
                    unreadable.append(str(result))
                else:
                    yield result
    if unreadable:
        raise UsageError(
            f"{where}: {len(unreadable)} of {len(pictures)} pictures cannot be read: "
            f"{some(unreadable)}"
        )


def _opened(picture: Picture, mode: str) -> "Image.Image":
    """Return a picture upright, "RGB" or "L", of 8 bits."""
    from PIL import Image

    name = picture if isinstance(picture, str) else picture.name
    try:
        with Image.open(picture if isinstance(picture, str) else BytesIO(picture.content)) as file:
            image = _of_8_bits(file, file.format or "").convert(mode)
            # not Pillow's exif_transpose, which writes the EXIF anew and fails where it is odd
            turn = TURNS.get(file.getexif().get(ORIENTATION, 1))
            return image if turn is None else image.transpose(Image.Transpose[turn])
    except PictureError as error:
        raise PictureError(f"{name} ({error})") from error
    # what Pillow's readers raise of damaged files
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        said = "no picture" if isinstance(error, Image.UnidentifiedImageError) else one_line(error)
        raise PictureError(f"{name} ({said})") from error


def _of_8_bits(image: "Image.Image", format: str) -> "Image.Image":
    """Return a picture whose numbers are bytes."""
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and format in ("PNG", "PPM")):
        numbers = np.asarray(image).astype(np.int64)
        return Image.fromarray(((numbers + SIXTEEN_BITS // 2) // SIXTEEN_BITS).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise PictureError("numbers of 32 bits, whose white no one knows: save it with 8 or 16")
    # Pillow warns of palettes with transparency unless their colours go through RGBA
    return image.convert("RGBA") if "transparency" in image.info else image


def _square(image: "Image.Image", side: int) -> "Image.Image":
    """Return the centre of a picture whose shorter side is scaled to ``side``."""
    width, height = image.size
    short = min(width, height)
    width, height = (side if n == short else int(side * n / short) for n in (width, height))
    left, top = round((width - side) / 2), round((height - side) / 2)
    scaled = image.resize((width, height), _bilinear())
    return scaled.crop((left, top, left + side, top + side))


def _bilinear() -> "Image.Resampling":
    from PIL import Image

    return Image.Resampling.BILINEAR
