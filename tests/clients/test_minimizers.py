"""Minimisers against naive float64 twins, the papers' laws and each other."""

import copy
from functools import partial
from itertools import pairwise

import naive
import pytest
import torch
from fedsam.clients.corrections.fedavg import FedAvg
from fedsam.clients.corrections.fedprox import FedProx
from fedsam.clients.losses.plain import Plain
from fedsam.clients.minimizers.asam import ASAM
from fedsam.clients.minimizers.lookbehind import Lookbehind, adaptive_alpha
from fedsam.clients.minimizers.sam import SAM
from fedsam.clients.minimizers.sgd import SGD
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedsam.base.errors import UsageError
from fedsam.base.randomness import torch_generator
from fedsam.base.vector import Entry, Layout, unit
from fedsam.data.images import Images
from fedsam.data.plan import Work, make_plan
from fedsam.tasks.classification import Classification
from fedsam.training.flat_module import FlatModule
from fedsam.training.loop import train_client
from fedsam.training.method import Descent, Local, Method


def mlp():
    torch.manual_seed(1)
    layers = [
        nn.Flatten(),
        nn.Linear(32, 7),
        nn.ReLU(),
        nn.Linear(7, 5),
        nn.ReLU(),
        nn.Linear(5, 3),
    ]
    return nn.Sequential(*layers).double()


def convolutions():
    torch.manual_seed(2)
    layers = [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 2, padding=1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(3 * 9, 3)).double()


PIXELS = torch.randint(0, 256, (13, 2, 4, 4), generator=torch.Generator().manual_seed(3))
LABELS = torch.arange(13) % 3
MEAN, STD = (0.4, 0.5), (0.2, 0.3)


def images():
    return Images(PIXELS.to(torch.uint8), LABELS, MEAN, STD, dtype=torch.float64)


def ours(module, minimizer, client=None, *, momentum=0.0, weight_decay=0.0, lr=0.3, round=1):
    """Two epochs of 13 images in mini-batches of 4: the last has one image."""
    network = FlatModule(copy.deepcopy(module))
    state = network.state.clone()
    plan = make_plan(torch.arange(13), Work(4, 2.0), (4, 4), torch_generator(0, "test"))
    assert plan.sizes == [4, 4, 4, 1] * 2
    method = Method(minimizer, client or FedAvg(), momentum, weight_decay, loss=Plain())
    new, *_ = train_client(
        network, state, plan, images(), Classification(), method, round=round, lr=lr
    )
    return network.layout.read(new)


def batches():
    """The same mini-batches by plain tensor code."""
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 2, 1, 1) for v in (MEAN, STD))
    x = (PIXELS.double() / 255 - mean) / std
    plan = make_plan(torch.arange(13), Work(4, 2.0), (4, 4), torch_generator(0, "test"))
    for step, size in enumerate(plan.sizes):
        rows = plan.indices[step, :size]
        yield x[rows], LABELS[rows]


def theirs(module, train, **options):
    model = copy.deepcopy(module)
    train(model, batches(), **({"lr": 0.3} | options))
    return model.state_dict()


def assert_agree(a, b, rtol=1e-10):
    assert set(a) == set(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=1e-13)


