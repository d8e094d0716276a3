"""SAM's family and the base optimisers: naive float64 twins over rounds, and what they contain."""

import copy
from functools import partial

import naive
import pytest
import torch
from fedsam.clients.corrections.fedavg import FedAvg
from fedsam.clients.losses.plain import Plain
from fedsam.clients.minimizers.asam import ASAM
from fedsam.clients.minimizers.friendly_sam import FriendlySAM
from fedsam.clients.minimizers.gsam import GSAM
from fedsam.clients.minimizers.late import Late
from fedsam.clients.minimizers.lookbehind import Lookbehind
from fedsam.clients.minimizers.looksam import LookSAM
from fedsam.clients.minimizers.m_sam import MSAM
from fedsam.clients.minimizers.multistep_sam import MultistepSAM
from fedsam.clients.minimizers.sam import SAM
from fedsam.clients.minimizers.sgd import SGD
from fedsam.clients.minimizers.vasso import VaSSO
from torch import nn

from fedsam.base.errors import UsageError
from fedsam.base.randomness import torch_generator
from fedsam.base.vector import weighted_mean
from fedsam.config.schema import resolve
from fedsam.data.images import Images
from fedsam.data.plan import Work, make_plan
from fedsam.simulate.build.method import new_method
from fedsam.tasks.classification import Classification
from fedsam.training.flat_module import FlatModule
from fedsam.training.loop import train_client
from fedsam.training.method import Method, Minimizer

PIXELS = torch.randint(0, 256, (20, 2, 4, 4), generator=torch.Generator().manual_seed(3))
LABELS = torch.arange(20) % 3
X = (PIXELS.double() / 255 - 0.4) / 0.25
CLIENTS = (torch.arange(13), torch.arange(13, 20))  # 4 + 4 + 4 + 1 and 4 + 3 images
WORK = Work(4, 2.0)
ROUNDS = 2
PLAIN = partial(torch.optim.SGD, lr=0.1)


def network():
    torch.manual_seed(2)
    layers = [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 2, padding=1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(3 * 9, 3)).double()


def normalised():
    torch.manual_seed(2)
    layers = [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)]
    return nn.Sequential(*layers).double()


def plan(client, round):
    return make_plan(CLIENTS[client], WORK, (4, 4), torch_generator(0, "test", round, client))


def ours(method, rounds=ROUNDS, lr=0.1):
    """Two clients of FedAvg, by fedsam."""
    if not isinstance(method, Method):
        method = Method(method, FedAvg(), loss=Plain())
    flat = FlatModule(network())
    state = flat.state.clone()
    images = Images(PIXELS.to(torch.uint8), LABELS, (0.4,) * 2, (0.25,) * 2, dtype=torch.float64)
    for round in range(1, rounds + 1):
        ends = [
            train_client(
                *(flat, state, plan(client, round), images, Classification(), method),
                round=round,
                lr=lr,
            ).state
            for client in (0, 1)
        ]
        state = weighted_mean(ends, [len(rows) for rows in CLIENTS])
    return flat.layout.read(state)


def theirs(step, optimiser=PLAIN, **options):
    """The same by plain tensor code."""

    def clients(round):
        for client in (0, 1):
            drawn = plan(client, round)
            rows = [drawn.indices[t, :size] for t, size in enumerate(drawn.sizes)]
            yield [(X[r], LABELS[r]) for r in rows]

    model = network()
    naive.federate(model, clients, step, rounds=ROUNDS, optimiser=optimiser, **options)
    return model.state_dict()


def assert_agree(a, b, rtol=1e-10):
    assert set(a) == set(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=1e-12)


def apart(a, b):
    return max(float((a[name] - b[name]).abs().max()) for name in a)


