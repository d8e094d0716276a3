"""First weights out of a file, parameters that train or do not, and products of low rank."""

import copy
import logging

import pytest
import torch
from cohorts import ENGINES, Work, as_cohort, assert_same, one_by_one, start_of, trainer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torchvision.models import mobilenet_v2, resnet18

from fedsam.base.errors import UsageError
from fedsam.base.vector import Layout, weighted_mean
from fedsam.models.mobilenet_v2 import MobileNetV2
from fedsam.models.pretrained.lora import Lora, LoraOptions, merged, targets, train_partly
from fedsam.models.pretrained.trainable import freeze_norms, train_only
from fedsam.models.pretrained.weights import checksum, load_weights
from fedsam.models.vit import ViT
from fedsam.training import batchnorm
from fedsam.training.client import ClientJob
from fedsam.training.flat_module import replica

SMALL = {"dim": 24, "depth": 2, "heads": 2}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def body(classes=3, width=6):
    torch.manual_seed(classes + width)
    layers = nn.Sequential(nn.Conv2d(2, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten())
    return nn.ModuleDict({"body": layers, "head": nn.Linear(36 * width, classes)})


@pytest.fixture
def saved(tmp_path):
    """Return a function that writes tensors, and returns the file's name."""

    def write(tensors, name="weights.safetensors"):
        save_file({n: t.contiguous().clone() for n, t in tensors.items()}, tmp_path / name)
        return str(tmp_path / name)

    return write


def test_all_tensors_of_a_file_are_taken(saved, caplog):
    one, other = body(), body()
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.copy_(tensor + 1)
    load_weights(one, saved(other.state_dict()), 3)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    assert not caplog.records


def test_a_head_for_other_classes_and_what_is_missing_stay_and_are_named(saved, caplog):
    one, other = body(classes=3), body(classes=1000)
    given_tensors = other.state_dict() | {"projector": torch.ones(2)}
    del given_tensors["body.0.bias"]
    before = copy.deepcopy(one.state_dict())
    file = saved(given_tensors)
    load_weights(one, file, 3)
    stay = {"head.weight", "head.bias", "body.0.bias"}
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, (before if name in stay else given_tensors)[name])
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        f"--weights {file}: as initialised, of another shape: head.weight, head.bias; "
        "as initialised, not in the file: body.0.bias; not the model's: projector"
    )


@pytest.mark.parametrize("wrapped", ["net.", "module.", ""])
@pytest.mark.parametrize("of_file", ["module.", ""])
def test_a_first_word_that_one_side_alone_has_is_no_difference(saved, wrapped, of_file):
    model = nn.ModuleDict({wrapped[:-1]: body()}) if wrapped else body()
    other = body(width=6).requires_grad_(False)
    other["head"].weight.fill_(2.0)
    file = saved({of_file + name: t for name, t in other.state_dict().items()})
    load_weights(model, file, 3)
    assert (model.state_dict()[f"{wrapped}head.weight"] == 2.0).all()


def test_a_batchnorms_scale_and_offset_begin_a_groupnorm(saved, caplog):
    """torchvision's MobileNetV2 for ImageNet begins ours with GroupNorm, of other strides."""
    torch.manual_seed(0)
    theirs, ours = mobilenet_v2(num_classes=1000), MobileNetV2((3, 32, 32), 10)
    with torch.no_grad():
        theirs.features[0][1].weight.uniform_(0.5, 2.0)
    load_weights(ours, saved(theirs.state_dict()), 10)
    assert isinstance(ours.net.features[0][1], nn.GroupNorm)
    assert torch.equal(ours.net.features[0][1].weight, theirs.features[0][1].weight)
    same = [n for n, t in ours.net.state_dict().items() if torch.equal(t, theirs.state_dict()[n])]
    assert len(same) == len(ours.state_dict()) - 2
    said = caplog.records[0].getMessage()
    assert "of another shape: net.classifier.1.weight, net.classifier.1.bias" in said
    assert "not the model's: features.0.1.num_batches_tracked" in said


def test_a_file_in_half_precision_is_widened(saved):
    one, other = body().double(), body().half()
    load_weights(one, saved(other.state_dict()), 3)
    assert torch.equal(one["head"].weight, other["head"].weight.double())


