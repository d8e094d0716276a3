"""Client losses: float64 twins in pixel space, closed forms, what they contain and leave alone."""

from dataclasses import replace

import pytest
import torch
from cohorts import (
    ENGINES,
    EVERYTHING,
    as_cohort,
    assert_same,
    one_by_one,
    start_of,
    trainer_of,
)
from fedsam.clients.corrections.fedavg import FedAvg
from fedsam.clients.losses.pgd_at import PGDAT
from fedsam.clients.losses.plain import Plain
from fedsam.clients.losses.trades import TRADES
from fedsam.clients.minimizers.late import Late
from fedsam.clients.minimizers.m_sam import MSAM
from fedsam.clients.minimizers.sam import SAM
from fedsam.clients.minimizers.sgd import SGD
from torch import nn
from torch.nn import functional as F

from fedsam.base.errors import UsageError
from fedsam.base.randomness import torch_generator, uniform
from fedsam.base.vector import TINY
from fedsam.config.schema import resolve
from fedsam.data.augment import Crop, Cutout, Flip, Keys, Mixup
from fedsam.data.images import Batch, Images, Pixels
from fedsam.data.plan import Work, make_plan
from fedsam.simulate.build.method import new_method
from fedsam.tasks.classification import Classification
from fedsam.training.attack import Attack
from fedsam.training.batched import Program, why_not
from fedsam.training.client import ClientJob
from fedsam.training.flat_module import FlatModule
from fedsam.training.loop import train_client
from fedsam.training.method import Method, rounds_before

PIXELS = torch.randint(
    0, 256, (9, 2, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)
)
LABELS = torch.arange(9) % 3
MEAN, STD = torch.tensor([0.4, 0.5]).double(), torch.tensor([0.2, 0.3]).double()
WORK = Work(5, augmentations=(Keys(),))  # two steps, of 5 and 4 images
LR = 0.3
LOSSES = pytest.mark.parametrize("loss", [PGDAT, TRADES])


def mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(32, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def convolutional():
    torch.manual_seed(2)
    layers = [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)]
    return nn.Sequential(*layers).double()


def plan(work=WORK):
    return make_plan(torch.arange(9), work, (4, 4), torch_generator(0, "test"))


def ours(network, loss, minimizer=None, labels=LABELS, work=WORK):
    """One client, two steps; returns its state by name, and its loss."""
    images = Images(PIXELS, labels, tuple(MEAN.tolist()), tuple(STD.tolist()), dtype=torch.float64)
    flat = FlatModule(network())
    method = Method(minimizer or SGD(), FedAvg(), loss=loss)
    start = torch.cat([flat.w, flat.carried()])
    done = train_client(flat, start, plan(work), images, Classification(), method, round=1, lr=LR)
    return flat.layout.read(done.state), done.loss


# the naive side: pixels in [0, 1], a hash in Python's integers


def naive_uniform(key, count):
    def scattered(bits):
        bits &= 0xFFFFFFFF
        bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
        bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
        return bits ^ (bits >> 16)

    words = [scattered(scattered(place ^ key) + key) for place in range(count)]
    return [((word >> 9) + 0.5) / 2**23 for word in words]


def normalised(x):
    return (x - MEAN[:, None, None]) / STD[:, None, None]


def naive_attack(objective, x, begin, eps, step, steps):
    adversarial = (x + begin).clamp(x - eps, x + eps).clamp(0, 1)
    for _ in range(steps):
        leaf = adversarial.clone().requires_grad_()
        (g,) = torch.autograd.grad(objective(leaf), leaf)
        adversarial = (adversarial + step * g.sign()).clamp(x - eps, x + eps).clamp(0, 1)
    return adversarial


def naive_pgd_at(model, x, y, u, eps, step, steps):
    def objective(pixels):
        return F.cross_entropy(model(normalised(pixels)), y)

    model.eval()
    worst = naive_attack(objective, x, eps * (2 * u - 1), eps, step, steps)
    model.train()
    return objective(worst)


