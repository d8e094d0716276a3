"""A small vision transformer (Dosovitskiy et al., ICLR 2021): torchvision's."""

from typing import Any

from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer


class ViT(nn.Module):
    """Patches of 4 x 4 pixels, and of ViT-Ti (Touvron et al., ICML 2021) the width and the heads.

    Half as deep: 6 layers, 192 wide, 3 heads, 768 hidden units; LayerNorm, no dropout. 2,693,578
    parameters for 10 classes of 3 x 32 x 32 images.

    Parameters
    ----------
    shape : tuple of int
        Channels, height and width of an image; a square whose side ``patch`` divides.
    classes : int
        Number of classes.
    patch : int
        Side of a patch in pixels.
    dim : int
        Width; divisible by ``heads``.
    depth : int
        Layers.
    heads : int
        Of each layer's attention.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        patch: int = 4,
        dim: int = 192,
        depth: int = 6,
        heads: int = 3,
    ) -> None:
        super().__init__()
        channels, height, width = shape
        if height != width or height % patch:
            raise ValueError(
                f"the vit needs square images whose side patch = {patch} divides, "
                f"got {height} x {width}"
            )
        if dim % heads:
            raise ValueError(f"dim: must be divisible by heads = {heads}, got {dim}")
        net = VisionTransformer(
            image_size=height,
            patch_size=patch,
            num_layers=depth,
            num_heads=heads,
            hidden_dim=dim,
            mlp_dim=4 * dim,
            num_classes=classes,
        )
        if channels != net.conv_proj.in_channels:
            net.conv_proj = nn.Conv2d(channels, dim, patch, patch)
            fan_in = channels * patch * patch
            nn.init.trunc_normal_(net.conv_proj.weight, std=fan_in**-0.5)
            nn.init.zeros_(net.conv_proj.bias)
        for module in net.modules():
            if isinstance(module, nn.MultiheadAttention):
                module.register_forward_pre_hook(_plainly, with_kwargs=True)
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, classes) of images (B, C, H, W)."""
        return self.net(images)


def _plainly(
    module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Let attention be computed as it is written, not by a fused kernel.

    PyTorch's kernels have no second derivative, which Hessians need, and no rule for vmap.
    """
    return inputs, {**options, "need_weights": True}