ASCENT = partial(naive.sam_ascent, rho=0.2)
ADAPTIVE = partial(naive.asam_ascent, rho=0.5, eta=0.1)
TWINS = {
    "sgd": (SGD(), naive.step_sgd),
    "sam": (SAM(0.2), partial(naive.step_sam, ascent=ASCENT)),
    "asam filter-wise": (
        ASAM(0.5, 0.1, filterwise=True),
        partial(naive.step_sam, ascent=partial(ADAPTIVE, filterwise=True)),
    ),
    "asam p = inf": (
        ASAM(0.05, 0.1, p="inf"),
        partial(naive.step_sam, ascent=partial(ADAPTIVE, rho=0.05, p_is_inf=True)),
    ),
    "asam filter-wise p = inf on all": (
        ASAM(0.05, 0.1, all_parameters=True, filterwise=True, p="inf"),
        partial(
            naive.step_sam,
            ascent=partial(ADAPTIVE, rho=0.05, p_is_inf=True, filterwise=True, all_parameters=True),
        ),
    ),
    "multistep": (
        MultistepSAM(SAM(0.1), k=3),
        partial(naive.step_multistep, k=3, ascent=partial(ASCENT, rho=0.1)),
    ),
    "multistep asam": (
        MultistepSAM(ASAM(0.5, 0.1), k=2),
        partial(naive.step_multistep, k=2, ascent=ADAPTIVE),
    ),
    "late": (
        Late(SGD(), SAM(0.2), ROUNDS, start=1),
        partial(naive.step_late, after=1, ascent=ASCENT),
    ),
    "friendly": (
        FriendlySAM(0.2, sigma=0.7, lam=0.6),
        partial(naive.step_friendly, rho=0.2, sigma=0.7, lam=0.6),
    ),
    "vasso": (VaSSO(0.2, theta=0.4), partial(naive.step_vasso, rho=0.2, theta=0.4)),
    "gsam": (GSAM(0.2, alpha=0.4), partial(naive.step_gsam, rho=0.2, alpha=0.4)),
    "looksam": (
        LookSAM(0.2, k=3, alpha=0.7),
        partial(naive.step_looksam, rho=0.2, k=3, alpha=0.7),
    ),
    "msam": (MSAM(0.2, m=3), partial(naive.step_msam, rho=0.2, m=3)),
}
OPTIMISERS = {
    "momentum": (
        {"momentum": 0.9, "weight_decay": 0.05},
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.05),
    ),
    "nesterov": (
        {"optimizer": "nesterov", "momentum": 0.9, "weight_decay": 0.05},
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.05, nesterov=True),
    ),
    "adamw": (
        {"optimizer": "adamw", "weight_decay": 0.05},
        partial(torch.optim.AdamW, lr=0.1, weight_decay=0.05),
    ),
}


@pytest.mark.parametrize("name", TWINS)
def test_two_rounds_of_two_clients_are_the_formulas(name):
    minimizer, step = TWINS[name]
    assert_agree(ours(minimizer), theirs(step))


@pytest.mark.parametrize("base", OPTIMISERS)
@pytest.mark.parametrize("name", ["sgd", "sam", "looksam", "msam"])
def test_base_optimisers_are_pytorchs_under_any_minimiser(name, base):
    minimizer, step = TWINS[name]
    options, optimiser = OPTIMISERS[base]
    # AdamW divides by |g|: where a gradient is nearly zero, its rounding is what is seen
    rtol = 1e-6 if base == "adamw" else 1e-9
    assert_agree(
        ours(Method(minimizer, FedAvg(), **options, loss=Plain())),
        theirs(step, optimiser),
        rtol=rtol,
    )


@pytest.mark.parametrize("name", ["sam", "asam filter-wise", "gsam", "msam"])
def test_decay_in_the_loss_enters_every_gradient(name):
    minimizer, step = TWINS[name]
    method = Method(minimizer, FedAvg(), 0.9, 0.1, decay_in_loss=True, loss=Plain())
    optimiser = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    inside = ours(method)
    assert_agree(inside, theirs(step, optimiser, decay_in_loss=0.1))
    assert apart(inside, ours(Method(minimizer, FedAvg(), 0.9, 0.1, loss=Plain()))) > 1e-4


def test_for_sgd_it_makes_no_difference_where_the_decay_is():
    inside = ours(Method(SGD(), FedAvg(), 0.9, 0.1, decay_in_loss=True, loss=Plain()))
    assert_agree(inside, ours(Method(SGD(), FedAvg(), 0.9, 0.1, loss=Plain())), rtol=1e-12)