def naive_trades(model, x, y, u, eps, step, steps, beta):
    def kl(p, q):
        return (p * (p.log() - q.log())).sum()

    def answers(pixels):
        return model(normalised(pixels)).softmax(1)

    begin = 0.001 * torch.special.ndtri(u)
    model.eval()  # as in the authors' trades_loss
    p = answers(x).detach()
    worst = naive_attack(lambda x: kl(p, answers(x)), x, begin, eps, step, steps)
    model.train()
    output = model(normalised(x))
    clean = F.cross_entropy(output, y)
    return clean + beta / len(x) * kl(output.softmax(1), answers(worst))


def naive_client(network, naive_loss, rho=0.0):
    """Two steps of SGD, or of SAM, whose second pass is attacked anew where it is."""
    model = network()
    parameters = list(model.parameters())
    chosen = plan()
    for step in range(2):
        choice = chosen.step(step)
        x, y = PIXELS[choice["index"]].double() / 255, LABELS[choice["index"]]
        u = torch.tensor([naive_uniform(int(key), 32) for key in choice["key"]]).double()
        u = u.view(-1, 2, 4, 4)
        before = [p.detach().clone() for p in parameters]
        g = torch.autograd.grad(naive_loss(model, x, y, u), parameters)
        if rho:
            norm = sum(float(part.square().sum()) for part in g) ** 0.5
            with torch.no_grad():
                for p, part in zip(parameters, g, strict=True):
                    p.add_(rho * part / (norm + TINY))
            g = torch.autograd.grad(naive_loss(model, x, y, u), parameters)
        with torch.no_grad():
            for p, old, part in zip(parameters, before, g, strict=True):
                p.copy_(old - LR * part)
    return model.state_dict()


def assert_agree(mine, theirs, **tolerance):
    assert list(mine) == list(theirs)
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], **tolerance)


@pytest.mark.parametrize("network", [mlp, convolutional])
@pytest.mark.parametrize("rho", [0.0, 0.3], ids=["sgd", "sam"])
def test_pgd_at_is_its_formula(network, rho):
    loss = PGDAT(10, eps=20.0, step=6.0, steps=4)
    mine, _ = ours(network, loss, SAM(rho) if rho else None)
    theirs = naive_client(network, lambda *given: naive_pgd_at(*given, 20 / 255, 6 / 255, 4), rho)
    assert_agree(mine, theirs, rtol=1e-10, atol=1e-12)
    plain, _ = ours(network, Plain(), SAM(rho) if rho else None)
    assert max(float((mine[n] - plain[n]).abs().max()) for n in mine) > 1e-3


@pytest.mark.parametrize("network", [mlp, convolutional])
@pytest.mark.parametrize("rho", [0.0, 0.3], ids=["sgd", "sam"])
def test_trades_is_its_formula(network, rho):
    loss = TRADES(10, eps=20.0, step=6.0, steps=4, beta=2.0)
    mine, _ = ours(network, loss, SAM(rho) if rho else None)
    theirs = naive_client(
        network, lambda *given: naive_trades(*given, 20 / 255, 6 / 255, 4, 2.0), rho
    )
    assert_agree(mine, theirs, rtol=1e-10, atol=1e-12)
    plain, _ = ours(network, Plain(), SAM(rho) if rho else None)
    assert max(float((mine[n] - plain[n]).abs().max()) for n in mine) > 1e-3


