"""The local loop around the formulas: rounds, losses, statistics, mixup, what is left alone."""

import copy
import math
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

from fedsam.base.randomness import torch_generator
from fedsam.data.augment import Cutout, Flip, Mixup
from fedsam.data.images import Images
from fedsam.data.plan import Work, make_plan
from fedsam.tasks.classification import Classification
from fedsam.training.flat_module import FlatModule
from fedsam.training.loop import train_client
from fedsam.training.method import Correction, Method

PIXELS = torch.randint(0, 256, (9, 1, 4, 4), generator=torch.Generator().manual_seed(3))
LABELS = torch.arange(9) % 3
X = (PIXELS.double() / 255 - 0.4) / 0.25

SAM_ASCENT = partial(naive.sam_ascent, rho=0.2)
TWINS = {
    "sgd": (SGD(), naive.train),
    "sam": (SAM(0.2), partial(naive.train, ascent=SAM_ASCENT)),
    "asam": (
        ASAM(0.5, 0.1),
        partial(naive.train, ascent=partial(naive.asam_ascent, rho=0.5, eta=0.1)),
    ),
    "lookbehind": (
        Lookbehind(SAM(0.2), k=3, slow=-1.0),
        partial(naive.lookbehind, k=3, slow=-1.0, ascent=SAM_ASCENT),
    ),
}
twins = pytest.mark.parametrize("name", TWINS)


def plain():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3)).double()


def normalised():
    torch.manual_seed(2)
    layers = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)]
    return nn.Sequential(*layers).double()


def plan_of(work, round=1):
    return make_plan(torch.arange(9), work, (4, 4), torch_generator(0, "test", round))


def images():
    return Images(PIXELS.to(torch.uint8), LABELS, (0.4,), (0.25,), dtype=torch.float64)


def go(network, state, minimizer, plan=None, client=None, *, lr=0.3, round=1, **base):
    method = Method(minimizer, client or FedAvg(), **base, loss=Plain())
    plan = plan_of(Work(4)) if plan is None else plan
    done = train_client(
        network, state, plan, images(), Classification(), method, round=round, lr=lr
    )
    return done.state, done.loss


def batches(plan):
    """The plan's mini-batches by plain tensor code, mixed where the plan says so."""
    targets = nn.functional.one_hot(LABELS, 3).double()
    for step, size in enumerate(plan.sizes):
        rows = plan.indices[step, :size]
        x, y = X[rows], targets[rows]
        if "partner" in plan.choices:
            lam, order = float(plan.choices["lambda"][step, 0]), plan.step(step)["partner"]
            x, y = lam * x + (1 - lam) * x[order], lam * y + (1 - lam) * y[order]
        yield x, y


def assert_state_is(layout, state, model, only=None):
    ours = layout.read(state)
    for name, tensor in model.state_dict().items():
        if only is None or name in only:
            assert ours[name].dtype == tensor.dtype
            torch.testing.assert_close(ours[name], tensor, rtol=1e-11, atol=1e-13)


@twins
def test_batchnorm_trains_as_in_pytorch(name):
    minimizer, train = TWINS[name]
    module = normalised()
    network, model = FlatModule(copy.deepcopy(module)), copy.deepcopy(module)
    network.module.eval()  # whatever it was used for before
    plan = plan_of(Work(4))
    assert plan.sizes == [4, 4, 1]
    state, _ = go(network, network.state.clone(), minimizer, plan, momentum=0.9)
    train(model, batches(plan), lr=0.3, momentum=0.9)
    if name == "lookbehind":  # k + 1 passes in place of 2 k: the same w, other statistics
        assert_state_is(network.layout, state, model, only=dict(model.named_parameters()))
        assert network.layout.read(state)["1.num_batches_tracked"] == 3 * (3 + 1)
    else:  # statistics are updated in every pass
        assert_state_is(network.layout, state, model)


@twins
def test_each_round_starts_a_new_optimiser_and_a_new_anchor(name):
    minimizer, train = TWINS[name]
    module = plain()
    network, model = FlatModule(copy.deepcopy(module)), copy.deepcopy(module)
    state = network.state.clone()
    base = {"momentum": 0.9, "weight_decay": 0.05}
    for round in (1, 2, 3):
        plan = plan_of(Work(4, 2.0), round)
        state, _ = go(network, state, minimizer, plan, FedProx(0.3), round=round, **base)
        train(model, batches(plan), lr=0.3, mu=0.3, **base)
    assert_state_is(network.layout, state, model)


@twins
def test_mixup_trains_on_both_labels_in_every_pass(name):
    minimizer, train = TWINS[name]
    module = plain()
    network, model = FlatModule(copy.deepcopy(module)), copy.deepcopy(module)
    plan = plan_of(Work(4, 2.0, augmentations=(Mixup(0.7),)))
    state, _ = go(network, network.state.clone(), minimizer, plan)
    train(model, batches(plan), lr=0.3)
    assert_state_is(network.layout, state, model)


