"""Corruptions of 32 x 32 images made here, with the parameters that CIFAR-10-C was made with.

Definitions and parameters: Hendrycks and Dietterich (ICLR 2019, arXiv 1903.12261) and their script
hendrycks/robustness, ImageNet-C/create_c/make_cifar_c.py, as of commit ca36008. The packages that
hold them (imagecorruptions, imagecorruptions-imaug) have ImageNet-C's parameters, which are others.
Not made: motion_blur and snow (ImageMagick's motion blur), frost (photographs), spatter (OpenCV's
edges and distances).

What differs from the published files: the random numbers; zoom_blur by one grey level in one value
of ten thousand; elastic_transform interpolates exactly, where OpenCV does in 32nds of a pixel;
JPEG is that of the installed Pillow. Compared with the script's own functions: blurs and HSV are
the same, defocus_blur differs by one grey level in at most 4.2 % of the values, elastic_transform
by one in single values, from the same random numbers.
"""

import math
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

SOURCE = "hendrycks/robustness, ImageNet-C/create_c/make_cifar_c.py, commit ca36008"
SIDE = 32

Pixels = NDArray[np.uint8]  # (N, 32, 32, 3)
Floats = NDArray[np.floating[Any]]  # the same, in [0, 1] but for what is clipped
Rng = np.random.Generator


def corrupt(name: str, pixels: Pixels, severity: int, rng: Rng) -> Pixels:
    """Return the images (N, 32, 32, 3) with the corruption at severity 1 to 5.

    Floats become integers by cutting off, as in the published script.
    """
    function, parameters = MADE[name]
    result = function(pixels, parameters[severity - 1], rng)
    if result.dtype == np.uint8:
        return result
    return (np.clip(result, 0, 1) * 255).astype(np.uint8)


def gaussian_noise(pixels: Pixels, scale: float, rng: Rng) -> Floats:
    """Return x + N(0, scale^2)."""
    return pixels / 255 + rng.normal(scale=scale, size=pixels.shape)


def shot_noise(pixels: Pixels, photons: float, rng: Rng) -> Floats:
    """Return Poisson(x * photons) / photons."""
    return rng.poisson(pixels / 255 * photons) / photons


def impulse_noise(pixels: Pixels, amount: float, rng: Rng) -> Floats:
    """Set each value, with probability ``amount``, to 0 or 1, as likely."""
    hit = rng.random(pixels.shape) <= amount
    return np.where(hit, rng.random(pixels.shape) <= 0.5, pixels / 255)


def speckle_noise(pixels: Pixels, scale: float, rng: Rng) -> Floats:
    """Return x + x N(0, scale^2)."""
    x = pixels / 255
    return x + x * rng.normal(scale=scale, size=x.shape)


def gaussian_blur(pixels: Pixels, sigma: float, rng: Rng) -> Floats:
    """Blur by a Gaussian of ``sigma`` pixels, cut off at 4 sigma, the border repeated."""
    return _blurred(pixels / 255, sigma)


def glass_blur(pixels: Pixels, parameters: tuple[float, int, int], rng: Rng) -> Floats:
    """Blur, let pixels take a neighbour's value from bottom right to top left, blur.

    Said to swap the two, the published script copies: both sides of its exchange are views.
    """
    sigma, reach, times = parameters
    x = (_blurred(pixels / 255, sigma) * 255).astype(np.uint8)
    every = np.arange(len(x))
    places = range(SIDE - reach, reach, -1)
    for row, column in [(row, column) for _ in range(times) for row in places for column in places]:
        right, down = rng.integers(-reach, reach, size=(2, len(x)))  # `reach` itself is left out
        x[:, row, column] = x[every, row + down, column + right]
    return _blurred(x / 255, sigma)


def defocus_blur(pixels: Pixels, parameters: tuple[float, float], rng: Rng) -> Floats:
    """Average over a disk of a radius with a softened edge; the border is mirrored."""
    from scipy.ndimage import correlate

    kernel = disk(*parameters)
    return correlate(pixels / 255, kernel[None, :, :, None], mode="mirror")


