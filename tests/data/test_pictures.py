"""One picture of each kind that people have, made with Pillow, and what is none."""

import struct
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from fedsam.base.errors import UsageError
from fedsam.data.sources.pictures import (
    Encoded,
    Levels,
    PictureError,
    all_of,
    read,
)

NOISE = np.random.default_rng(0).integers(0, 256, (23, 31, 3), dtype=np.uint8)
SMOOTH = np.stack(np.broadcast_arrays(np.arange(40)[:, None] * 5, np.arange(30) * 8, 90), -1)
SMOOTH = SMOOTH.astype(np.uint8)


def encoded(image, kind="PNG", **options):
    file = BytesIO()
    image.save(file, kind, **options)
    return Encoded(f"a.{kind.lower()}", file.getvalue())


def test_rgb_comes_as_it_is_from_a_path_and_from_bytes(tmp_path):
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    assert np.array_equal(read(str(tmp_path / "a.png")), NOISE)
    for kind in ("PNG", "BMP", "PPM", "TIFF"):
        assert np.array_equal(read(encoded(Image.fromarray(NOISE), kind)), NOISE)
    assert np.array_equal(read(encoded(Image.fromarray(NOISE), "WEBP", lossless=True)), NOISE)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 50))
def test_a_square_is_what_torchvision_makes(height, width, side):
    image = Image.fromarray(np.resize(NOISE, (height, width, 3)))
    both = transforms.Compose([transforms.Resize(side), transforms.CenterCrop(side)])
    assert np.array_equal(read(encoded(image), side), np.asarray(both(image)))
    pressed = transforms.Resize((side, side))(image)
    assert np.array_equal(read(encoded(image), side, crop=False), np.asarray(pressed))
    grey = both(image.convert("L"))
    assert np.array_equal(read(encoded(image), side, 1)[..., 0], np.asarray(grey))


def test_grey_palette_and_two_colours():
    grey = NOISE[..., 0]
    assert np.array_equal(read(encoded(Image.fromarray(grey))), np.stack([grey] * 3, -1))
    assert np.array_equal(read(encoded(Image.fromarray(grey)), channels=1)[..., 0], grey)
    two = Image.fromarray(grey > 127)
    assert np.array_equal(read(encoded(two), channels=1)[..., 0], 255 * (grey > 127))
    few = Image.fromarray(NOISE).quantize(17)
    assert np.array_equal(read(encoded(few, "GIF")), np.asarray(few.convert("RGB")))


def test_what_is_transparent_keeps_its_colour(recwarn):
    clear = Image.fromarray(np.dstack([NOISE, np.zeros((23, 31), np.uint8)]))
    assert np.array_equal(read(encoded(clear)), NOISE)
    palette = Image.fromarray(NOISE).quantize(17)
    see_through = encoded(palette, transparency=bytes(range(17)))
    assert np.array_equal(read(see_through), np.asarray(palette.convert("RGB")))
    two = Image.merge("LA", [Image.fromarray(NOISE[..., 0]), Image.fromarray(NOISE[..., 1])])
    assert np.array_equal(read(encoded(two), channels=1)[..., 0], NOISE[..., 0])
    assert not recwarn.list


def test_the_inks_of_a_cmyk_jpeg_become_colours():
    """Far from the negative that a reader without Adobe's marker would see."""
    print_ = Image.fromarray(SMOOTH).convert("CMYK")
    pixels = read(encoded(print_, "JPEG", quality=95)).astype(int)
    assert np.abs(pixels - SMOOTH).mean() < 4
    assert np.abs(pixels - (255 - SMOOTH.astype(int))).mean() > 40


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled_not_clipped(kind):
    wide = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    image = Image.fromarray(wide)
    pixels = read(encoded(image, kind), channels=1)[..., 0]
    assert np.array_equal(pixels.ravel(), np.arange(256))
    colours = read(encoded(image, kind))
    assert np.array_equal(colours, np.stack([pixels] * 3, -1))