def test_on_a_linear_model_of_two_classes_pgd_is_fgsm_in_closed_form():
    """The worst image is x + eps sign(w_other - w_y), clipped, wherever the ascent begins."""

    def linear():
        torch.manual_seed(4)
        return nn.Sequential(nn.Flatten(), nn.Linear(32, 2)).double()

    eps = 30 / 255
    mine, _ = ours(linear, PGDAT(10, eps=30.0, step=60.0, steps=1), labels=LABELS % 2)
    weight, bias = (p.detach().clone() for p in linear().parameters())
    for step in range(2):
        rows = plan().step(step)["index"]
        x, y = PIXELS[rows].double() / 255, LABELS[rows] % 2
        direction = (weight[1 - y] - weight[y]).sign().view(-1, 2, 4, 4)
        worst = normalised((x + eps * direction).clamp(0, 1)).flatten(1)
        errors = (worst @ weight.T + bias).softmax(1) - F.one_hot(y, 2)
        weight = weight - LR * errors.T @ worst / len(y)
        bias = bias - LR * errors.mean(0)
    assert_agree(mine, {"1.weight": weight, "1.bias": bias}, rtol=1e-10, atol=1e-12)


def test_without_a_radius_or_weight_it_is_the_plain_loss():
    plain = ours(mlp, Plain())
    for loss in (PGDAT(10, eps=0), TRADES(10, eps=0), TRADES(10, beta=0)):
        state, value = ours(mlp, loss)
        assert_agree(state, plain[0], rtol=1e-12, atol=1e-13)
        assert value == pytest.approx(plain[1], rel=1e-12)


@LOSSES
def test_a_loss_is_switched_on_late(loss):
    method = Method(Late(SGD(), SAM(0.1), 10, start=0.5), FedAvg(), loss=loss(10, start=0.8))
    switched = [(type(m.minimizer), type(m.loss)) for m in map(method.at, (5, 6, 8, 9))]
    assert switched == [(SGD, Plain), (SAM, Plain), (SAM, Plain), (SAM, loss)]
    assert method.at(9).loss is method.loss


@pytest.mark.parametrize(
    ("start", "before"), [(0, 0), (0.25, 50), (1.0, 200), (1, 1), (175, 175), (175.0, 175)]
)
def test_a_start_is_a_fraction_up_to_one_or_a_round(start, before):
    assert rounds_before(start, 200) == before


@LOSSES
def test_the_attack_leaves_the_batch_statistics_alone(loss):
    """They are those of the passes in training mode: over x', and for TRADES over x before it."""
    mine, _ = ours(
        convolutional, loss(10, eps=16.0, steps=3), work=Work(9, augmentations=(Keys(),))
    )
    assert int(mine["1.num_batches_tracked"]) == (1 if loss is PGDAT else 2)
    model = convolutional()
    model(normalised(PIXELS[plan(Work(9)).indices[0]].double() / 255))
    wide = float((mine["1.running_mean"] - model[1].running_mean).abs().max())
    assert 1e-4 < wide < 0.2  # moved, as x' lies within eps of x


@LOSSES
def test_the_network_is_in_training_mode_again_after_an_attack(loss):
    flat = FlatModule(convolutional())
    flat.module.train()
    x = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    batch = Batch(x, LABELS[:4], keys=torch.arange(4), pixels=Pixels(0.1, -5.0, 5.0))
    flat.gradient(flat.w.clone(), lambda model: loss(10).value(model, batch, Classification()))
    assert flat.module.training
    assert flat.module[1].training
    assert all(p.grad is None for p in flat.module.parameters())


def test_the_attack_stays_in_the_cube_and_among_true_pixels_and_climbs():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(5, 2, 3, 3, generator=generator, dtype=torch.float64)
    centre = torch.rand(5, 2, 3, 3, generator=generator, dtype=torch.float64)

    def value(images):
        return ((images - centre) ** 2).sum()

    worst = Attack(51.0, 10.0, 20).worst(x, value, torch.zeros_like(x), Pixels())
    assert float((worst - x).abs().max()) <= 0.2 + 1e-12
    assert float(worst.min()) >= 0
    assert float(worst.max()) <= 1
    away = (x - centre).sign()  # the ascent of a parabola goes away from its centre
    torch.testing.assert_close(worst, (x + 0.2 * away).clamp(0, 1))
    assert not worst.requires_grad