def write_pickle(path):
    torch.save(body().state_dict(), path)


def write_old_pickle(path):
    torch.save(body().state_dict(), path, _use_new_zipfile_serialization=False)


def write_short(path):
    save_file(body().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-100])


def write_wider(path):
    save_file(body(width=8).state_dict(), path)


def write_nan(path):
    save_file(body().state_dict() | {"head.bias": torch.tensor([1.0, float("nan"), 0.0])}, path)


def write_another(path):
    save_file({f"encoder.{n}.weight": torch.ones(2) for n in range(9)}, path)


WRONG = {
    write_pickle: "is a pickle, which could run code and is not opened; two lines in docs/pre",
    write_old_pickle: "is a pickle, ",
    write_short: "damaged, or no .safetensors: ",
    lambda path: path.write_bytes(b""): "damaged, or no .safetensors: ",
    lambda path: path.write_text("layers: none of them"): "damaged, or no .safetensors: ",
    lambda path: path.mkdir(): "cannot be read: Is a directory",
    lambda path: None: "cannot be read: No such file",
    write_wider: r"'head.weight' has shape \(3, 288\), the model's is \(3, 216\); give the",
    write_nan: "'head.bias' holds numbers that are not finite",
    write_another: "none of its names is the model's; it has encoder.0.weight, encoder.1.weight, "
    "encoder.2.weight, encoder.3.weight and 5 more, the model body.0.weight",
}


@pytest.mark.parametrize("write", WRONG, ids=lambda write: write.__name__.strip("<>"))
def test_a_wrong_file_is_one_line(tmp_path, write):
    path = tmp_path / "file.safetensors"
    write(path)
    with pytest.raises(UsageError, match=f"^--weights {path}: {WRONG[write]}") as raised:
        load_weights(body(), str(path), 3)
    assert "\n" not in str(raised.value)


def test_the_checksum_must_be_the_files(saved):
    file = saved(body().state_dict())
    load_weights(body(), file, 3, checksum(file))
    with pytest.raises(UsageError, match=r"is another file than --weights-sha256 says: it has \w"):
        load_weights(body(), file, 3, "0" * 64)


def test_only_what_the_expression_finds_trains():
    model = resnet18(num_classes=4)
    train_only(model, r"layer4\.1|^fc")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if n.startswith(("layer4.1.", "fc."))}
    with pytest.raises(
        UsageError, match="--train heads: no parameter is called so; the model has "
    ):
        train_only(model, "heads")


def test_a_tied_tensor_trains_if_one_of_its_names_is_found():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    train_only(model, "b.weight")
    assert model["a"].weight.requires_grad
    assert not model["a"].bias.requires_grad


def test_a_frozen_batchnorm_normalises_as_in_evaluation_and_is_not_sent():
    model = body()
    x = torch.randn(5, 2, 8, 8, generator=generator())
    with torch.no_grad():
        model["body"].train()(x)
    before = copy.deepcopy(model["body"][1].state_dict())
    expected = model["body"].eval()(x)
    train_only(model, "head")
    freeze_norms(model)
    copied = replica(model).train()
    torch.testing.assert_close(copied["body"](x), expected)
    assert copied.state_dict().keys() == body().state_dict().keys()
    for name, tensor in before.items():
        assert torch.equal(copied["body"][1].state_dict()[name], tensor)
    layout = Layout.of(copied)
    assert layout.size == layout.trainable == copied["head"].weight.numel() + 3
    assert not batchnorm.layers(copied)


def test_a_batchnorm_of_which_a_part_trains_keeps_its_statistics():
    model = body()
    train_only(model, "body.1.weight")
    freeze_norms(model)
    assert len(batchnorm.layers(model)) == 1


class Everything(nn.Module):
    """A convolution, attention and a linear layer, with a head."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, groups=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = nn.Linear(8, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        mixed, _ = self.attention(tokens, tokens, tokens)
        return self.head(torch.tanh(self.linear(mixed)).mean(1))


def everything(rank=2, pattern="", train="head", alpha=None, freeze="", seed=0):
    torch.manual_seed(1)
    model = Everything().double()
    train_partly(model, train, Lora(rank, pattern, LoraOptions(alpha, freeze)), generator(seed))
    return model


def randomise(model, seed=3):
    """Give every trainable parameter other values: B is zero at first."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=generator(seed))