def identical(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


BASES = [{}, {"momentum": 0.9}, {"weight_decay": 0.1}, {"momentum": 0.5, "weight_decay": 0.05}]
ASCENTS = {
    "sam": (SAM(0.2), partial(naive.sam_ascent, rho=0.2)),
    "asam": (ASAM(0.5, 0.1), partial(naive.asam_ascent, rho=0.5, eta=0.1)),
    "asam eta 0": (ASAM(0.5, 0.0), partial(naive.asam_ascent, rho=0.5, eta=0.0)),
    "asam on all": (
        ASAM(0.5, 0.1, all_parameters=True),
        partial(naive.asam_ascent, rho=0.5, eta=0.1, all_parameters=True),
    ),
}
modules = pytest.mark.parametrize("module", [mlp(), convolutions()], ids=["mlp", "conv"])


@modules
@pytest.mark.parametrize("base", BASES, ids=str)
def test_sgd_is_pytorchs(module, base):
    assert_agree(ours(module, SGD(), **base), theirs(module, naive.train, **base))


@modules
@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("name", ASCENTS)
def test_sam_and_asam_are_the_papers(module, base, name):
    minimizer, ascent = ASCENTS[name]
    assert_agree(
        ours(module, minimizer, **base), theirs(module, naive.train, ascent=ascent, **base)
    )


@modules
@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("slow", [0.2, 0.8, -1.0])
@pytest.mark.parametrize("name", ["sam", "asam"])
def test_lookbehind_is_the_official_2k_passes(module, base, slow, name):
    ascending, ascent = ASCENTS[name]
    minimizer = Lookbehind(ascending, k=3, slow=slow)
    reference = partial(naive.lookbehind, k=3, slow=slow, ascent=ascent)
    assert_agree(ours(module, minimizer, **base), theirs(module, reference, **base))


@modules
@pytest.mark.parametrize("name", [None, "sam", "asam"])
def test_fedprox_combines_with_every_minimiser(module, name):
    minimizer, ascent = ASCENTS[name] if name else (SGD(), None)
    proximal = ours(module, minimizer, FedProx(0.7), weight_decay=0.1)
    assert_agree(proximal, theirs(module, naive.train, ascent=ascent, mu=0.7, weight_decay=0.1))


@modules
def test_methods_become_the_simpler_ones_they_contain(module):
    sgd, sam, asam = ours(module, SGD()), ours(module, SAM(0.2)), ours(module, ASAM(0.5, 0.1))
    assert identical(ours(module, SAM(0.0)), sgd)
    assert identical(ours(module, ASAM(0.0, 0.1)), sgd)
    assert identical(ours(module, SGD(), FedProx(0.0)), sgd)
    assert_agree(ours(module, Lookbehind(SAM(0.2), k=1, slow=1.0)), sam, rtol=1e-12)
    assert_agree(ours(module, Lookbehind(ASAM(0.5, 0.1), k=1, slow=1.0)), asam, rtol=1e-12)
    # T = 1 + o(1) everywhere for a huge eta: rho is then SAM's in units of eta
    assert_agree(ours(module, ASAM(0.2 / 1e9, 1e9, all_parameters=True)), sam, rtol=1e-5)


@modules
@pytest.mark.parametrize("name", ["sam", "asam", "lookbehind"])
def test_the_twins_agree_to_rounding(module, name):
    # a rate at which nothing diverges, so that rounding is all there is
    base = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.05}
    if name == "lookbehind":
        minimizer, ascent = Lookbehind(SAM(0.2), k=2, slow=-1.0), ASCENTS["sam"][1]
        reference = partial(naive.lookbehind, k=2, slow=-1.0, ascent=ascent)
    else:
        minimizer, ascent = ASCENTS[name]
        reference = partial(naive.train, ascent=ascent)
    assert_agree(ours(module, minimizer, **base), theirs(module, reference, **base), rtol=1e-12)


def vector_layout():
    """Two weights and a bias: the test vectors of the facts."""
    entries = [
        Entry("layer.weight", (2,), torch.float64, 0),
        Entry("layer.bias", (1,), torch.float64, 2),
    ]
    return Layout(entries, 3, torch.float64)


W = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
G = torch.tensor([3.0, 4.0, 12.0], dtype=torch.float64)
LOCAL = Local(vector_layout(), W, 1, 0.1)


def test_published_vectors():
    assert_near = partial(torch.testing.assert_close, rtol=1e-12, atol=0)
    expected = torch.tensor([0.03, 0.04, 0.12], dtype=torch.float64)
    assert_near(SAM(0.13).perturbation(W, G, LOCAL), expected)
    expected = torch.tensor([3.0, 16.0, 12.0], dtype=torch.float64) / 217**0.5
    assert_near(ASAM(1.0, 0.0).perturbation(W, G, LOCAL), expected)
    expected = torch.tensor([3.0, 16.0, 3.0], dtype=torch.float64) / 109**0.5
    assert_near(ASAM(1.0, 0.0, all_parameters=True).perturbation(W, G, LOCAL), expected)


def test_a_zero_gradient_moves_nothing():
    zero = torch.zeros_like(G)
    assert torch.equal(SAM(0.1).perturbation(W, zero, LOCAL), zero)
    assert torch.equal(ASAM(0.1, 0.0).perturbation(W, zero, LOCAL), zero)