SAM_ = SAM(0.2)
REDUCTIONS = {
    "multistep, k = 1": (MultistepSAM(SAM(0.2), k=1), SAM_),
    "multistep asam, k = 1": (MultistepSAM(ASAM(0.5, 0.1), k=1), ASAM(0.5, 0.1)),
    "lookbehind, k = 1, slow = 1": (Lookbehind(SAM(0.2), k=1, slow=1.0), SAM_),
    "late, from the start": (Late(SGD(), SAM(0.2), ROUNDS, start=0), SAM_),
    "late, never": (Late(SGD(), SAM(0.2), ROUNDS, start=ROUNDS), SGD()),
    "friendly, sigma = 0": (FriendlySAM(0.2, sigma=0.0), SAM_),
    "vasso, theta = 1": (VaSSO(0.2, theta=1.0), SAM_),
    "gsam, alpha = 0": (GSAM(0.2, alpha=0.0), SAM_),
    "looksam, k = 1": (LookSAM(0.2, k=1), SAM_),
    "msam, m = n": (MSAM(0.2, m=4), SAM_),
    "msam, m > n": (MSAM(0.2, m=64), SAM_),
    "asam, p = 2 in full": (ASAM(0.5, 0.1, p=2, filterwise=False), ASAM(0.5, 0.1)),
    **{
        f"{name}, rho = 0": (minimizer, SGD())
        for name, minimizer in {
            "multistep": MultistepSAM(SAM(0.0), k=3),
            "asam filter-wise": ASAM(0.0, 0.1, filterwise=True),
            "asam p = inf": ASAM(0.0, 0.1, p="inf"),
            "friendly": FriendlySAM(0.0),
            "vasso": VaSSO(0.0),
            "gsam": GSAM(0.0),
            "msam": MSAM(0.0, m=3),
            "late": Late(SGD(), ASAM(0.0, 0.1), ROUNDS, start=1),
        }.items()
    },
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_each_becomes_the_simpler_method_that_it_contains(name):
    minimizer, simpler = REDUCTIONS[name]
    assert_agree(ours(minimizer), ours(simpler), rtol=1e-11)


def test_looksam_with_alpha_0_is_sgd_between_sams():
    count = iter(range(100))

    class Alternating(Minimizer):
        def step(self, w, grad, descend, local):
            minimizer = SAM(0.2) if local.step % 3 == 0 else SGD()
            next(count)
            return minimizer.step(w, grad, descend, local)

    assert_agree(ours(LookSAM(0.2, k=3, alpha=0.0)), ours(Alternating()), rtol=1e-12)
    assert next(count) == ROUNDS * (8 + 4)  # steps of both clients


class Counting(Minimizer):
    """Counts the passes of each step of the minimiser that it wraps."""

    def __init__(self, minimizer):
        self.minimizer = minimizer
        self.state = minimizer.state
        self.passes = []

    def step(self, w, grad, descend, local):
        self.passes.append(0)

        def counted(w):
            self.passes[-1] += 1
            return grad(w)

        return self.minimizer.step(w, counted, descend, local)


@pytest.mark.parametrize(
    ("minimizer", "passes"),
    [
        (MultistepSAM(SAM(0.1), k=4), [5] * 12),
        (FriendlySAM(0.1), [2] * 12),
        (VaSSO(0.1), [2] * 12),
        (GSAM(0.1), [2] * 12),
        (LookSAM(0.1, k=3), [2, 1, 1, 2, 1, 1, 2, 1, 2, 1, 1, 2]),
    ],
    ids=lambda v: type(v).__name__,
)
def test_passes_a_step(minimizer, passes):
    counting = Counting(minimizer)
    ours(counting, rounds=1)
    assert counting.passes == passes


@pytest.mark.parametrize(
    ("start", "rounds", "last_of_first"), [(0.75, 8, 6), (0.75, 10, 7), (3, 8, 3), (0, 8, 0)]
)
def test_late_starts_by_round_or_by_fraction(start, rounds, last_of_first):
    late = Late(SGD(), ASAM(0.1, 0.1), rounds, start=start)
    kinds = [type(late.at(round)) for round in range(1, rounds + 1)]
    assert kinds == [SGD] * last_of_first + [ASAM] * (rounds - last_of_first)


def test_late_takes_any_two_minimisers_and_their_options_from_the_config():
    options = {"first": "lookbehind", "then": "vasso", "start": 0.5, "theta": 0.4, "k": 3}
    config = resolve({"minimizer": "late", "minimizer_options": options, "rounds": 9, "rho": 0.3})
    method = new_method(config)
    first, then = method.at(4).minimizer, method.at(5).minimizer
    assert (type(first), first.k, first.ascent.rho) == (Lookbehind, 3, 0.3)
    assert (type(then), then.theta, then.rho) == (VaSSO, 0.4, 0.3)


@pytest.mark.parametrize(
    ("minimizer", "options", "says"),
    [
        ("late", {"momentun": 1}, "neither late nor sgd nor sam has an option 'momentun'"),
        ("late", {"then": "nosuch"}, "no 'nosuch'"),
        ("late", {"start": -1}, "start: must be at least 0"),
        ("multistep-sam", {"k": 0}, "k: must be at least 1"),
        ("multistep-sam", {"ascent": "sgd"}, "ascent: must be"),
        ("friendly-sam", {"lam": 1.0}, "lam: must be"),
        ("vasso", {"theta": 0.0}, "theta: must be"),
        ("looksam", {"k": 0}, "k: must be at least 1"),
        ("m-sam", {"m": 0}, "m: must be at least 1"),
        ("asam", {"p": 3}, "p: must be 2 or inf"),
    ],
)
def test_options_that_make_no_sense_are_refused(minimizer, options, says):
    with pytest.raises(UsageError, match=says):
        new_method(resolve({"minimizer": minimizer, "minimizer_options": options}))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"optimizer": "nesterov"}, "--optimizer nesterov: needs a --momentum"),
        ({"optimizer": "adamw", "momentum": 0.9}, "--optimizer adamw: goes without"),
        ({"optimizer": "adamw", "decay_in_loss": True}, "--optimizer adamw: goes without"),
    ],
)
def test_base_optimisers_refuse_what_they_have_no_use_for(given, says):
    with pytest.raises(UsageError, match=says):
        resolve(given)