def test_products_stand_beside_linear_layers_and_attention_by_default():
    torch.manual_seed(1)
    plain = Everything().double()
    train_only(plain, "head")
    names = [target.name for target in targets(plain, Lora(2))]
    assert names == ["attention.in_proj_weight", "attention.out_proj.weight", "linear.weight"]
    model = everything()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    product = {
        f"{prefix}parametrizations.{weight}.0.{part}"
        for prefix, weight in (
            ("attention.", "in_proj_weight"),
            ("attention.out_proj.", "weight"),
            ("linear.", "weight"),
        )
        for part in "AB"
    }
    assert trained == product | {"head.weight", "head.bias"}
    in_proj = model.attention.parametrizations.in_proj_weight[0]
    assert (in_proj.A.shape, in_proj.B.shape) == ((2, 8), (24, 2))
    assert float(in_proj.A.abs().max()) <= 8**-0.5 < 2 * float(in_proj.A.abs().max())
    assert not in_proj.B.any()


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("", ["attention.in_proj_weight", "attention.out_proj.weight", "linear.weight"]),
        ("conv", ["conv.weight"]),
        (r"in_proj|linear\.w|conv", ["conv.weight", "attention.in_proj_weight", "linear.weight"]),
    ],
)
@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (6.0, 3.0)])
def test_the_network_computes_with_w0_and_the_scaled_product(pattern, names, alpha, scale):
    model = everything(2, pattern, alpha=alpha)
    torch.manual_seed(1)
    plain = Everything().double().requires_grad_(False)
    x = torch.randn(4, 2, 5, 5, dtype=torch.float64, generator=generator())
    assert torch.equal(model(x), plain(x))  # the products are zero at first
    randomise(model)
    plain.head.load_state_dict(model.head.state_dict())
    for name in names:
        prefix, _, attribute = name.rpartition(".")
        product = model.get_submodule(prefix).parametrizations[attribute][0]
        rows = plain.get_parameter(name).flatten(1)
        for i in range(len(rows)):
            for r in range(2):
                rows[i] += scale * product.B[i, r].detach() * product.A[r].detach()
    torch.testing.assert_close(model(x), plain(x))
    other = Everything().double()
    other.load_state_dict(merged(model.state_dict(), Lora(2, pattern, LoraOptions(alpha))))
    assert torch.equal(other(x), model(x))


@ENGINES
@pytest.mark.parametrize("freeze", ["", "a"])
def test_clients_train_alike_one_by_one_and_as_a_cohort(gradients, freeze):
    def module():
        return everything(pattern="conv|in_proj|linear", freeze=freeze)

    trainer = trainer_of(module=module, work=Work(4))
    start = start_of(trainer)
    jobs = [ClientJob(client, start, 1, 0.1) for client in range(5)]
    alone = one_by_one([trainer] * 5, jobs)
    assert_same(as_cohort([trainer] * 5, jobs, gradients), alone)
    trained = [p.numel() for p in module().parameters() if p.requires_grad]
    assert trainer.layout.size == sum(trained)


def product_means(freeze):
    """Return the mean of the clients' weights, and the weight of their mean, after a round."""
    trainer = trainer_of(
        module=lambda: everything(pattern="in_proj|linear", freeze=freeze), work=Work(4)
    )
    start = start_of(trainer)
    done = one_by_one([trainer] * 5, [ClientJob(k, start, 1, 0.3) for k in range(5)])
    sizes = [result.examples for result in done]
    lora = Lora(2, options=LoraOptions(freeze=freeze))

    def weight(state):
        return merged(trainer.layout.whole(state), lora)["linear.weight"]

    of_mean = weight(weighted_mean([result.state for result in done], sizes))
    return weighted_mean([weight(result.state) for result in done], sizes), of_mean


def test_a_fixed_a_makes_fedavg_that_of_the_weights():
    mean_of_weights, weight_of_mean = product_means("a")
    torch.testing.assert_close(weight_of_mean, mean_of_weights, rtol=1e-12, atol=1e-14)
    mean_of_weights, weight_of_mean = product_means("")
    assert float((weight_of_mean - mean_of_weights).norm()) > 1e-6


