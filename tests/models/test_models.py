"""Networks and what their output means."""

import copy
import math
from contextlib import closing

import pytest
import torch
from cohorts import as_cohort, one_by_one, start_of, trainer_of
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torchvision import models
from torchvision.models import VisionTransformer

from fedsam.base.errors import UsageError
from fedsam.base.vector import Layout
from fedsam.config.plugins import find
from fedsam.config.schema import resolve
from fedsam.data.augment import Crop, Flip
from fedsam.data.datasets import Dataset
from fedsam.data.plan import Work
from fedsam.engines.threads import ThreadExecutor
from fedsam.models.cnn import CNN
from fedsam.models.digits_cnn import DigitsCNN
from fedsam.models.mlp import MLP
from fedsam.simulate.build.model import new_model
from fedsam.tasks.classification import Classification
from fedsam.training.batched import why_not
from fedsam.training.batched_gradient import Slots, Vmapped
from fedsam.training.client import ClientJob


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_published_sizes():
    assert parameters(CNN((3, 32, 32), 10)) == 797_962
    assert parameters(CNN((3, 32, 32), 100)) == 815_332
    assert parameters(MLP((1, 28, 28), 10)) == 199_210
    assert parameters(DigitsCNN((1, 8, 8), 10)) == 18_510
    assert Layout.of(CNN((3, 32, 32), 10)).trainable == 797_962


def test_the_cnn_is_the_papers_layer_by_layer():
    model = CNN((3, 32, 32), 10)
    x = torch.randn(5, 3, 32, 32)
    relu, pool = nn.ReLU(), nn.MaxPool2d(2)
    h = pool(relu(nn.functional.conv2d(x, model.conv1.weight, model.conv1.bias)))
    assert h.shape == (5, 64, 14, 14)
    h = pool(relu(nn.functional.conv2d(h, model.conv2.weight, model.conv2.bias)))
    assert h.shape == (5, 64, 5, 5)
    h = relu(nn.functional.linear(h.reshape(5, 1600), model.fc1.weight, model.fc1.bias))
    h = relu(nn.functional.linear(h, model.fc2.weight, model.fc2.bias))
    expected = nn.functional.linear(h, model.fc3.weight, model.fc3.bias)
    torch.testing.assert_close(model(x), expected)
    strided = model(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(strided, expected, rtol=1e-4, atol=1e-5)


def test_the_cnn_fits_mnist_and_says_what_is_too_small():
    assert CNN((1, 28, 28), 10)(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    with pytest.raises(ValueError, match="16 x 16 pixels or more, got 8 x 8"):
        CNN((1, 8, 8), 10)


def test_classification_counts_and_sums():
    task = Classification()
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 0.0]])
    labels = torch.tensor([0, 1, 1, 0])
    losses = [
        math.log1p(math.exp(-2)),
        math.log1p(math.exp(-1)),
        3 + math.log1p(math.exp(-3)),
        math.log(2),
    ]
    assert task.loss(logits, labels).tolist() == pytest.approx(losses, rel=1e-6)
    whole = task.statistics(logits, labels)
    parts = task.statistics(logits[:1], labels[:1]) + task.statistics(logits[1:], labels[1:])
    torch.testing.assert_close(whole, parts)
    metrics = task.metrics(whole)
    assert metrics["accuracy"] == 0.75  # a tie goes to the first class
    assert metrics["loss"] == pytest.approx(sum(losses) / 4, rel=1e-6)


NAMES = ("resnet20", "resnet18", "mobilenet_v2", "wrn16_4", "vit")
NORMED = NAMES[:-1]
ALL = pytest.mark.parametrize("name", NAMES)