def test_32_bits_are_refused():
    for numbers in (np.ones((2, 2), np.float32), np.ones((2, 2), np.int32)):
        with pytest.raises(PictureError, match=r"^a\.tiff \(numbers of 32 bits, whose white no"):
            read(encoded(Image.fromarray(numbers), "TIFF"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_upright(orientation):
    turned = {
        1: SMOOTH, 2: SMOOTH[:, ::-1], 3: SMOOTH[::-1, ::-1], 4: SMOOTH[::-1],
        5: SMOOTH.swapaxes(0, 1), 6: np.rot90(SMOOTH, -1),
        7: SMOOTH.swapaxes(0, 1)[::-1, ::-1], 8: np.rot90(SMOOTH),
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(read(encoded(Image.fromarray(SMOOTH), exif=exif)), turned[orientation])


def test_odd_exif_spoils_no_picture():
    """RowsPerStrip, a number, as a text: what is read of the EXIF is its orientation alone."""
    entries = struct.pack(">HHIIHHIHH", 0x0116, 2, 21, 38, 0x0112, 3, 1, 6, 0)
    tiff = b"MM\0*" + struct.pack(">IH", 8, 2) + entries + bytes(4) + b"x" * 20 + b"\0"
    odd = encoded(Image.fromarray(SMOOTH), "JPEG", exif=b"Exif\0\0" + tiff)
    flat = read(encoded(Image.fromarray(SMOOTH), "JPEG"))
    assert np.array_equal(read(odd), np.rot90(flat, -1))


def test_of_several_frames_the_first(tmp_path):
    frames = [Image.fromarray(NOISE[..., c]) for c in range(3)]
    moving = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.array_equal(read(moving, channels=1)[..., 0], NOISE[..., 0])


def png_of(width, height):
    """A PNG whose header promises more pixels than there are bytes."""
    whole = encoded(Image.new("L", (1, 1))).content
    import zlib

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    return whole[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + whole[33:]


DAMAGED = {
    "empty": (b"", "no picture"),
    "text": (b"hello", "no picture"),
    "cut jpeg": (encoded(Image.fromarray(SMOOTH), "JPEG").content[:-40], "truncated"),
    "cut png": (encoded(Image.fromarray(NOISE)).content[:900], "truncated"),
    "cut gif": (encoded(Image.fromarray(NOISE), "GIF").content[:900], "truncated"),
    "header alone": (encoded(Image.fromarray(NOISE)).content[:20], "no picture|Truncated"),
    "bomb": (png_of(60_000, 60_000), "exceeds limit"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_damaged_is_named_with_the_reason(name):
    content, said = DAMAGED[name]
    with pytest.raises(PictureError, match=rf"^x/1\.jpg \(.*({said})") as caught:
        read(Encoded("x/1.jpg", content))
    assert "\n" not in str(caught.value)
    with pytest.raises(PictureError, match=r"^nowhere\.png \(.*No such file"):
        read("nowhere.png")


KINDS = [
    encoded(Image.fromarray(NOISE), "PNG").content,
    encoded(Image.fromarray(NOISE), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0").content,
    encoded(Image.fromarray(NOISE).quantize(9), "GIF").content,
    encoded(Image.fromarray(NOISE), "TIFF", compression="tiff_lzw").content,
    encoded(Image.fromarray(NOISE), "BMP").content,
    encoded(Image.fromarray(NOISE), "WEBP").content,
    encoded(Image.fromarray(NOISE), "PPM").content,
]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(KINDS), st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=4))))
def test_damaged_bytes_are_pixels_or_one_error(content, changes):
    damaged = bytearray(content)
    for at, new in changes:
        damaged[at : at + len(new)] = new
    try:
        pixels = read(Encoded("a", bytes(damaged)), 8)
    except PictureError:
        return
    assert pixels.shape == (8, 8, 3)


def test_pictures_come_in_order_and_all_damaged_are_counted():
    pictures = [encoded(Image.new("L", (1, 1), n % 256)) for n in range(600)]
    reds = [int(pixels[0, 0, 0]) for pixels in all_of(pictures, read, "here")]
    assert reds == [n % 256 for n in range(600)]
    for n in range(0, 600, 50):
        pictures[n] = Encoded(f"{n}.png", b"")
    seen = []
    with pytest.raises(UsageError) as caught:
        seen.extend(int(pixels[0, 0, 0]) for pixels in all_of(pictures, read, "here"))
    assert seen == [n % 256 for n in range(600) if n % 50]
    names = ", ".join(f"{n}.png (no picture)" for n in range(0, 250, 50))
    said = f"here: 12 of 600 pictures cannot be read: {names} and 7 more"
    assert str(caught.value) == said


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_mean_and_deviation_are_those_of_all_pixels(pictures, channels, seed):
    pixels = np.random.default_rng(seed).integers(
        0, 256, (pictures, 3, 4, channels), dtype=np.uint8
    )
    levels = Levels(channels)
    for picture in pixels:
        levels.add(picture)
    of_channel = pixels.reshape(-1, channels) / 255
    assert levels.mean == pytest.approx(of_channel.mean(0), abs=1e-12)
    assert levels.std == pytest.approx(of_channel.std(0), abs=1e-12)