@given(st.integers(1, 5), st.integers(1, 7), st.integers(1, 7), st.data())
@settings(max_examples=40, deadline=None)
def test_mean_of_products_with_one_a_is_the_product_of_the_mean(clients, m, n, data):
    r = data.draw(st.integers(1, min(m, n)))
    sizes = data.draw(st.lists(st.integers(1, 50), min_size=clients, max_size=clients))
    g = generator(data.draw(st.integers(0, 1000)))
    A = torch.randn(r, n, dtype=torch.float64, generator=g)
    Bs = [torch.randn(m, r, dtype=torch.float64, generator=g) for _ in range(clients)]
    products = weighted_mean([B @ A for B in Bs], sizes)
    torch.testing.assert_close(products, weighted_mean(Bs, sizes) @ A)


def test_a_follows_from_the_seed_and_is_frozen_where_that_is_asked():
    a, b, c = (everything(freeze="a", seed=seed) for seed in (0, 0, 1))
    assert Layout.of(a).digest == Layout.of(b).digest != Layout.of(c).digest
    names = {e.name for e in Layout.of(a).entries}
    assert {name.rpartition(".")[2] for name in names} == {"B", "weight", "bias"}


def test_a_saved_network_trains_the_weights_themselves():
    torch.manual_seed(1)
    model = Everything().double()
    train_partly(model, "head", Lora(2), generator(), saved=True)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "head.weight",
        "head.bias",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "linear.weight",
    }
    assert model.state_dict().keys() == Everything().state_dict().keys()


def shared():
    model = Everything().double()
    model.linear = nn.Linear(8, 8)
    model.other = nn.Linear(8, 8)
    model.other.weight = model.linear.weight
    return model


BAD = [
    (Everything, Lora(2, "conv.bias"), "--lora-targets conv.bias: no weight of two dimensions or"),
    (Everything, Lora(2, "head"), "--lora-targets head: no weight of two dimensions or more"),
    (lambda: nn.Sequential(nn.Conv2d(2, 3, 3)), Lora(2), "--lora 2: no weight of two dimensions"),
    (Everything, Lora(7), "--lora 7: linear.weight has rank 6 at most; train it as a whole"),
    (shared, Lora(2, "linear"), "linear.weight belongs to two layers, which LoRA would part"),
]


@pytest.mark.parametrize(("make", "lora", "message"), BAD)
def test_wrong_targets_are_one_line(make, lora, message):
    train = "head" if make is not BAD[2][0] else ""
    with pytest.raises(UsageError) as raised:
        train_partly(make(), train, lora, generator())
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"alpha": 0.0}, "alpha: must be above 0"), ({"freeze": "b"}, "freeze: must be a, or left")],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LoraOptions(**options)


def test_asam_stretches_every_factor_of_a_product():
    """Its rule is by name, and their names hold "weight"; only biases are not stretched."""
    layout = Layout.of(everything())
    stretched = {e.name: bool(layout.weights[e.offset]) for e in layout.parameters}
    assert [name for name, yes in stretched.items() if not yes] == ["head.bias"]


def test_a_vits_products_have_second_derivatives_and_a_rule_for_vmap():
    torch.manual_seed(0)
    model = ViT((1, 8, 8), 3, **SMALL).double()
    train_partly(model, "heads", Lora(2), generator())
    randomise(model)
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64, generator=generator())
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def loss(values, x):
        return torch.func.functional_call(model, values, (x,)).square().mean()

    values = {n: p.detach() for n, p in trained.items()}
    stacked = {n: torch.stack([v, 2 * v]) for n, v in values.items()}
    together = torch.vmap(torch.func.grad(loss), in_dims=(0, None))(stacked, x)
    for k in range(2):
        alone = torch.func.grad(loss)({n: v[k] for n, v in stacked.items()}, x)
        for name, g in alone.items():
            torch.testing.assert_close(together[name][k], g)
    g = torch.autograd.grad(loss(trained, x), list(trained.values()), create_graph=True)
    again = torch.autograd.grad(sum((one * one).sum() for one in g), list(trained.values()))
    assert all(one.isfinite().all() for one in again)
    assert any(one.any() for one in again)
