"""Small convolutions as matrix products, for the compiled step.

What a kernel sees of each place is copied into the row of a matrix, which is then multiplied by
the kernels::

    out = rows(x) W^T        dW = g^T rows(x)        dx = the sum of (g W) at each pixel

Kernels lie in w as (out, height, width, in), so that W is w as it is. On images of a few pixels
this takes a third of the time of a library's convolution, which orders its inputs first; on large
ones the rows do not stay in the cache.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

MOST = 1 << 20  # numbers of all rows: 4 MB in float32


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Any:
    """Return ``aten.convolution`` of small images; NotImplemented of others."""
    if not _is_small(x, weight, stride, padding, dilation, transposed, groups):
        return NotImplemented
    seen = _windows(x, weight, padding)
    shape = seen.shape[:3]
    out = _rows(seen) @ _kernels(weight).t()
    out = out if bias is None else out + bias
    return out.view(*shape, -1).permute(0, 3, 1, 2)


def convolution_backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> Any:
    """Return ``aten.convolution_backward`` of small images; NotImplemented of others."""
    if not _is_small(x, weight, stride, padding, dilation, transposed, groups):
        return NotImplemented
    seen = _windows(x, weight, padding)
    out, into, height, width = weight.shape
    flat = g.permute(0, 2, 3, 1).reshape(-1, out)
    of_x = of_weight = None
    if wanted[0]:
        of_x = _gathered((flat @ _kernels(weight)).view(seen.shape), x, padding)
    if wanted[1]:
        of_weight = (flat.t() @ _rows(seen)).view(out, height, width, into).permute(0, 3, 1, 2)
    return of_x, of_weight, flat.sum(0) if wanted[2] else None


def _is_small(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    groups: int,
) -> bool:
    if x.dim() != 4 or transposed or groups != 1 or {*stride, *dilation} != {1}:
        return False
    places = 1
    for side, kernel, pad in zip(x.shape[2:], weight.shape[2:], padding, strict=True):
        places *= side + 2 * pad - kernel + 1
    return len(x) * places * weight[0].numel() <= MOST


def _windows(x: Tensor, weight: Tensor, padding: Sequence[int]) -> Tensor:
    """Return what the kernel sees of x (B, C, H, W) at each place: (B, places, kernel, C)."""
    padded = F.pad(x, [padding[1]] * 2 + [padding[0]] * 2) if any(padding) else x
    height, width = weight.shape[2:]
    return padded.unfold(2, height, 1).unfold(3, width, 1).permute(0, 2, 3, 4, 5, 1)


def _rows(seen: Tensor) -> Tensor:
    """Return a row a place."""
    return seen.flatten(3).flatten(0, 2)


def _kernels(weight: Tensor) -> Tensor:
    """Return a row a kernel, in the order in which they lie in w."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _gathered(seen: Tensor, x: Tensor, padding: Sequence[int]) -> Tensor:
    """Return the sum over all windows that a pixel of x is in, (B, C, H, W)."""
    down, along = padding
    height, width = x.shape[2] + 2 * down, x.shape[3] + 2 * along
    rows, columns = seen.shape[1:3]
    total: Tensor | None = None
    for i in range(seen.shape[3]):
        for j in range(seen.shape[4]):
            beside = [0, 0, j, width - columns - j, i, height - rows - i]
            part = F.pad(seen[:, :, :, i, j], beside)
            total = part if total is None else total + part
    assert total is not None
    return total[:, down : height - down, along : width - along].permute(0, 3, 1, 2)


TABLE: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.convolution.default: convolution,
    torch.ops.aten.convolution_backward.default: convolution_backward,
}
