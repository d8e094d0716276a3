"""BiSeNetV2: a wide, shallow branch for detail, a narrow, deep one for what it is."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DEEPEST = 32  # times that the deepest layer is smaller than the image


class BisenetV2(nn.Module):
    """BiSeNetV2 as FedDrive trains it: 8,196,416 parameters for 19 classes, 4,585,552 of them used.

    While training there are four more heads, on the semantic branch, and the output is
    (B, 5, classes, H, W); in eval mode it is the first head's, (B, classes, H, W). Images are
    padded on the right and below to sides divisible by 32, and logits cut to their size.

    Parameters
    ----------
    shape : tuple of int
        Channels, height and width of an image.
    classes : int
        Number of classes.
    heads : int
        Auxiliary heads, 4 as published, or 0.
    dropout : float
        In the heads.
    test_scale : float
        In eval mode the image is scaled by this first (bilinear, smoothed), and the logits back to
        its size: FedDrive tests on IDDA at 0.5.

    References
    ----------
    Yu et al., "BiSeNet V2: Bilateral Network with Guided Aggregation for Real-Time Semantic
    Segmentation", IJCV 2021. As in the public implementations, and not in the paper's figures, a
    ReLU stands after the depth-wise convolutions and after the aggregation; the heads end in a
    pixel shuffle, as in FedDrive's code (the paper's: bilinear).
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        heads: int = 4,
        dropout: float = 0.1,
        test_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0 < test_scale <= 1:
            raise ValueError(f"test_scale must lie in (0, 1], got {test_scale}")
        self.test_scale = test_scale
        if heads not in (0, 4):
            raise ValueError(f"heads must be 4 or 0, got {heads}")
        channels = shape[0]
        self.detail = nn.Sequential(
            _block(channels, 64, stride=2),
            _block(64, 64),
            _block(64, 64, stride=2),
            _block(64, 64),
            _block(64, 64),
            _block(64, 128, stride=2),
            _block(128, 128),
            _block(128, 128),
        )
        self.stem = _Stem(channels)
        self.stage3 = nn.Sequential(_GatherExpand(16, 32, stride=2), _GatherExpand(32, 32))
        self.stage4 = nn.Sequential(_GatherExpand(32, 64, stride=2), _GatherExpand(64, 64))
        self.stage5 = nn.Sequential(
            _GatherExpand(64, 128, stride=2), *(_GatherExpand(128, 128) for _ in range(3))
        )
        self.context = _ContextEmbedding()
        self.aggregation = _Aggregation()
        self.head = _head(128, 1024, classes, 8, dropout)
        self.auxiliary = nn.ModuleList(
            _head(width, 128, classes, factor, dropout)
            for width, factor in ((16, 4), (32, 8), (64, 16), (128, 32))[:heads]
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of images (B, C, H, W)."""
        if self.training or self.test_scale == 1:
            return self._logits(images)
        smaller = F.interpolate(
            images, scale_factor=self.test_scale, mode="bilinear", antialias=True
        )
        return F.interpolate(
            self._logits(smaller), images.shape[-2:], mode="bilinear", align_corners=True
        )

    def _logits(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        padded = F.pad(images, (0, -width % DEEPEST, 0, -height % DEEPEST))
        stages = [self.stem(padded)]
        for stage in (self.stage3, self.stage4, self.stage5):
            stages.append(stage(stages[-1]))
        joined = self.aggregation(self.detail(padded), self.context(stages[-1]))
        logits = self.head(joined)[..., :height, :width]
        if not self.training or not len(self.auxiliary):
            return logits
        more = [head(x) for head, x in zip(self.auxiliary, stages, strict=True)]
        return torch.stack([logits, *(one[..., :height, :width] for one in more)], 1)


def _norm(into: int, out: int, side: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Return a convolution and its BatchNorm."""
    convolution = nn.Conv2d(into, out, side, stride, side // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(out)]


def _block(into: int, out: int, side: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(*_norm(into, out, side, stride), nn.ReLU())


def _head(into: int, width: int, classes: int, factor: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        _block(into, width),
        nn.Dropout(dropout),
        nn.Conv2d(width, classes * factor**2, 1),
        nn.PixelShuffle(factor),
    )


class _Stem(nn.Module):
    """A quarter of the size in two ways, by convolutions and by pooling, joined."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _block(channels, 16, stride=2)
        self.convolutions = nn.Sequential(_block(16, 8, side=1), _block(8, 16, stride=2))
        self.join = _block(32, 16)

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, 16, H / 4, W / 4)."""
        x = self.first(images)
        pooled = F.max_pool2d(x, 3, stride=2, padding=1)
        return self.join(torch.cat([self.convolutions(x), pooled], 1))


class _GatherExpand(nn.Module):
    """Gather with a 3 x 3 convolution, expand by depth-wise ones, project back; a residual.

    Parameters
    ----------
    into, out : int
        Channels before and after.
    stride : int
        1 (the same channels before and after) or 2.
    """

    def __init__(self, into: int, out: int, stride: int = 1, expansion: int = 6) -> None:
        super().__init__()
        wide = expansion * into
        depthwise = _norm(into, wide, 3, stride, into)
        if stride == 2:
            depthwise += _norm(wide, wide, 3, 1, wide)
        self.residual = nn.Sequential(
            _block(into, into), *depthwise, nn.ReLU(), *_norm(wide, out, 1)
        )
        shortcut = [*_norm(into, into, 3, stride, into), *_norm(into, out, 1)]
        self.shortcut = nn.Sequential(*shortcut) if stride == 2 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, out, H / stride, W / stride)."""
        return torch.relu(self.shortcut(x) + self.residual(x))


class _ContextEmbedding(nn.Module):
    """What the whole image is about, added to every place of it."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.project = _block(width, width, side=1)
        self.last = _block(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, width, H, W)."""
        whole = self.project(self.norm(x.mean((2, 3), keepdim=True)))
        return self.last(x + whole)


class _Aggregation(nn.Module):
    """Each branch guides the other at its own resolution, then they are added."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.detail = nn.Sequential(
            *_norm(width, width, 3, groups=width), nn.Conv2d(width, width, 1, bias=False)
        )
        self.detail_down = nn.Sequential(
            *_norm(width, width, 3, 2), nn.AvgPool2d(3, stride=2, padding=1)
        )
        self.semantic_up = nn.Sequential(*_norm(width, width, 3))
        self.semantic = nn.Sequential(
            *_norm(width, width, 3, groups=width), nn.Conv2d(width, width, 1, bias=False)
        )
        self.join = _block(width, width)

    def forward(self, detail: Tensor, semantic: Tensor) -> Tensor:
        """Return (B, width, H / 8, W / 8) from the detail's (H / 8) and the semantic (H / 32)."""
        size = detail.shape[-2:]
        gate = torch.sigmoid(_to(self.semantic_up(semantic), size))
        fine = self.detail(detail) * gate
        coarse = self.detail_down(detail) * torch.sigmoid(self.semantic(semantic))
        return self.join(fine + _to(coarse, size))


def _to(x: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False)