@pytest.mark.parametrize("mixup", [(), (Mixup(0.7),)])
@twins
def test_the_loss_is_the_mean_over_steps_before_each_and_unperturbed(name, mixup):
    minimizer, train = TWINS[name]
    module = plain()
    plan = plan_of(Work(4, augmentations=mixup))
    model, losses = copy.deepcopy(module), []
    for x, y in batches(plan):
        losses.append(nn.functional.cross_entropy(model(x), y).item())
        train(model, [(x, y)], lr=0.3)
    network = FlatModule(module)
    _, loss = go(network, network.state.clone(), minimizer, plan)
    assert loss == pytest.approx(sum(losses) / 3, rel=1e-12)


@twins
def test_what_the_network_did_before_does_not_matter(name):
    minimizer, _ = TWINS[name]
    network = FlatModule(normalised())
    state = network.state.clone()
    first, _ = go(network, state, minimizer, momentum=0.9)
    kept = first.clone()
    go(network, 2 * state + 1, minimizer, plan_of(Work(2, 3.0)), FedProx(0.5), momentum=0.9)
    network.module.eval()
    again, _ = go(network, state, minimizer, momentum=0.9)
    assert torch.equal(first, kept)  # another client's training does not reach it
    assert torch.equal(again, kept)


@twins
def test_state_plan_and_images_keep_their_bytes(name):
    minimizer, _ = TWINS[name]
    network = FlatModule(normalised())
    state, data = network.state.clone(), images()
    plan = plan_of(Work(4, 2.0, augmentations=(Flip(), Cutout(2), Mixup(1.0))))
    given = [state, data.padded, data.targets, data.offset, data.factor]
    given += plan.choices.values()
    before = [tensor.clone() for tensor in given]
    method = Method(minimizer, FedProx(0.1), 0.9, 0.1, loss=Plain())
    train_client(network, state, plan, data, Classification(), method, round=1, lr=0.3)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


@pytest.mark.parametrize("base", [{}, {"momentum": 0.9, "weight_decay": 0.1}], ids=str)
@twins
def test_a_zero_rate_is_the_identity(name, base):
    network = FlatModule(plain())
    state = network.state.clone()
    trained, loss = go(network, state, TWINS[name][0], client=FedProx(0.1), lr=0.0, **base)
    assert torch.equal(trained, state)
    assert loss > 0


def test_no_steps_leave_the_state_and_say_that_there_is_no_loss():
    network = FlatModule(plain())
    state = network.state.clone()
    trained, loss = go(network, state, SGD(), plan_of(Work(4, 0.0)))
    assert torch.equal(trained, state)
    assert math.isnan(loss)


class Watcher(Correction):
    """A client without correction that remembers what it is told."""

    def __init__(self):
        self.seen = []

    def correct(self, w, g, local):
        self.seen.append((w.clone(), local.anchor.clone(), local.round, local.lr))
        return g


def test_a_client_is_told_the_round_the_rate_and_the_global_model():
    network, watcher = FlatModule(plain()), Watcher()
    state = network.state.clone()
    go(network, state, SAM(0.2), client=watcher, round=17, lr=0.25)
    assert [(r, lr) for _, _, r, lr in watcher.seen] == [(17, 0.25)] * 3
    assert all(torch.equal(anchor, state) for _, anchor, _, _ in watcher.seen)
    points = [w for w, *_ in watcher.seen]
    assert torch.equal(points[0], state)
    # it is asked at the weights themselves, not at the perturbed ones
    single, _ = go(network, state, SAM(0.2), plan_of(Work(4, local_steps=1)), lr=0.25)
    assert torch.equal(points[1], single)


def test_fp32_stays_fp32_and_near_fp64():
    module = plain()
    double = FlatModule(copy.deepcopy(module))
    single = FlatModule(copy.deepcopy(module).float())
    data = Images(PIXELS.to(torch.uint8), LABELS, (0.4,), (0.25,))
    for minimizer, _ in TWINS.values():
        method = Method(minimizer, FedAvg(), 0.9, 0.01, loss=Plain())
        exact, _ = go(
            double,
            double.layout.write(module.state_dict()),
            minimizer,
            momentum=0.9,
            weight_decay=0.01,
        )
        start = single.layout.write(module.state_dict())
        trained, *_ = train_client(
            single, start, plan_of(Work(4)), data, Classification(), method, round=1, lr=0.3
        )
        assert trained.dtype == torch.float32
        torch.testing.assert_close(trained.double(), exact, rtol=1e-3, atol=1e-5)