def new(name, shape=(3, 32, 32), classes=10, **options):
    return find("model", name, "fedsam.models", nn.Module)(shape, classes, **options)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet20", 269_722),  # He et al.: 0.27 M
        ("resnet18", 11_173_962),  # with CIFAR's first layer
        ("mobilenet_v2", 3_504_872 - 1281 * 1000 + 1281 * 10),  # torchvision's without its head
        ("wrn16_4", 2_748_890),  # Zagoruyko and Komodakis: 2.75 M
        ("vit", 6 * 444_864 + 4 * 48 * 4 + 192 * 48 + 192 + 65 * 192 + 192 + 384 + 1930 - 768),
    ],
)
def test_published_sizes_of_the_deep_ones(name, size):
    """Any norm that has parameters has the same number; GroupNorm leaves nothing to be averaged."""
    layout = Layout.of(new(name))
    assert layout.size == layout.trainable == size
    if name in NORMED:
        assert parameters(new(name, norm="batch")) == size
        assert not any(isinstance(m, nn.GroupNorm) for m in new(name, norm="none").modules())


@ALL
def test_any_channels_sides_and_classes(name):
    for shape, classes in [((1, 28, 28), 62), ((3, 32, 32), 10), ((3, 28, 28), 2)]:
        images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        assert new(name, shape, classes).eval()(images).shape == (2, classes)
    least = {"resnet18": 8, "mobilenet_v2": 8}.get(name, 4)
    assert new(name, (1, least, least), 3).eval()(torch.zeros(1, 1, least, least)).shape == (1, 3)
    small = least - 1
    with pytest.raises(ValueError, match=f"the {name} needs .*, got {small} x {small}"):
        new(name, (1, small, small), 3)


def test_resnet18_with_imagenets_first_layers_is_torchvisions():
    theirs = models.resnet18()
    mine = new("resnet18", norm="batch", first="imagenet", outputs=1000)
    mine.net.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(mine.eval()(x), theirs.eval()(x))
    assert new("resnet18", (1, 28, 28), first="imagenet")(torch.zeros(2, 1, 28, 28)).shape == (
        2,
        10,
    )


def test_mobilenet_v2_with_imagenets_strides_is_torchvisions():
    theirs = models.mobilenet_v2(num_classes=2028)
    mine = new("mobilenet_v2", (3, 64, 64), 2028, norm="batch", strides="imagenet")
    mine.net.load_state_dict(theirs.state_dict())
    assert parameters(mine) == 4_821_740  # Landmarks-User-160k's
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(mine.eval()(x), theirs.eval()(x))
    with pytest.raises(ValueError, match=r"needs images of 32 x 32 .*, got 31 x 40"):
        new("mobilenet_v2", (3, 31, 40), strides="imagenet")
    assert new("mobilenet_v2", (1, 32, 40), strides="imagenet")(
        torch.zeros(2, 1, 32, 40)
    ).shape == (
        2,
        10,
    )


def test_options_of_the_norm_are_checked():
    with pytest.raises(ValueError, match="outputs: must be at least the classes, 10, got 3"):
        new("resnet18", outputs=3)
    with pytest.raises(ValueError, match="first: must be small or imagenet, got 'large'"):
        new("resnet18", first="large")
    with pytest.raises(ValueError, match="strides: must be small or imagenet, got 'large'"):
        new("mobilenet_v2", strides="large")
    with pytest.raises(ValueError, match="norm: must be group, batch, none, got 'layer'"):
        new("resnet20", norm="layer")
    with pytest.raises(ValueError, match="groups: must be at least 1, got 0"):
        new("wrn16_4", groups=0)
    with pytest.raises(ValueError, match="must be divisible by num_groups"):
        new("mobilenet_v2", groups=16)
    with pytest.raises(ValueError, match="square images whose side patch = 4 divides, got 30 x 30"):
        new("vit", (3, 30, 30))
    with pytest.raises(ValueError, match="divisible by heads = 3, got 100"):
        new("vit", dim=100)


def normed(x, tensors, name):
    return F.group_norm(x, 2, tensors[f"{name}.weight"], tensors[f"{name}.bias"])