def disk(radius: float, soft: float) -> NDArray[np.float64]:
    """Return a disk of sum 1, blurred by a 3 x 3 Gaussian of deviation ``soft``, (n, n)."""
    from scipy.ndimage import correlate

    reach = math.floor(radius) + 1  # one more than the disk's own, for the blur
    along = np.arange(-reach, reach + 1)
    inside = (along[:, None] ** 2 + along**2 <= radius**2).astype(np.float64)
    bell = np.exp(-np.square([-1.0, 0.0, 1.0]) / (2 * soft**2))
    bell /= bell.sum()
    return correlate(inside / inside.sum(), np.outer(bell, bell), mode="constant")


def zoom_blur(pixels: Pixels, largest: float, rng: Rng) -> Floats:
    """Average the image and its zooms by 1, 1.01, ... up to a factor.

    Not including it, but where rounding does, in the published script as well: at 1.06 and 1.11.
    """
    x = pixels / np.float32(255)
    factors = np.arange(1, largest, 0.01)
    total = x.copy()
    for factor in factors:
        zoom = _zoom(factor)
        tall = (zoom @ x.reshape(len(x), SIDE, -1)).reshape(x.shape)
        total += zoom @ tall  # (columns, channels) are the last two
    return total / np.float32(len(factors) + 1)


def fog(pixels: Pixels, parameters: tuple[float, float], rng: Rng) -> Floats:
    """Add a plasma fractal, and scale back to the image's own maximum."""
    amount, decay = parameters
    x = pixels / 255
    brightest = x.max((1, 2, 3), keepdims=True)
    x = x + amount * plasma(len(x), decay, rng)[..., None]
    return x * brightest / (brightest + amount)


def plasma(count: int, decay: float, rng: Rng) -> NDArray[np.float64]:
    """Return fractals by diamonds and squares on a torus, scaled to [0, 1], (count, 32, 32)."""
    height = np.zeros((count, SIDE, SIDE))
    step, wobble = SIDE, 100.0
    while step > 1:
        half = step // 2

        def mean(four: NDArray[np.float64], wobble: float = wobble) -> NDArray[np.float64]:
            return four / 4 + wobble * rng.uniform(-wobble, wobble, four.shape)

        corners = height[:, ::step, ::step]
        below = corners + np.roll(corners, -1, 1)
        beside = corners + np.roll(corners, -1, 2)
        centres = mean(below + np.roll(below, -1, 2))
        height[:, half::step, half::step] = centres
        height[:, ::step, half::step] = mean(beside + centres + np.roll(centres, 1, 1))
        height[:, half::step, ::step] = mean(below + centres + np.roll(centres, 1, 2))
        step, wobble = half, wobble / decay
    height -= height.min((1, 2), keepdims=True)
    return height / height.max((1, 2), keepdims=True)


def contrast(pixels: Pixels, factor: float, rng: Rng) -> Floats:
    """Shrink the distance to each channel's mean."""
    x = pixels / 255
    means = x.mean((1, 2), keepdims=True)
    return (x - means) * factor + means


def brightness(pixels: Pixels, more: float, rng: Rng) -> Floats:
    """Add to the value of HSV."""
    return _in_hsv(pixels, 2, lambda value: value + more)


def saturate(pixels: Pixels, parameters: tuple[float, float], rng: Rng) -> Floats:
    """Multiply the saturation of HSV, and add to it."""
    factor, more = parameters
    return _in_hsv(pixels, 1, lambda saturation: saturation * factor + more)


def jpeg_compression(pixels: Pixels, quality: int, rng: Rng) -> Pixels:
    """Compress as JPEG of a quality in percent, and read it."""
    from PIL import Image

    def through(image: Pixels) -> Pixels:
        file = BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        return np.asarray(Image.open(file))

    return np.stack([through(image) for image in pixels])


