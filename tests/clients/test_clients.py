"""Clients: FedProx against its objective, its twin and its closed form."""

import copy
from functools import partial

import naive
import pytest
import torch
from fedsam.clients.corrections.fedavg import FedAvg
from fedsam.clients.corrections.fedprox import FedProx
from fedsam.clients.losses.plain import Plain
from fedsam.clients.minimizers.asam import ASAM
from fedsam.clients.minimizers.lookbehind import Lookbehind
from fedsam.clients.minimizers.sam import SAM
from fedsam.clients.minimizers.sgd import SGD
from torch import nn

from fedsam.training.flat_module import FlatModule
from fedsam.training.method import Descent, Local, Method

MODULE = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
GENERATOR = torch.Generator().manual_seed(5)
X = torch.randn(8, 3, generator=GENERATOR, dtype=torch.float64)
Y = torch.arange(8) % 2
REPLICA = FlatModule(copy.deepcopy(MODULE))
LAYOUT = REPLICA.layout
ANCHOR = REPLICA.w.clone()
LOCAL = Local(LAYOUT, ANCHOR, 1, 0.1)

MINIMIZERS = {
    "sgd": SGD(),
    "sam": SAM(0.2),
    "asam": ASAM(0.5, 0.1),
    "lookbehind": Lookbehind(ASAM(0.2, 0.1), k=3, slow=0.5),
}


def grad(w):
    return REPLICA.gradient(w, lambda model: nn.functional.cross_entropy(model.forward(X), Y))[1]


def test_fedavg_follows_the_gradient_as_it_is():
    g = grad(ANCHOR)
    assert torch.equal(FedAvg().correct(ANCHOR + 1, g, LOCAL), g)


def test_fedprox_is_the_gradient_of_its_objective():
    w = (ANCHOR + 0.3 * torch.randn(ANCHOR.shape, generator=GENERATOR)).requires_grad_()
    tensors = {entry.name: entry.view(w) for entry in LAYOUT.parameters}
    output = torch.func.functional_call(MODULE, tensors, X)
    objective = nn.functional.cross_entropy(output, Y) + 0.7 / 2 * (w - ANCHOR).square().sum()
    (expected,) = torch.autograd.grad(objective, w)
    w = w.detach()
    ours = FedProx(0.7).correct(w, grad(w), LOCAL)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


def test_fedprox_corrects_each_row_of_a_cohort_against_the_one_anchor():
    W = ANCHOR + torch.randn(5, len(ANCHOR), generator=GENERATOR, dtype=torch.float64)
    G = torch.randn(W.shape, generator=GENERATOR, dtype=torch.float64)
    given = W.clone(), G.clone(), ANCHOR.clone()
    together = FedProx(0.7).correct(W, G, LOCAL)
    alone = [FedProx(0.7).correct(w, g, LOCAL) for w, g in zip(W, G, strict=True)]
    assert torch.equal(together, torch.stack(alone))
    assert all(torch.equal(a, b) for a, b in zip(given, (W, G, ANCHOR), strict=True))


def test_fedprox_under_a_constant_gradient_has_its_closed_form():
    # w_t - w_0 = -(1 - (1 - lr mu)^t) g / mu
    g, mu, lr, w = torch.linspace(-1, 2, len(ANCHOR), dtype=torch.float64), 0.8, 0.25, ANCHOR
    descend = Descent(Method(SGD(), FedProx(mu), loss=Plain()), Local(LAYOUT, ANCHOR, 1, lr))
    for t in range(1, 7):
        w, _ = SGD().step(w, lambda _: g, descend, LOCAL)
        expected = ANCHOR - (1 - (1 - lr * mu) ** t) * g / mu
        torch.testing.assert_close(w, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["sgd", "sam", "asam"])
def test_the_first_step_from_the_anchor_is_fedavgs(name):
    # the proximal term is zero at the unperturbed w; at w + e it would not be
    minimizer = MINIMIZERS[name]
    steps = [
        minimizer.step(
            ANCHOR, grad, Descent(Method(minimizer, client, loss=Plain()), LOCAL), LOCAL
        )[0]
        for client in (FedAvg(), FedProx(10.0))
    ]
    assert torch.equal(*steps)


@pytest.mark.parametrize("slow", [0.5, -1.0])
@pytest.mark.parametrize("base", [{}, {"momentum": 0.9, "weight_decay": 0.1}], ids=str)
def test_fedprox_acts_at_lookbehinds_fast_weights(slow, base):
    minimizer = Lookbehind(ASAM(0.2, 0.1), k=3, slow=slow)
    descend, w = Descent(Method(minimizer, FedProx(0.7), **base, loss=Plain()), LOCAL), ANCHOR
    for _ in range(4):
        w, _ = minimizer.step(w, grad, descend, LOCAL)
    model = copy.deepcopy(MODULE)
    ascent = partial(naive.asam_ascent, rho=0.2, eta=0.1)
    naive.lookbehind(model, [(X, Y)] * 4, lr=0.1, k=3, slow=slow, ascent=ascent, mu=0.7, **base)
    torch.testing.assert_close(w, LAYOUT.write(model.state_dict()), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", MINIMIZERS)
def test_without_strength_fedprox_is_fedavg_to_the_bit(name):
    minimizer, ends = MINIMIZERS[name], []
    for client in (FedAvg(), FedProx(0.0)):
        descend, w = Descent(Method(minimizer, client, 0.9, 0.01, loss=Plain()), LOCAL), ANCHOR
        for _ in range(3):
            w, _ = minimizer.step(w, grad, descend, LOCAL)
        ends.append(w)
    assert torch.equal(*ends)


def test_a_negative_strength_is_refused():
    with pytest.raises(ValueError, match=r"^mu: must be at least 0, got -0\.1"):
        FedProx(-0.1)