def test_adaptive_alpha_is_the_cosine_of_each_tensor_whatever_its_length():
    # the official code takes torch's CosineSimilarity, which is exact down to lengths of 1e-8: what
    # a bias with a gradient of 1e-4 moves at SWA's rate of 1e-4
    first, total = W.clone(), torch.tensor([2.0, 1.0, -3.0], dtype=torch.float64)
    for length in (1.0, 1e-3, 1e-6, 1e-7, 2e-8):
        a, b = (length * v / v.abs().min() for v in (first, total))
        cosines = [nn.CosineSimilarity(dim=0)(a[part], b[part]) for part in (slice(2), slice(2, 3))]
        expected = (torch.stack([cosines[0], cosines[0], cosines[1]]) + 1) / 2
        alpha = adaptive_alpha(a, b, LOCAL)
        torch.testing.assert_close(
            alpha, expected, rtol=1e-3, atol=1e-3, msg=lambda m, at=length: f"length {at}: {m}"
        )


def test_adaptive_alpha_is_one_half_where_nothing_moved():
    zero = torch.zeros_like(W)
    assert torch.equal(adaptive_alpha(zero, zero, LOCAL), torch.full_like(W, 0.5))
    assert torch.equal(adaptive_alpha(zero, W, LOCAL), torch.full_like(W, 0.5))


@pytest.mark.parametrize("name", ["sam", "asam", "asam on all"])
def test_perturbations_of_a_cohort_are_those_of_its_clients(name):
    minimizer, _ = ASCENTS[name]
    generator = torch.Generator().manual_seed(1)
    w, g = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    g[3] = 0
    kept = w.clone(), g.clone()
    together = minimizer.perturbation(w, g, LOCAL)
    alone = [minimizer.perturbation(a, b, LOCAL) for a, b in zip(w, g, strict=True)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-14, atol=0)
    assert torch.equal(together[3], torch.zeros(3, dtype=torch.float64))
    assert torch.equal(w, kept[0])
    assert torch.equal(g, kept[1])


class Spy:
    """A gradient that counts its calls and remembers where it was asked."""

    def __init__(self, function):
        self.function = function
        self.points = []

    def __call__(self, w):
        self.points.append(w.clone())
        return self.function(w)


ALL = {
    "sgd": (SGD(), 1),
    "sam": (SAM(0.3), 2),
    "asam": (ASAM(0.3, 0.1), 2),
    "lookbehind": (Lookbehind(SAM(0.3), k=4, slow=0.5), 5),
    "lookbehind asam": (Lookbehind(ASAM(0.3, 0.1), k=2, slow=0.5), 3),
}


@pytest.mark.parametrize("name", ALL)
def test_passes_a_step(name):
    minimizer, passes = ALL[name]
    grad = Spy(lambda w: 2 * w + 1)
    minimizer.step(W, grad, lambda w, g: w - 0.1 * g, LOCAL)
    assert len(grad.points) == passes


def test_no_gradient_leaks_into_the_next_pass_or_step():
    # with a constant gradient the second pass of EVERY step must lie at w + rho g / ||g||
    grad, w = Spy(lambda w: G), W
    for _ in range(3):
        before = w
        w, _ = SAM(0.13).step(w, grad, lambda w, g: w - 0.1 * g, LOCAL)
        torch.testing.assert_close(grad.points[-2], before)
        torch.testing.assert_close(grad.points[-1] - before, 0.13 * unit(G))
        torch.testing.assert_close(before - w, 0.1 * G)