@LOSSES
@pytest.mark.parametrize("wrong", [{"eps": -1.0}, {"step": -1.0}, {"steps": -1}, {"start": -0.5}])
def test_a_wrong_option_is_named(loss, wrong):
    (name,) = wrong
    key = "pgd_at" if loss is PGDAT else "trades"
    with pytest.raises(UsageError, match=f"--loss-options: {loss.__name__}: {name}: must be"):
        new_method(resolve({"loss": key, "loss_options": wrong}))


def test_keys_give_even_and_independent_numbers_the_same_as_in_plain_integers():
    keys = torch.randint(0, 2**31, (200,), generator=torch.Generator().manual_seed(1))
    u = uniform(keys, (3, 4, 4), torch.float64)
    assert u.shape == (200, 3, 4, 4)
    assert u[7].flatten().tolist() == naive_uniform(int(keys[7]), 48)
    assert torch.equal(uniform(keys.view(20, 10), (3, 4, 4), torch.float64).flatten(0, 1), u)
    n = u.numel()
    assert float(u.min()) > 0
    assert float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 4 * (1 / 12 / n) ** 0.5
    counts = torch.histc(u, 16, 0, 1)
    assert float(((counts - n / 16) ** 2 / (n / 16)).sum()) < 37.7  # chi-square, 15 df, 0.1 %
    flat = u.flatten(1) - 0.5
    between = (flat[:-1] * flat[1:]).mean() * 12  # neighbouring keys, then neighbouring places
    within = (flat[:, :-1] * flat[:, 1:]).mean() * 12
    assert abs(float(between)) < 4 / n**0.5
    assert abs(float(within)) < 4 / n**0.5
    assert float(uniform(keys, (48,), torch.float32).max()) < 1


def test_keys_do_not_change_the_rest_of_a_plan():
    work = Work(4, augmentations=(Crop(1), Flip(), Cutout(2), Mixup(1.0)))
    without, with_keys = (
        plan(w) for w in (work, replace(work, augmentations=(*work.augmentations, Keys())))
    )
    assert set(with_keys.choices) - set(without.choices) == {"key"}
    for name, value in without.choices.items():
        assert torch.equal(value, with_keys.choices[name]), name
    keys = with_keys.choices["key"]
    assert keys.shape == with_keys.indices.shape
    assert len(keys.unique()) == keys.numel()


@ENGINES
@pytest.mark.parametrize("minimizer", [SAM(0.1), MSAM(0.1, 3)], ids=["sam", "msam"])
@LOSSES
def test_in_a_cohort_it_is_the_same_as_one_by_one(gradients, minimizer, loss):
    """Ragged clients, mixup and all augmentations; the round after a switch, too."""
    method = Method(minimizer, FedAvg(), 0.9, loss=loss(2, eps=10.0, step=4.0, steps=2, start=1))
    trainer = trainer_of(
        method, work=replace(EVERYTHING, augmentations=(*EVERYTHING.augmentations, Keys()))
    )
    trainers, state = [trainer] * 5, start_of(trainer)
    program = Program(trainers, gradients, capture=False)
    for round in (1, 2):
        jobs = [ClientJob(client, state, round, 0.02) for client in (4, 1, 0, 3, 2)]
        assert_same(as_cohort(trainers, jobs, gradients, program), one_by_one(trainers, jobs))
    assert why_not([trainer], gradients, 2) == ""


@LOSSES
def test_a_run_repeats_to_the_byte_on_any_number_of_threads(quick, loss):
    name = "pgd_at" if loss is PGDAT else "trades"
    given = {"loss": name, "loss_options": {"steps": 2, "start": 0.5}, "rounds": 4}
    ends = [quick(**given, threads=n).folder / "model.safetensors" for n in (1, 2)]
    assert ends[0].read_bytes() == ends[1].read_bytes()
    plain = quick(rounds=4).folder / "model.safetensors"
    assert plain.read_bytes() != ends[0].read_bytes()