def test_resnet20_is_the_papers_layer_by_layer():
    model = new("resnet20").double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    t, sides = model.state_dict(), []
    h = torch.relu(normed(F.conv2d(x, t["conv1.weight"], padding=1), t, "bn1"))
    for n in range(9):
        stride = 2 if n in (3, 6) else 1
        r = F.conv2d(h, t[f"blocks.{n}.conv1.weight"], stride=stride, padding=1)
        r = torch.relu(normed(r, t, f"blocks.{n}.bn1"))
        r = normed(F.conv2d(r, t[f"blocks.{n}.conv2.weight"], padding=1), t, f"blocks.{n}.bn2")
        if stride == 2:
            h = torch.cat([h[:, :, ::2, ::2], torch.zeros_like(h)[:, :, ::2, ::2]], 1)
        h = torch.relu(r + h)
        sides.append(h.shape[1:])
    assert sides[0::3] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    expected = h.mean((2, 3)) @ t["fc.weight"].T + t["fc.bias"]
    torch.testing.assert_close(model(x), expected)


def test_wrn16_4_is_the_papers_layer_by_layer():
    model = new("wrn16_4").double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    t, sides = model.state_dict(), []
    h = F.conv2d(x, t["conv.weight"], padding=1)
    for n in range(6):
        stride, b = (2 if n in (2, 4) else 1), f"blocks.{n}"
        a = torch.relu(normed(h, t, f"{b}.norm1"))
        r = F.conv2d(a, t[f"{b}.conv1.weight"], stride=stride, padding=1)
        r = torch.relu(normed(r, t, f"{b}.norm2"))
        r = F.conv2d(r, t[f"{b}.conv2.weight"], padding=1)
        h = r + (F.conv2d(a, t[f"{b}.shortcut.weight"], stride=stride) if n % 2 == 0 else h)
        sides.append(h.shape[1:])
    assert sides[1::2] == [(64, 32, 32), (128, 16, 16), (256, 8, 8)]
    h = torch.relu(normed(h, t, "norm")).mean((2, 3))
    torch.testing.assert_close(model(x), h @ t["fc.weight"].T + t["fc.bias"])


def test_the_vit_is_torchvisions_and_has_a_hessian():
    model = new("vit", (1, 8, 8), 3, dim=12, depth=2).double()
    theirs = VisionTransformer(8, 4, 2, 3, 12, 48, num_classes=3).double()
    theirs.conv_proj = nn.Conv2d(1, 12, 4, 4).double()
    nn.init.normal_(model.net.heads.head.weight)
    theirs.load_state_dict(model.net.state_dict())
    x, labels = torch.randn(4, 1, 8, 8).double(), torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(model(x), theirs(x))
    w = model.net.conv_proj.bias
    rest = {name: p for name, p in model.named_parameters() if p is not w}

    def slope(bias):
        parameters = rest | {"net.conv_proj.bias": bias}
        loss = F.cross_entropy(functional_call(model, parameters, (x,)), labels)
        return torch.autograd.grad(loss, bias, create_graph=True)[0]

    (curved,) = torch.autograd.grad(slope(w)[0], w)
    step = torch.zeros(12).double()
    step[3] = 1e-5
    ahead, behind = [slope((w + s * step).detach().requires_grad_())[0] for s in (1, -1)]
    torch.testing.assert_close(curved[3], (ahead - behind) / 2e-5, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("name", "layer"), [("resnet18", "layer4"), ("mobilenet_v2", "features")])
def test_the_last_feature_map_of_32_pixels_has_4(name, layer):
    model, sides = new(name), []
    getattr(model.net, layer).register_forward_hook(lambda *seen: sides.append(seen[2].shape[2:]))
    model(torch.zeros(1, 3, 32, 32))
    assert sides == [(4, 4)]


SLOW = [pytest.param(n, marks=[pytest.mark.slow] if n == "resnet18" else []) for n in NAMES]