@pytest.mark.parametrize("name", ALL)
def test_inputs_are_never_changed(name):
    minimizer, _ = ALL[name]
    w, g = W.clone(), G.clone()
    method = Method(minimizer, FedProx(0.5), 0.9, 0.1, loss=Plain())
    local = Local(vector_layout(), w, 1, 0.1)
    descend = Descent(method, local)
    for _ in range(2):
        minimizer.step(w, lambda _: g, descend, local)
    assert torch.equal(w, W)
    assert torch.equal(g, G)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_text_serves_a_client_and_a_cohort(name, dtype):
    minimizer, _ = ALL[name]
    curvature = torch.tensor([1.0, 2.0, 5.0], dtype=dtype)
    cohort = torch.stack([W, -2 * W, W + 1, 0 * W]).to(dtype)

    def run(w):
        local = Local(vector_layout(), w, 1, 0.1)
        descend = Descent(Method(minimizer, FedProx(0.1), 0.9, 0.01, loss=Plain()), local)
        for _ in range(3):
            w, _ = minimizer.step(w, lambda w: curvature * w - 1, descend, local)
        return w

    together, alone = run(cohort), torch.stack([run(w) for w in cohort])
    assert together.dtype == dtype
    tight = {torch.float64: 1e-13, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(together, alone, rtol=tight, atol=tight)


def smooth_loss(w):
    """Not quadratic, not convex: a loss whose Hessian changes."""
    a = torch.tensor([[1.0, 0.4, -0.2], [0.3, 2.0, 0.5], [-0.1, 0.2, 0.7]], dtype=torch.float64)
    return torch.tanh(a @ w).square().sum() + (a @ w).sin().sum() + 0.1 * (w**4).sum()


def smooth_grad(w):
    w = w.detach().requires_grad_()
    return torch.autograd.grad(smooth_loss(w), w)[0]


def test_sams_gradient_is_g_plus_rho_h_unit_g_to_second_order():
    point = torch.tensor([0.3, -0.5, 0.8], dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(smooth_loss, point)
    g = smooth_grad(point)
    errors = []
    for rho in (0.08, 0.04, 0.02, 0.01):
        # a descent that returns its gradient
        sams, _ = SAM(rho).step(point, smooth_grad, lambda w, g: g, LOCAL)
        errors.append(float((sams - g - rho * hessian @ unit(g)).norm()))
    ratios = [a / b for a, b in pairwise(errors)]
    assert all(3.6 < ratio < 4.4 for ratio in ratios), ratios


@settings(max_examples=40, deadline=None)
@given(st.floats(0.05, 20.0), st.booleans())
def test_asam_with_eta_0_does_not_see_a_rescaling_of_relu_layers(factor, biases):
    # the weights-only rule leaves biases unscaled, so it is invariant for networks without them
    torch.manual_seed(4)
    layers = [nn.Flatten(), nn.Linear(32, 6, bias=biases), nn.ReLU(), nn.Linear(6, 3, bias=biases)]
    plain = nn.Sequential(*layers).double()
    scaled = copy.deepcopy(plain)
    with torch.no_grad():
        scaled[1].weight.mul_(factor)
        scaled[3].weight.div_(factor)
        if biases:
            scaled[1].bias.mul_(factor)
    x, y = next(iter(batches()))
    losses = []
    for module in (plain, scaled):
        network = FlatModule(copy.deepcopy(module))

        def loss(model):
            return nn.functional.cross_entropy(model.forward(x), y)

        w = network.w.clone()
        local = Local(network.layout, w, 1, 0.1)
        before, g = network.gradient(w, loss)
        e = ASAM(0.5, 0.0, all_parameters=biases).perturbation(w, g, local)
        after, _ = network.gradient(w + e, loss)
        losses.append((float(before), float(after)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0][1] > losses[0][0] + 1e-3  # the perturbation does climb


@pytest.mark.parametrize(
    ("ascent", "options", "says"),
    [(SAM(0.1), {"k": 0}, "k"), (SAM(0.1), {"slow": 1.5}, "slow"), (SGD(), {}, "ascent")],
)
def test_lookbehind_refuses_what_makes_no_sense(ascent, options, says):
    with pytest.raises(ValueError, match=f"^{says}: must be"):
        Lookbehind(ascent, **options)


class Remembers(SGD):
    """A minimizer that keeps a vector in a round."""

    state = ("d",)

    def __init__(self, returns):
        self.returns = returns

    def step(self, w, grad, descend, local):
        return self.returns(descend(w, grad(w)), local)


def written(w, local):
    local.state["d"] = w
    return w, {"d": w}


@pytest.mark.parametrize(
    "returns", [lambda w, _: w, lambda w, _: (w, {}), lambda w, _: (w, {"e": w})]
)
def test_a_step_that_returns_other_than_w_and_its_state_is_refused(returns):
    with pytest.raises(UsageError, match=r"^--minimizer Remembers: step must return .*\{d\}"):
        ours(mlp(), Remembers(returns))


def test_a_step_can_not_write_its_state():
    with pytest.raises(TypeError, match="does not support item assignment"):
        ours(mlp(), Remembers(written))