def test_the_config_reaches_the_method():
    given = {"optimizer": "nesterov", "momentum": 0.5, "decay_in_loss": True, "bn_first_pass": True}
    method = new_method(resolve(given))
    assert (method.optimizer, method.momentum) == ("nesterov", 0.5)
    assert method.decay_in_loss
    assert method.first_pass_statistics


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", ["sgd", "sam", "multistep"])
def test_batchnorm_statistics_of_the_first_pass_or_of_all(name, first):
    minimizer, step = TWINS[name]
    module = normalised()
    flat, model = FlatModule(copy.deepcopy(module)), copy.deepcopy(module)
    images = Images(PIXELS.to(torch.uint8), LABELS, (0.4,) * 2, (0.25,) * 2, dtype=torch.float64)
    drawn = plan(1, 1)
    method = Method(minimizer, FedAvg(), first_pass_statistics=first, loss=Plain())
    state = train_client(
        *(flat, flat.state.clone(), drawn, images, Classification(), method), round=1, lr=0.1
    ).state
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for t, size in enumerate(drawn.sizes):
        rows, before, passes = drawn.indices[t, :size], naive.values(model), []

        def gradient(x, y, passes=passes):
            kept = {name: b.clone() for name, b in model.named_buffers()}
            g = naive.gradients(model, x, y)
            if first and passes:
                for name, b in model.named_buffers():
                    b.copy_(kept[name])
            passes.append(1)
            return g

        descent = step(model, gradient, (X[rows], LABELS[rows]), {}, t, round=1)
        naive.assign(model, before)
        naive.use(model, descent)
        optimiser.step()
    assert_agree(flat.layout.read(state), model.state_dict())
    passes = {"sgd": 1, "sam": 2, "multistep": 4}[name]
    counted = int(flat.layout.read(state)["1.num_batches_tracked"])
    assert counted == len(drawn) * (1 if first else passes)


def test_the_loss_of_a_mini_batch_in_parts_is_its_mean_loss():
    losses = []
    for minimizer in (SAM(0.0), MSAM(0.0, m=3)):
        flat = FlatModule(network())
        data = Images(PIXELS.to(torch.uint8), LABELS, (0.4,) * 2, (0.25,) * 2, dtype=torch.float64)
        losses.append(
            train_client(
                *(flat, flat.state.clone(), plan(0, 1), data, Classification()),
                Method(minimizer, FedAvg(), loss=Plain()),
                round=1,
                lr=0.1,
            ).loss
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_options_by_name_become_minimizers_made_of_minimizers():
    options = {"then": "lookbehind", "ascent": "asam", "k": 2, "eta": 0.3, "start": 1}
    keys = {"minimizer": "late", "minimizer_options": options, "rho": 0.4, "rounds": 5}
    method = new_method(resolve(keys))
    assert type(method.at(1).minimizer) is SGD
    then = method.at(2).minimizer
    assert (type(then), then.k, then.slow) == (Lookbehind, 2, 0.5)
    assert (type(then.ascent), then.ascent.rho, then.ascent.eta) == (ASAM, 0.4, 0.3)


class Duck:
    """It has a step, and says nothing else."""

    def step(self, w, grad, descend, local):
        return descend(w, grad(w)), {}


class Stepless(Minimizer):
    """It has nothing."""


@pytest.mark.parametrize(
    ("key", "name", "says"),
    [
        (
            "minimizer",
            "Duck",
            r"^--minimizer \S+: must derive from fedsam.training.method.Minimizer$",
        ),
        ("client", "Duck", r"^--client \S+: must derive from fedsam.training.method.Correction$"),
        ("loss", "Duck", r"^--loss \S+: must derive from fedsam.training.method.Loss$"),
        ("minimizer", "Stepless", r"^--minimizer: Stepless: .*abstract method '?step"),
    ],
)
def test_what_does_not_keep_the_contract_is_refused_in_one_line(key, name, says):
    with pytest.raises(UsageError, match=says):
        new_method(resolve({key: f"{__name__}:{name}"}))
