"""Networks that say what each pixel is: sizes that were published, shapes, norms, heads."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedsam.models.bisenet_v2 import BisenetV2
from fedsam.models.lraspp import Lraspp
from fedsam.models.scenes_cnn import ScenesCnn
from fedsam.tasks.segmentation import Segmentation


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_sizes_of_bisenet_v2_are_those_of_feddrives_with_and_without_its_other_heads():
    network = BisenetV2((3, 512, 1024), 19)
    assert parameters(network) == 8_196_416
    assert parameters(network) - parameters(network.auxiliary) == 4_585_552
    assert parameters(BisenetV2((3, 64, 64), 19, heads=0)) == 4_585_552
    assert sum(isinstance(m, nn.BatchNorm2d) for m in network.modules()) == 58


def test_sizes_of_the_small_ones():
    assert parameters(ScenesCnn((1, 16, 16), 11)) == 58_828
    assert parameters(Lraspp((3, 64, 64), 19)) == 3_221_198


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize(("stride", "dilations"), [(4, (1, 2, 4, 8)), (2, ())])
def test_scenes_cnn_sees_as_far_as_its_dilations_say(stride, dilations, norm):
    options = {"width": 4, "stride": stride, "dilations": dilations, "norm": norm}
    network = ScenesCnn((1, 160, 160), 3, **options).eval()
    for parameter in network.parameters():  # so that no ReLU hides anything
        parameter.data.abs_()
    images = torch.ones(1, 1, 160, 160, requires_grad=True)
    logits = network(images)
    assert logits.shape == (1, 3, 160, 160)
    if norm == "group":  # it sees all of the image
        return
    logits[0, :, 80, 80].sum().backward()
    rows = images.grad[0, 0].any(1).nonzero()[:, 0]
    # the stem's kernel, and a stride to both sides for each step of a tap
    assert int(rows[-1] - rows[0]) + 1 == 2 * stride + 2 * stride * sum(dilations)


@pytest.mark.parametrize("sides", [(64, 96), (45, 70)])
def test_logits_have_the_images_size_and_every_head_learns(sides):
    network = BisenetV2((3, *sides), 5, dropout=0.0)
    images, masks = torch.randn(6, 3, *sides), torch.randint(0, 5, (6, *sides))
    heads = network(images)
    assert heads.shape == (6, 5, 5, *sides)
    Segmentation(5).loss(heads, masks).mean().backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in network.parameters())
    network.eval()
    assert network(images).shape == (6, 5, *sides)


def test_bisenet_v2_is_tested_on_smaller_images_if_asked_to():
    torch.manual_seed(0)
    network = BisenetV2((3, 128, 192), 3, heads=0, dropout=0.0, test_scale=0.5)
    whole = BisenetV2((3, 64, 96), 3, heads=0, dropout=0.0)
    whole.load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 64, 96)
    larger = images.repeat_interleave(2, -1).repeat_interleave(2, -2)
    smoothed = F.interpolate(larger, (64, 96), mode="bilinear", antialias=True)
    half = whole.eval()(smoothed)
    expected = F.interpolate(half, scale_factor=2, mode="bilinear", align_corners=True)
    torch.testing.assert_close(network.eval()(larger), expected)
    torch.testing.assert_close(network.train()(larger), whole.train()(larger))


def test_bisenet_v2_sees_no_padding_where_there_is_none():
    torch.manual_seed(0)
    network = BisenetV2((3, 64, 64), 3, heads=0).eval()
    images = torch.randn(1, 3, 64, 64)
    wider = torch.cat([images, torch.zeros(1, 3, 64, 20)], -1)
    # 20 more columns are padded to 32, black like those themselves
    whole = network(torch.cat([images, torch.zeros(1, 3, 64, 32)], -1))
    torch.testing.assert_close(network(wider), whole[..., :84])


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_lraspp_is_torchvisions_with_a_norm_of_choice(norm):
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    network = Lraspp((3, 40, 56), 4, norm=norm).eval()
    kinds = {type(m) for m in network.modules()}
    assert (nn.BatchNorm2d in kinds) == (norm == "batch")
    assert (nn.GroupNorm in kinds) == (norm == "group")
    images = torch.randn(2, 3, 40, 56)
    assert network(images).shape == (2, 4, 40, 56)
    if norm == "batch":
        theirs = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
        theirs.load_state_dict(network.network.state_dict())
        assert torch.equal(theirs.eval()(images)["out"], network(images))


def test_what_the_networks_cannot_take_is_said():
    with pytest.raises(ValueError, match="3 channels, got 1"):
        Lraspp((1, 40, 40), 4)
    with pytest.raises(ValueError, match="sides must be divisible by 2"):
        ScenesCnn((1, 7, 8), 4)
    with pytest.raises(ValueError, match="heads must be 4 or 0"):
        BisenetV2((3, 64, 64), 4, heads=2)
    with pytest.raises(ValueError, match=r"test_scale must lie in \(0, 1\], got 2"):
        BisenetV2((3, 64, 64), 4, test_scale=2)