@pytest.mark.parametrize("name", SLOW)
def test_clients_on_threads_and_in_cohorts_are_those_one_by_one(name):
    """To the byte on one thread and on two, to 1e-5 as either kind of cohort."""
    torch.manual_seed(2)
    template = new(name, (2, 8, 8), 3).double()
    work = Work(2, local_steps=1, augmentations=(Crop(1), Flip()))
    trainer = trainer_of(module=lambda: copy.deepcopy(template), work=work)
    jobs = [
        ClientJob(client, start_of(trainer), 1, 0.02) for client in (0, 1)
    ]  # the second has 1 image
    alone = one_by_one([trainer] * 2, jobs)
    with closing(ThreadExecutor(trainer, 2)) as threads:
        for mine, other in zip(threads.train(jobs), alone, strict=True):
            assert torch.equal(mine.state, other.state)
    for gradients in (Slots, Vmapped):
        together = as_cohort([trainer] * 2, jobs, gradients)
        for mine, other in zip(together, alone, strict=True):
            moved = (other.state - jobs[0].state).norm()
            assert moved > 0
            assert (mine.state - other.state).norm() <= 1e-5 * moved
            assert mine.loss == pytest.approx(other.loss, rel=1e-10)


@pytest.mark.parametrize("name", NORMED)
def test_batchnorm_is_refused_a_cohort_by_name(name):
    trainer = trainer_of(module=lambda: new(name, (2, 8, 8), 3, norm="batch").double())
    assert why_not([trainer], Slots).startswith("BatchNorm: ")


def dataset(channels, classes=7):
    images, labels = torch.zeros(4, channels, 32, 32, dtype=torch.uint8), torch.arange(4)
    each = (0.5,) * channels
    return Dataset("stub", images, labels, images, labels, classes, each, each)


def imported(path, channels, **options):
    return new_model(resolve({"model": path, "model_options": options}), dataset(channels))


def test_models_of_torchvision_and_timm_get_classes_and_channels():
    assert imported("torchvision.models:shufflenet_v2_x0_5", 3).fc.out_features == 7
    given = imported("torchvision.models:shufflenet_v2_x0_5", 3, num_classes=9)
    assert given.fc.out_features == 9  # what is given stands
    for channels in (1, 3):
        model = imported("timm:create_model", channels, model_name="test_resnet")
        assert model.eval()(torch.zeros(2, channels, 32, 32)).shape == (2, 7)
    with pytest.raises(UsageError, match="takes images of 3 channels, those of digits have 1"):
        imported("torchvision.models:shufflenet_v2_x0_5", 1)
    with pytest.raises(UsageError, match="--model-options: create_model: Unknown model"):
        imported("timm:create_model", 3, model_name="no_such")


def test_what_a_signature_names_is_what_it_gets(monkeypatch, tmp_path):
    (tmp_path / "fours.py").write_text(
        "from torch import nn\n"
        "def named(in_chans, num_classes=2): return nn.Conv2d(in_chans, num_classes, 1)\n"
        "def ours(classes, **more): return nn.Linear(classes, 5, **more)\n"
        "class Any(nn.Linear):\n    def __init__(self, **more): super().__init__(3, 4, **more)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert imported("fours:named", 1).weight.shape == (7, 1, 1, 1)
    assert imported("fours:ours", 1, bias=False).weight.shape == (5, 7)
    assert imported("fours:Any", 1).weight.shape == (4, 3)


@pytest.mark.parametrize(
    ("model", "options"),
    [("timm:create_model", {"model_name": "test_resnet"}), ("resnet20", {"norm": "batch"})],
)
def test_a_round_of_a_named_and_of_an_imported_model(quick, model, options):
    keys = {"rounds": 1, "clients": 4, "clients_per_round": 2, "local_steps": 1, "update_bn": 20}
    outcomes = [quick(model=model, model_options=options, threads=n, **keys) for n in (1, 2)]
    one, two = [(outcome.folder / "model.safetensors").read_bytes() for outcome in outcomes]
    assert one == two
    assert outcomes[0].summary["ended"] == "all rounds done"
