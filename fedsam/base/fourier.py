"""A convolution by the discrete Fourier transform: the same sums, as fewer and larger products."""

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

DTYPES = {torch.float32: np.float32, torch.float64: np.float64}
WORTH = 0.75  # of the direct sum's products: with more, what surrounds the products costs the gain


class Transforms(NamedTuple):
    """The real matrices of a convolution's transform, with F frequencies.

    Attributes
    ----------
    images : Tensor
        (2F, H W), of images: each frequency's real part, then its imaginary one.
    kernels : tuple of Tensor
        (2F, h w) each, of kernels: what the two parts of an image's frequency are multiplied with,
        for the real part of the product and for its imaginary one.
    outputs : tuple of Tensor
        (H' W', F) each, from the two parts of the products to the sums.
    """

    images: Tensor
    kernels: tuple[Tensor, Tensor]
    outputs: tuple[Tensor, Tensor]


def frequencies(height: int, width: int) -> list[tuple[int, int]]:
    """Return one of each pair of conjugate frequencies of real images (height, width)."""
    every = [(a, b) for a in range(height) for b in range(width)]
    return [(a, b) for a, b in every if (a, b) <= (-a % height, -b % width)]


@cache
def transforms(height: int, width: int, kernel: tuple[int, int], dtype: torch.dtype) -> Transforms:
    """Return the matrices of a convolution without padding of images (height, width)."""
    chosen = frequencies(height, width)
    rows, columns = np.array(chosen, dtype=np.float64).T[..., None, None]

    def phases(sides: tuple[int, int]) -> NDArray[np.float64]:
        down, right = np.ogrid[: sides[0], : sides[1]]
        turns = rows * down / height + columns * right / width
        return 2 * math.pi * turns.reshape(len(chosen), -1)

    def matrix(*parts: NDArray[np.float64]) -> Tensor:
        """Return the parts' rows in turn: both of the first, both of the second, ..."""
        stacked = np.stack(parts, 1).reshape(-1, parts[0].shape[1])
        # it is kept, for those who train as well and not only those who trace a step
        with torch.inference_mode(False), _disable_current_modes():
            return torch.from_numpy(stacked.astype(DTYPES[dtype]))

    of_image, of_kernel = phases((height, width)), phases(kernel)
    of_output = phases((height - kernel[0] + 1, width - kernel[1] + 1))
    # all but those that are their own conjugates stand for two
    alone = np.array([(a, b) == (-a % height, -b % width) for a, b in chosen])
    share = np.where(alone, 1.0, 2.0)[:, None] / (height * width)
    cosine, sine = np.cos(of_kernel), np.sin(of_kernel)
    return Transforms(
        matrix(np.cos(of_image), -np.sin(of_image)),
        (matrix(cosine, -sine), matrix(sine, cosine)),
        (matrix((share * np.cos(of_output)).T), matrix((-share * np.sin(of_output)).T)),
    )


def work(
    images: tuple[int, int, int], kernel: tuple[int, int], channels: int, outputs: int
) -> tuple[int, int]:
    """Return the products of numbers of a forward pass: by Fourier's transform, and directly.

    Parameters
    ----------
    images : tuple of int
        How many, their height and their width.
    kernel : tuple of int
        Its height and width.
    channels, outputs : int
        Before and after.
    """
    many, height, width = images
    sums = (height - kernel[0] + 1) * (width - kernel[1] + 1)
    parts = 2 * len(frequencies(height, width))
    once = 2 * parts * math.prod(kernel) * channels * outputs
    each = parts * (height * width * channels + sums * outputs + 2 * channels * outputs)
    return once + many * each, many * sums * math.prod(kernel) * channels * outputs


@cache
def worthwhile(
    images: tuple[int, int, int], kernel: tuple[int, int], channels: int, outputs: int
) -> bool:
    """Return whether Fourier's transform is the faster way: a rule of shapes alone.

    So that every machine, engine and number of threads chooses alike.
    """
    by_fourier, direct = work(images, kernel, channels, outputs)
    return by_fourier <= WORTH * direct


def convolved(images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the convolution without padding of images (B, C, H, W), in channels-last.

    On circles of H and W pixels, what lies inside is not touched by what wraps around; there the
    transform turns sums over pixels into one product of matrices a frequency. Transforms are
    products of matrices, too: no step is anything else, so it can be differentiated again.

    Parameters
    ----------
    images : Tensor
        (B, C, H, W), float32 or float64.
    weight : Tensor
        (O, C, h, w).
    bias : Tensor or None
        (O,).

    Returns
    -------
    Tensor
        (B, O, H - h + 1, W - w + 1).

    References
    ----------
    Mathieu, Henaff and LeCun, Fast training of convolutional networks through FFTs (ICLR 2014),
    arXiv 1312.5851.
    """
    (many, channels, height, width), (outputs, _, *sides) = images.shape, weight.shape
    kernel = (sides[0], sides[1])
    of = transforms(height, width, kernel, images.dtype)
    down, right = height - kernel[0] + 1, width - kernel[1] + 1
    pixels = images.permute(0, 2, 3, 1).reshape(many, height * width, channels)
    parts = torch.bmm(of.images.expand(many, -1, -1), pixels)
    parts = parts.view(many, -1, 2 * channels).transpose(0, 1)  # (F, B, 2C)
    taps = weight.permute(2, 3, 1, 0).reshape(-1, channels * outputs)
    real, imaginary = (
        torch.bmm(parts, (of_kernel @ taps).view(-1, 2 * channels, outputs)).transpose(0, 1)
        for of_kernel in of.kernels
    )
    from_real, from_imaginary = (matrix.expand(many, -1, -1) for matrix in of.outputs)
    sums = torch.baddbmm(torch.bmm(from_real, real), from_imaginary, imaginary)
    if bias is not None:
        sums = sums + bias
    return sums.view(many, down, right, outputs).permute(0, 3, 1, 2)


class FourierConv2d(nn.Conv2d):
    """``nn.Conv2d`` without padding, which takes the way of fewer products on a CPU.

    Parameters, initial values and results are those of ``nn.Conv2d``, but for rounding. On a GPU,
    where its library chooses among such ways, and in another precision it is that.

    Parameters
    ----------
    channels, outputs : int
        Before and after.
    side : int
        Of the kernel.
    """

    def __init__(self, channels: int, outputs: int, side: int) -> None:
        super().__init__(channels, outputs, side)

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, outputs, H', W') from (B, channels, H, W)."""
        weight, bias = self.weight, self.bias
        if images.device.type == "cpu" and images.dim() == 4 and images.dtype in DTYPES:
            many, channels, height, width = images.shape
            kernel = (weight.shape[2], weight.shape[3])
            exact = images.dtype == weight.dtype and not torch.is_autocast_enabled("cpu")
            fits = height >= kernel[0] and width >= kernel[1]
            shape = (many, height, width)
            if exact and fits and worthwhile(shape, kernel, channels, weight.shape[0]):
                return convolved(images, weight, bias)
        return F.conv2d(images, weight, bias)
