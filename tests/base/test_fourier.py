"""A convolution by Fourier's transform is the direct one: values, derivatives, and when it is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from fedsam.base import fourier
from fedsam.base.fourier import FourierConv2d, convolved, frequencies, transforms, work, worthwhile
from fedsam.models.cnn import CNN

OF_CNN = ((64, 14, 14), (5, 5), 64, 64)  # its second convolution on a mini-batch of CIFAR-10


@st.composite
def convolutions(draw):
    """Return images, weight and bias, float64, of any fitting shapes."""
    many, channels, outputs = (draw(st.integers(1, 3)) for _ in range(3))
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    kernel = draw(st.integers(1, height)), draw(st.integers(1, width))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    shapes = (many, channels, height, width), (outputs, channels, *kernel), (outputs,)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


@settings(max_examples=60, deadline=None)
@given(convolutions(), st.booleans())
def test_it_is_the_direct_convolution(tensors, biased):
    images, weight, bias = tensors
    bias = bias if biased else None
    out = convolved(images, weight, bias)
    torch.testing.assert_close(out, F.conv2d(images, weight, bias), rtol=1e-12, atol=1e-12)
    assert out.permute(0, 2, 3, 1).is_contiguous()


def test_both_derivatives_are_those_of_the_direct_convolution():
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 3, 5, 4), (2, 3, 3, 2), (2,)
    tensors = [
        torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes
    ]
    direction = torch.randn(2, 2, 3, 3, generator=generator, dtype=torch.float64)

    def derivatives(convolve):
        loss = (convolve(*tensors).sin() * direction).sum()
        first = torch.autograd.grad(loss, tensors, create_graph=True)
        slope = sum((g.sin()).sum() for g in first)
        return [*first, *torch.autograd.grad(slope, tensors)]

    ours, direct = derivatives(convolved), derivatives(F.conv2d)
    for mine, theirs in zip(ours, direct, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11)


def test_float32_is_as_near_to_float64_as_the_direct_sum():
    torch.manual_seed(0)
    images, weight = torch.randn(16, 64, 14, 14), torch.randn(64, 64, 5, 5) / 40
    exact = F.conv2d(images.double(), weight.double())
    error = (convolved(images, weight, None) - exact).norm() / exact.norm()
    direct = (F.conv2d(images, weight) - exact).norm() / exact.norm()
    assert error < 1e-6
    assert error < 2 * direct


def test_models_under_vmap_have_their_own_kernels():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 2, 4, 6, 6, generator=generator, dtype=torch.float64)
    weights = torch.randn(3, 5, 4, 3, 3, generator=generator, dtype=torch.float64)
    together = vmap(lambda x, w: convolved(x, w, None))(images, weights)
    one_by_one = torch.stack([F.conv2d(x, w) for x, w in zip(images, weights, strict=True)])
    torch.testing.assert_close(together, one_by_one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("sides", "pairs"), [((1, 1), 1), ((2, 2), 4), ((3, 5), 8), ((14, 14), 100)]
)
def test_conjugate_frequencies_stand_once(sides, pairs):
    chosen = frequencies(*sides)
    both = {(a, b) for a, b in chosen} | {(-a % sides[0], -b % sides[1]) for a, b in chosen}
    assert len(chosen) == pairs
    assert len(both) == sides[0] * sides[1]


def test_work_counts_the_products_of_the_matrices():
    many, channels, outputs, height, width, kernel = 2, 3, 5, 6, 4, (3, 2)
    of = transforms(height, width, kernel, torch.float64)
    parts, sums = len(of.images), len(of.outputs[0])
    per_image = of.images.numel() * channels + sum(m.numel() for m in of.outputs) * outputs
    per_image += parts // 2 * (2 * channels) * (2 * outputs)
    kernels = sum(m.numel() for m in of.kernels) * channels * outputs
    direct = many * sums * 3 * 2 * channels * outputs
    assert work((many, height, width), kernel, channels, outputs) == (
        kernels + many * per_image,
        direct,
    )


def test_it_is_taken_where_it_saves_products():
    assert worthwhile(*OF_CNN)
    assert not worthwhile((4, 14, 14), (5, 5), 64, 64)  # the kernels' transform stands for few
    assert not worthwhile((64, 30, 30), (5, 5), 64, 64)  # a plane's transform grows with its square
    assert not worthwhile((64, 32, 32), (5, 5), 3, 64)
    assert not worthwhile((64, 14, 14), (1, 1), 64, 64)


@pytest.fixture
def ways(monkeypatch):
    """Return the list of the ways that convolutions take from now on."""
    taken = []
    for name, of in (("fourier", fourier), ("direct", fourier.F)):
        inner = convolved if name == "fourier" else F.conv2d
        attribute = "convolved" if name == "fourier" else "conv2d"

        def noted(*tensors, name=name, inner=inner):
            taken.append(name)
            return inner(*tensors)

        monkeypatch.setattr(of, attribute, noted)
    return taken


def test_the_layer_chooses_by_shape_dtype_and_precision(ways):
    torch.manual_seed(0)
    layer = FourierConv2d(64, 64, 5)
    images = torch.randn(64, 64, 14, 14)
    with torch.no_grad():
        out = layer(images)
        small = layer(images[:4])
        with torch.autocast("cpu", torch.bfloat16):
            layer(images)
        one = layer(images[0])
        layer.double()(images.double())
    assert ways == ["fourier", "direct", "direct", "direct", "fourier"]
    torch.testing.assert_close(out[:4], small, rtol=1e-4, atol=1e-5)
    assert one.shape == (64, 10, 10)


def test_what_is_smaller_than_the_kernel_is_refused_as_by_pytorch():
    with pytest.raises(RuntimeError, match=r"[Kk]ernel size can't be greater"):
        FourierConv2d(64, 64, 5)(torch.zeros(64, 64, 4, 4))


def test_it_begins_as_pytorchs_and_is_saved_alike():
    torch.manual_seed(0)
    mine = FourierConv2d(3, 4, 5)
    torch.manual_seed(0)
    theirs = nn.Conv2d(3, 4, 5)
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(mine.state_dict()[n], t) for n, t in theirs.state_dict().items())


def test_what_was_first_made_without_gradients_can_be_trained_on():
    fourier.transforms.cache_clear()
    torch.manual_seed(0)
    model, images = CNN((3, 32, 32), 10), torch.randn(64, 3, 32, 32)
    with torch.inference_mode():
        first = model(images)
    loss = model(images).square().mean()
    loss.backward()
    torch.testing.assert_close(first.square().mean(), loss.detach())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_what_was_first_made_while_a_step_was_traced_is_of_numbers():
    fourier.transforms.cache_clear()
    torch.manual_seed(0)
    layer, images = FourierConv2d(64, 64, 5), torch.randn(64, 64, 14, 14)
    with torch.no_grad():
        traced = make_fx(layer, tracing_mode="fake", _allow_non_fake_inputs=True)(images)
        assert "aten.bmm" in traced.code
        torch.testing.assert_close(traced(images), layer(images))