def pixelate(pixels: Pixels, share: float, rng: Rng) -> Pixels:
    """Shrink to a share of the side and enlarge again, by box filters."""
    from PIL import Image

    small = (int(SIDE * share),) * 2
    box = Image.Resampling.BOX

    def through(image: Pixels) -> Pixels:
        return np.asarray(Image.fromarray(image).resize(small, box).resize((SIDE, SIDE), box))

    return np.stack([through(image) for image in pixels])


def elastic_transform(pixels: Pixels, parameters: tuple[float, float, float], rng: Rng) -> Floats:
    """Move three points of the image at random, then every pixel by a smooth field.

    ``parameters`` are in image sides: how far the field reaches, how smooth it is, how far the
    points go.
    """
    from scipy.ndimage import gaussian_filter

    strength, smooth, affine = (SIDE * value for value in parameters)
    x = pixels / np.float32(255)
    points = np.array([[26.0, 26.0], [26.0, 6.0], [6.0, 6.0]])  # (x, y), 10 from the middle
    moved = points + rng.uniform(-affine, affine, size=(len(x), 3, 2))
    # source = [moved_x, moved_y, 1] @ back, for a point and so for all
    homogeneous = np.concatenate([moved, np.ones((len(x), 3, 1))], 2)
    back = np.linalg.solve(homogeneous, np.broadcast_to(points, moved.shape))
    rows, columns = np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij")
    grid = np.stack([columns, rows, np.ones_like(rows)], -1)
    source = np.einsum("hwi,nij->njhw", grid, back)
    turned = _sampled(x, source[:, 1], source[:, 0], "mirror")
    fields = rng.uniform(-1, 1, size=(2, len(x), SIDE, SIDE))
    sigmas = (0, 0, smooth, smooth)
    down, right = strength * gaussian_filter(fields, sigmas, mode="reflect", truncate=3)
    return _sampled(turned, rows + down, columns + right, "reflect")


def _sampled(x: Floats, rows: Floats, columns: Floats, border: str) -> Floats:
    """Return each image's values at places (N, H, W) of it, bilinear."""
    from scipy.ndimage import map_coordinates

    every = np.broadcast_to(np.arange(len(x))[:, None, None], rows.shape)
    places = np.stack([every, rows, columns])
    channels = [map_coordinates(x[..., c], places, order=1, mode=border) for c in range(3)]
    return np.stack(channels, -1)


def _blurred(x: Floats, sigma: float) -> Floats:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(x, (0, sigma, sigma, 0), mode="nearest", truncate=4)


def _zoom(factor: float) -> NDArray[np.float32]:
    """Return the matrix (32, 32) that zooms into the middle along one side, linearly."""
    from scipy.ndimage import zoom

    cropped = math.ceil(SIDE / factor)
    top = (SIDE - cropped) // 2
    larger = zoom(np.eye(cropped), (factor, 1), order=1)
    trimmed = (len(larger) - SIDE) // 2
    matrix = np.zeros((SIDE, SIDE), np.float32)
    matrix[:, top : top + cropped] = larger[trimmed : trimmed + SIDE]
    return matrix


def _in_hsv(pixels: Pixels, channel: int, change: Callable[[Floats], Floats]) -> Floats:
    from matplotlib.colors import hsv_to_rgb, rgb_to_hsv

    hsv = rgb_to_hsv(pixels / 255)
    hsv[..., channel] = np.clip(change(hsv[..., channel]), 0, 1)
    return hsv_to_rgb(hsv)


# a parameter for each severity
MADE: dict[str, tuple[Callable[[Pixels, Any, Rng], NDArray[Any]], Sequence[Any]]] = {
    "gaussian_noise": (gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": (defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "glass_blur": (
        glass_blur,
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    ),
    "zoom_blur": (zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26)),
    "fog": (fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": (brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": (
        elastic_transform,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
    "pixelate": (pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": (jpeg_compression, (80, 65, 58, 50, 40)),
    "speckle_noise": (speckle_noise, (0.06, 0.1, 0.12, 0.16, 0.2)),
    "gaussian_blur": (gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1)),
    "saturate": (saturate, ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))),
}
