"""Clients, and the servers they go with, against their algorithm boxes written once more.

Two clients of three a round, over three rounds, on a small network in float64. The reference
works on PyTorch's own parameter vector and knows nothing of fedsam but the mini-batches.
"""

from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from cohorts import start_of, trainer_of
from fedsam.clients.corrections.adabest import AdaBest
from fedsam.clients.corrections.fedavg import FedAvg
from fedsam.clients.corrections.fedcm import FedCM
from fedsam.clients.corrections.feddyn import FedDyn
from fedsam.clients.corrections.fedmoswa import FedMoSWA
from fedsam.clients.corrections.fedprox import FedProx
from fedsam.clients.corrections.fedswa import FedSWA
from fedsam.clients.corrections.scaffold import Scaffold
from fedsam.clients.losses.plain import Plain
from fedsam.clients.minimizers.fedsmoo import FedSMOO
from fedsam.clients.minimizers.late import Late
from fedsam.clients.minimizers.lesam import LESAM
from fedsam.clients.minimizers.sam import SAM
from fedsam.clients.minimizers.scaffold_one import ScaffoldOne
from fedsam.clients.minimizers.sgd import SGD
from fedsam.strategies.adabest import AdaBest as AdaBestServer
from fedsam.strategies.fedacg import FedACG
from fedsam.strategies.fedavg import FedAvg as FedAvgServer
from fedsam.strategies.fedavgm import FedAvgM
from fedsam.strategies.feddyn import FedDyn as FedDynServer
from fedsam.strategies.fedgloss import FedGloSS
from fedsam.strategies.fednova import FedNova
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from fedsam import as_strategy
from fedsam.base.errors import UsageError
from fedsam.data.plan import Work
from fedsam.engines.batched import BatchedExecutor, BatchedPrograms, BatchedRun
from fedsam.engines.local import LocalGrid
from fedsam.engines.threads import ThreadExecutor
from fedsam.messages import VectorRecord
from fedsam.server.rounds import play
from fedsam.server.side_vectors import SideVectors
from fedsam.training.batched_gradient import Slots
from fedsam.training.method import Local, Method

COHORTS = {1: [0, 2], 2: [0, 1], 3: [1, 2]}
POPULATION = 5
LR = 0.05
WORK = Work(4, local_epochs=2.0)


def network():
    torch.manual_seed(4)
    return nn.Sequential(nn.Flatten(), nn.Linear(128, 3), nn.Tanh(), nn.Linear(3, 3)).double()


def trainer_for(minimizer, client, **base):
    return trainer_of(Method(minimizer, client, **base, loss=Plain()), module=network, work=WORK)


def play_out(trainer, strategy=FedAvgServer, cohorts=COHORTS, gradients=None, **options):
    """Return the model after each round, as the framework trains it."""
    size = len(cohorts[1])
    threads = ThreadExecutor(trainer, 1)
    run = BatchedRun(trainer, lambda r: cohorts.get(r, []))
    executor = BatchedExecutor(BatchedPrograms(threads, gradients), run) if gradients else None
    turns = play(
        as_strategy(
            strategy(**options),
            fraction_evaluate=0.0,
            min_train_nodes=size,
            min_available_nodes=size,
        ),
        LocalGrid(threads, executor),
        VectorRecord(trainer.layout, start_of(trainer)),
        rounds=cohorts,
        sample=cohorts.get,
        seed=0,
        lr=lambda round: LR,
        node_of=range(len(trainer.partition)),
        side_vectors=SideVectors(trainer.method, trainer.layout, POPULATION),
    )
    states = [turn.arrays.state for turn in turns]
    threads.close()
    return states


class Naive:
    """Federated learning by hand; a method overrides what it does otherwise."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.kept = defaultdict(lambda: torch.zeros(trainer.layout.size, dtype=torch.float64))
        self.module = network()
        self.module.load_state_dict(trainer.layout.read(start_of(trainer)))
        self.w = parameters_to_vector(self.module.parameters()).detach()
        self.zero = torch.zeros_like(self.w)
        self.setup()

    def setup(self):
        pass

    def gradient(self, w, batch):
        vector_to_parameters(w, self.module.parameters())
        loss = nn.functional.cross_entropy(self.module(batch.images), batch.targets)
        grads = torch.autograd.grad(loss, list(self.module.parameters()))
        return torch.cat([g.flatten() for g in grads])

    def direction(self, k, v, g):
        """From client, point and gradient function to the step's direction."""
        return g(v)

    def begin(self):
        return self.w

    def after(self, k, start, end, steps):
        pass

    def server(self, start, ends, clients, steps):
        n = [self.trainer.examples(k) for k in clients]
        return sum(a * end for a, end in zip(n, ends, strict=True)) / sum(n)

    def run(self, cohorts=COHORTS):
        states = []
        for self.round, clients in cohorts.items():
            start, ends, steps = self.begin(), [], []
            for k in clients:
                plan, v = self.trainer.plan(k, self.round), start.clone()
                for step in range(len(plan)):
                    batch = self.trainer.train.batch(plan, step)
                    v = v - LR * self.direction(k, v, lambda u, b=batch: self.gradient(u, b))
                ends.append(v)
                steps.append(len(plan))
            self.start = start
            for k, end, count in zip(clients, ends, steps, strict=True):
                self.after(k, start, end, count)
            self.w = self.server(start, ends, clients, steps)
            vector_to_parameters(self.w, self.module.parameters())
            states.append(self.trainer.layout.write(self.module.state_dict()))
        return states


def mean(vectors):
    return sum(vectors) / len(vectors)


def climb(v, g, rho):
    return v + rho * g(v) / g(v).norm()


class NaiveFedDyn(Naive):
    """Acar et al., Algorithm 1: theta, h and the gradients of L_k, in the paper's units."""

    alpha, rho = 0.1, 0.0

    def setup(self):
        self.h = self.zero
        self.grads = defaultdict(lambda: self.zero)

    def direction(self, k, v, g):
        at = climb(v, g, self.rho) if self.rho else v
        return g(at) - self.grads[k] + self.alpha * (v - self.begin())

    def after(self, k, start, end, steps):
        self.grads[k] = self.grads[k] - self.alpha * (end - start)

    def server(self, start, ends, clients, steps):
        self.h = self.h - self.alpha / POPULATION * sum(end - start for end in ends)
        return mean(ends) - self.h / self.alpha


class NaiveFedDynEvaluatesItsCohort(NaiveFedDyn):
    """What is sent on is the corrected model, what is looked at the mean of the cohort's."""

    def setup(self):
        super().setup()
        self.means = []

    def run(self):
        super().run()
        states = []
        for w in self.means:
            vector_to_parameters(w, self.module.parameters())
            states.append(self.trainer.layout.write(self.module.state_dict()))
        return states

    def server(self, start, ends, clients, steps):
        self.means.append(mean(ends))
        return super().server(start, ends, clients, steps)


class NaiveFedSpeed(NaiveFedDyn):
    """The authors' code: h_i summed in units of w, its mean over everybody added to the mean."""

    rho = 0.2

    def setup(self):
        self.h = [self.zero] * POPULATION

    def direction(self, k, v, g):
        return g(climb(v, g, self.rho)) + self.alpha * (v + self.h[k] - self.w)

    def after(self, k, start, end, steps):
        self.h[k] = self.h[k] + end - start

    def server(self, start, ends, clients, steps):
        return mean(ends) + mean(self.h)


class NaiveFedGloSS(NaiveFedDyn):
    """The paper's Algorithm: sigma with beta = 1 / alpha, ascents on both sides that warm up."""

    beta = 10.0
    rhos, server_rhos = {1: 0.1, 2: 0.15, 3: 0.2}, {2: 0.2, 3: 0.3}

    def setup(self):
        super().setup()
        self.sigma, self.pseudo, self.e = self.zero, None, self.zero

    def begin(self):
        self.rho = self.rhos[self.round]
        if self.pseudo is not None:
            self.e = self.server_rhos[self.round] * self.pseudo / self.pseudo.norm()
        return self.w + self.e

    def server(self, start, ends, clients, steps):
        self.sigma = self.sigma - sum(end - start for end in ends) / (self.beta * POPULATION)
        self.pseudo = start - mean(ends)
        return start - self.e - self.pseudo - self.beta * self.sigma


class NaiveReleasedFedGloSS(NaiveFedGloSS):
    """Its server has the clients' rho from round 2 to 1 + T_s, as list indices of the code say."""

    T_s, rhos = 1, {1: 0.1, 2: 0.2, 3: 0.2}

    def setup(self):
        super().setup()
        schedule = [0.1] + [0.2] * self.T_s
        schedule += [0.3] * (len(COHORTS) - len(schedule))
        self.server_rhos = dict(enumerate(schedule, 1))


class NaiveFedCM(Naive):
    alpha, rho = 0.1, 0.0

    def setup(self):
        self.delta = self.zero

    def direction(self, k, v, g):
        at = climb(v, g, self.rho) if self.rho else v
        return self.alpha * g(at) + (1 - self.alpha) * self.delta

    def server(self, start, ends, clients, steps):
        pairs = zip(ends, steps, strict=True)
        self.delta = mean([(start - end) / (LR * count) for end, count in pairs])
        return super().server(start, ends, clients, steps)


class NaiveMoFedSAM(NaiveFedCM):
    rho = 0.2


class NaiveFedGamma(Naive):
    """SCAFFOLD, option II, with SAM: the correction at w, the gradient at w + e."""

    def setup(self):
        self.c, self.c_i, self.change = self.zero, defaultdict(lambda: self.zero), self.zero

    def perturbed(self, k, v, g):
        return climb(v, g, 0.2)

    def direction(self, k, v, g):
        return g(self.perturbed(k, v, g)) - self.c_i[k] + self.c

    def after(self, k, start, end, steps):
        new = self.c_i[k] - self.c + (start - end) / (steps * LR)
        self.change = self.change + new - self.c_i[k]
        self.c_i[k] = new

    def server(self, start, ends, clients, steps):
        self.c, self.change = self.c + self.change / POPULATION, self.zero
        return super().server(start, ends, clients, steps)


def towards(old, w, rho=0.2):
    return rho * (old - w) / (old - w).norm() if old is not None else 0.0


class NaiveFedLESAM(Naive):
    def setup(self):
        self.old = {}

    def direction(self, k, v, g):
        return g(v + towards(self.old.get(k), self.w))

    def after(self, k, start, end, steps):
        self.old[k] = start


class NaiveFedLESAMS(NaiveFedGamma):
    strength = 0.1  # of the released code

    def direction(self, k, v, g):
        return g(self.perturbed(k, v, g)) + self.strength * (self.c - self.c_i[k])

    def setup(self):
        super().setup()
        self.old = {}

    def perturbed(self, k, v, g):
        return v + towards(self.old.get(k), self.w)

    def after(self, k, start, end, steps):
        super().after(k, start, end, steps)
        self.old[k] = start


class NaiveFedLESAMD(NaiveFedDyn):
    def setup(self):
        super().setup()
        self.old = {}

    def direction(self, k, v, g):
        at = v + towards(self.old.get(k), self.w)
        return g(at) - self.grads[k] + self.alpha * (v - self.w)

    def after(self, k, start, end, steps):
        super().after(k, start, end, steps)
        self.old[k] = start


class NaiveFedSMOO(NaiveFedDyn):
    """The authors' code: mu_i moves in every step, s is what the cohort's mu_i point at."""

    def setup(self):
        super().setup()
        self.s, self.mu = self.zero, defaultdict(lambda: self.zero)

    def direction(self, k, v, g):
        ascent = g(v) - self.mu[k] - self.s
        e = 0.2 * ascent / ascent.norm()
        self.mu[k] = self.mu[k] + e - self.s
        return g(v + e) - self.grads[k] + self.alpha * (v - self.w)

    def server(self, start, ends, clients, steps):
        towards = mean([self.mu[k] for k in clients])
        self.s = 0.2 * towards / towards.norm()
        return super().server(start, ends, clients, steps)


class NaiveScaffoldOne(NaiveFedGamma):
    """Option I: the new c_i is the gradient at the model that the round started from."""

    def direction(self, k, v, g):
        self.seen[k].append(g(self.w))
        return g(v) - self.c_i[k] + self.c

    def begin(self):
        self.seen = defaultdict(list)
        return self.w

    def after(self, k, start, end, steps):
        new = mean(self.seen[k])
        self.change = self.change + new - self.c_i[k]
        self.c_i[k] = new


class NaiveFedSWA(Naive):
    """A rate for each step, and a server that goes 1.5 times as far as the mean."""

    rho = 0.2

    def rates(self, k):
        count = len(self.trainer.plan(k, self.round))
        return [(1 - i / count) * LR + i / count * self.rho * LR for i in range(count)]

    def begin(self):
        self.taken = defaultdict(int)
        return self.w

    def corrected(self, k, v, g):
        return g(v)

    def direction(self, k, v, g):
        rate = self.rates(k)[self.taken[k]]
        self.taken[k] += 1
        return rate / LR * self.corrected(k, v, g)

    def server(self, start, ends, clients, steps):
        return start + 1.5 * (super().server(start, ends, clients, steps) - start)


class NaiveFedMoSWA(NaiveFedSWA):
    def setup(self):
        self.c, self.c_i, self.sent = self.zero, defaultdict(lambda: self.zero), []

    def corrected(self, k, v, g):
        return g(v) + self.c - self.c_i[k]

    def after(self, k, start, end, steps):
        self.c_i[k] = (start - end) / sum(self.rates(k)) + self.c_i[k] - self.c
        self.sent.append(self.c_i[k] - self.c)

    def server(self, start, ends, clients, steps):
        gamma = 1.0 if self.round == 1 else 0.2
        self.c, self.sent = self.c + gamma * mean(self.sent), []
        return super().server(start, ends, clients, steps)


class NaiveAdaBest(Naive):
    mu, beta = 0.3, 0.9

    def setup(self):
        self.h_i, self.last, self.theta_bar = defaultdict(lambda: self.zero), {}, self.w

    def direction(self, k, v, g):
        return g(v) - self.h_i[k]

    def after(self, k, start, end, steps):
        age = self.round - self.last.get(k, 0)
        self.h_i[k] = self.h_i[k] / age + self.mu * (start - end)
        self.last[k] = self.round

    def server(self, start, ends, clients, steps):
        h, self.theta_bar = self.beta * (self.theta_bar - mean(ends)), mean(ends)
        return self.theta_bar - h


class NaiveFedACG(Naive):
    """m and theta as the paper's box has them, with its proximal term."""

    momentum, beta = 0.85, 0.3

    def setup(self):
        self.m = self.zero

    def begin(self):
        return self.w + self.momentum * self.m

    def direction(self, k, v, g):
        return g(v) + self.beta * (v - self.begin())

    def server(self, start, ends, clients, steps):
        n = [self.trainer.examples(k) for k in clients]
        change = sum(a * (end - start) for a, end in zip(n, ends, strict=True)) / sum(n)
        self.m = self.momentum * self.m + change
        return self.w + self.m


class NaiveFedNova(Naive):
    def server(self, start, ends, clients, steps):
        n = [self.trainer.examples(k) for k in clients]
        p = [a / sum(n) for a in n]
        tau = sum(a * count for a, count in zip(p, steps, strict=True))
        rows = zip(p, ends, steps, strict=True)
        return start - tau * sum(a * (start - end) / count for a, end, count in rows)


BEYOND = {"server_learning_rate": 1.5, "server_momentum": 0.0}
METHODS = {
    "feddyn": (SGD(), FedDyn(0.1), FedDynServer, {"clients": POPULATION}, NaiveFedDyn),
    "feddyn-cohort": (
        SGD(),
        FedDyn(0.1),
        FedDynServer,
        {"clients": POPULATION, "evaluated": "cohort"},
        NaiveFedDynEvaluatesItsCohort,
    ),
    "fedspeed": (SAM(0.2), FedDyn(0.1), FedDynServer, {"clients": POPULATION}, NaiveFedSpeed),
    "fedgloss": (
        SAM(0.2, rho_0=0.1, warmup=2),
        FedDyn(0.1),
        FedGloSS,
        {"clients": POPULATION, "rho": 0.3, "rho_0": 0.1, "warmup": 2},
        NaiveFedGloSS,
    ),
    "fedgloss-released": (
        SAM(0.2, rho_0=0.1, warmup=1),
        FedDyn(0.1),
        FedGloSS,
        {"clients": POPULATION, "rho": 0.3, "rho_0": 0.1, "warmup": 1, "held": 0.2},
        NaiveReleasedFedGloSS,
    ),
    "fedcm": (SGD(), FedCM(0.1), FedAvgServer, {}, NaiveFedCM),
    "mofedsam": (SAM(0.2), FedCM(0.1), FedAvgServer, {}, NaiveMoFedSAM),
    "fedgamma": (SAM(0.2), Scaffold(), FedAvgServer, {}, NaiveFedGamma),
    "fedlesam": (LESAM(0.2), FedAvg(), FedAvgServer, {}, NaiveFedLESAM),
    "fedlesam-s": (LESAM(0.2), Scaffold(0.1), FedAvgServer, {}, NaiveFedLESAMS),
    "fedlesam-d": (
        LESAM(0.2),
        FedDyn(0.1),
        FedDynServer,
        {"clients": POPULATION},
        NaiveFedLESAMD,
    ),
    "fedsmoo": (FedSMOO(0.2), FedDyn(0.1), FedDynServer, {"clients": POPULATION}, NaiveFedSMOO),
    "scaffold-one": (ScaffoldOne(), FedAvg(), FedAvgServer, {}, NaiveScaffoldOne),
    "fedswa": (SGD(), FedSWA(0.2), FedAvgM, BEYOND, NaiveFedSWA),
    "fedmoswa": (SGD(), FedMoSWA(0.2), FedAvgM, BEYOND, NaiveFedMoSWA),
    "adabest": (SGD(), AdaBest(0.3), AdaBestServer, {"beta": 0.9}, NaiveAdaBest),
    "fedacg": (SGD(), FedProx(0.3), FedACG, {}, NaiveFedACG),
    "fednova": (SGD(), FedAvg(), FedNova, {}, NaiveFedNova),
}


@pytest.mark.parametrize("gradients", [None, Slots], ids=["one-by-one", "cohort"])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_its_algorithm_box(name, gradients):
    minimizer, client, strategy, options, naive = METHODS[name]
    trainer = trainer_for(minimizer, client)
    states = play_out(trainer, strategy, gradients=gradients, **options)
    plain = play_out(trainer_for(SGD(), FedAvg()))
    for state, expected in zip(states, naive(trainer).run(), strict=True):
        torch.testing.assert_close(state, expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(states[-1], plain[-1], rtol=1e-4)


def assert_same(ours, theirs):
    assert ours
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("client", "strategy", "options"),
    [
        (FedCM(1.0), FedAvgServer, {}),
        (AdaBest(0.0), FedAvgServer, {}),
        (FedDyn(0.0), FedAvgServer, {}),
        (FedSWA(1.0), FedAvgServer, {}),
        (FedAvg(), FedACG, {"server_momentum": 0.0}),
    ],
    ids=lambda v: type(v).__name__,
)
def test_without_strength_a_method_is_fedavg(client, strategy, options):
    assert_same(
        play_out(trainer_for(SAM(0.1), client), strategy, **options),
        play_out(trainer_for(SAM(0.1), FedAvg())),
    )


def test_without_a_radius_fedgloss_is_feddyn_and_lesam_is_sgd():
    trainer = trainer_for(SGD(), FedDyn(0.1))
    options = {"clients": POPULATION}
    assert_same(
        play_out(trainer, FedGloSS, rho=0.0, rho_0=0.0, **options),
        play_out(trainer, FedDynServer, **options),
    )
    assert_same(play_out(trainer_for(LESAM(0.0), FedAvg())), play_out(trainer_for(SGD(), FedAvg())))


def test_sams_warm_up_begins_at_rho_0_is_linear_and_ends_for_good():
    """The released FedGloSS on CIFAR-10: 0.001, 0.0010745, ..., 0.0755 in round 1001, 0.15."""
    sam, g = SAM(0.15, rho_0=0.001, warmup=2000), torch.eye(3, dtype=torch.float64)[0]
    layout = trainer_for(SGD(), FedAvg()).layout
    rounds = torch.tensor([[1], [2], [1001], [2001], [2002], [10000]])
    together = sam.perturbation(g, g.expand(6, 3), Local(layout, g, rounds, LR))
    expected = torch.tensor([0.001, 0.0010745, 0.0755, 0.15, 0.15, 0.15], dtype=torch.float64)
    torch.testing.assert_close(together, expected[:, None] * g, rtol=1e-12, atol=0)
    for row, round in zip(together, rounds.flatten().tolist(), strict=True):
        assert torch.equal(sam.perturbation(g, g, Local(layout, g, round, LR)), row)
    for row in together[3:]:
        assert torch.equal(row, SAM(0.15).perturbation(g, g, Local(layout, g, 1, LR)))


def test_what_feddyn_evaluates_does_not_change_what_it_sends():
    w, W = torch.zeros(4, dtype=torch.float64), list(torch.eye(4, dtype=torch.float64)[:2])
    sent = {}
    for evaluated in ("server", "cohort"):
        method = FedDynServer(5, evaluated)
        at, state = w, method.start(w)
        for round in (1, 2, 3):
            begin = method.send(at, state, round)
            moved = [begin + round * v for v in W]
            at, state = method.update(at, moved, [1.0, 1.0], state, round)
        sent[evaluated] = method.send(at, state, 4)
    torch.testing.assert_close(*sent.values(), rtol=1e-12, atol=1e-14)
    # h after three rounds: minus 2/5 of the sum of the mean moves, (1 + 2 + 3) / 2 on two axes
    torch.testing.assert_close(state["h"], -2 / 5 * 3 * (W[0] + W[1]))
    torch.testing.assert_close(at, sent["cohort"] + state["h"])


@pytest.mark.parametrize("client", [FedSWA(0.2), FedMoSWA(0.2)], ids=lambda c: type(c).__name__)
def test_a_falling_rate_is_that_of_decay_momentum_and_adamw_too(client):
    """PyTorch's optimisers with the rate of each step, as the authors' code makes them anew."""
    bases = {
        "sgd": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=0.3),
        "adamw": lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=0.3),
    }
    for optimizer, base in bases.items():
        momentum = {"sgd": 0.9, "adamw": 0.0}[optimizer]
        trainer = trainer_for(
            SGD(), client, momentum=momentum, weight_decay=0.3, optimizer=optimizer
        )
        naive = Naive(trainer)
        theirs, plan = base(naive.module.parameters(), LR), trainer.plan(2, 1)
        for step in range(len(plan)):
            batch, share = trainer.train.batch(plan, step), step / len(plan)
            theirs.zero_grad()
            nn.functional.cross_entropy(naive.module(batch.images), batch.targets).backward()
            for group in theirs.param_groups:
                group["lr"] = (1 - share) * LR + share * 0.2 * LR
            theirs.step()
        (ours,) = play_out(trainer, cohorts={1: [2]})
        expected = trainer.layout.write(naive.module.state_dict())
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def test_fedmoswas_new_variate_is_the_mean_gradient_however_many_steps():
    """Under a constant gradient c_i is that gradient; the released divisor makes it too long."""
    g, w = torch.tensor([3.0, -2.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for rho_end, steps in ((0.0, 4), (0.0, 8), (0.1, 1), (0.3, 7), (1.0, 5)):
        client, v = FedMoSWA(rho_end), w
        local = Local(trainer_for(SGD(), client).layout, w, 1, LR, steps, {"c_i": w}, {"c": w})
        for step in range(steps):
            local = replace(local, step=step)
            v = v - client.rate(local) * client.correct(v, g, local)
        finished = client.finish(v, local)
        torch.testing.assert_close(finished["c_i"], g, rtol=1e-12, atol=0)
        torch.testing.assert_close(finished["c"], g, rtol=1e-12, atol=0)


def test_fedmoswas_server_takes_the_first_rounds_mean_as_it_is_and_then_follows():
    client, zero = FedMoSWA(0.1, gamma=0.2), torch.zeros(2, dtype=torch.float64)
    a, b = torch.tensor([[1.0, 2.0], [3.0, -4.0]], dtype=torch.float64)
    first = client.fold({"c": zero}, [{"c": a}, {"c": b}], 0.1)["c"]
    torch.testing.assert_close(first, (a + b) / 2)
    second = client.fold({"c": first}, [{"c": a}, {"c": b}], 0.1)["c"]
    torch.testing.assert_close(second, first + 0.2 * (a + b) / 2)


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_scaffold_with_no_strength_is_fedavg_and_with_all_of_it_as_it_was(strength):
    g, c_i, c = torch.randn(3, 40, generator=torch.Generator().manual_seed(2))
    local = Local(trainer_for(SGD(), FedAvg()).layout, g, 1, LR, 1, {"c_i": c_i}, {"c": c})
    ours = Scaffold(strength).correct(g, g, local)
    assert torch.equal(ours, g - c_i + c if strength else g)


def test_feddyns_client_is_fedprox_in_its_first_round():
    first = {1: [0, 2]}
    assert_same(
        play_out(trainer_for(SGD(), FedDyn(0.3)), cohorts=first),
        play_out(trainer_for(SGD(), FedProx(0.3)), cohorts=first),
    )


def test_a_client_that_is_all_there_is_goes_on_where_feddyns_linear_term_leads():
    """One client, all of the population: h is minus its update, so the server doubles it."""
    alone = {1: [0]}
    trainer = trainer_for(SGD(), FedDyn(0.1))
    start = start_of(trainer)
    (once,) = play_out(trainer, cohorts=alone)
    (twice,) = play_out(trainer, FedDynServer, cohorts=alone, clients=1)
    torch.testing.assert_close(twice - start, 2 * (once - start), rtol=1e-9, atol=1e-12)


def test_fednova_is_fedavg_where_all_take_as_many_steps():
    work = Work(4, local_steps=3)
    trainer = trainer_of(Method(SGD(), FedAvg(), 0.9, loss=Plain()), module=network, work=work)
    assert_same(play_out(trainer, FedNova, momentum=0.9), play_out(trainer))


def test_fednova_counts_steps_with_momentum_as_their_gradients_weigh():
    """Under a constant gradient every client's normalised update is that gradient, whatever m."""
    m, steps = 0.9, [1, 4, 7]
    weights = [sum((1 - m**j) / (1 - m) for j in range(1, s + 1)) for s in steps]
    assert weights == pytest.approx([(s - m * (1 - m**s) / (1 - m)) / (1 - m) for s in steps])
    w, g = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    W = [w - a * g for a in weights]
    new, _ = FedNova(momentum=m).update(w, W, [1.0, 2.0, 3.0], {}, 1, steps)
    expected = sum(n * a for n, a in zip([1, 2, 3], weights, strict=True)) / 6
    torch.testing.assert_close(new, w - expected * g)


def test_the_first_round_of_lesam_is_not_perturbed_and_scaffold_with_it_has_both_memories():
    trainer = trainer_for(LESAM(0.2), Scaffold())
    assert trainer.method.memory == ("w_old", "c_i")
    assert trainer.method.exchanged == ("c",)
    first = {1: [0, 2]}
    assert_same(
        play_out(trainer, cohorts=first), play_out(trainer_for(SGD(), FedAvg()), cohorts=first)
    )


def test_a_clients_first_step_of_fedsmoo_is_sams_in_the_first_round():
    one = {1: [0]}
    work = Work(4, local_steps=1)
    ours, sam = (
        trainer_of(Method(m, FedAvg(), loss=Plain()), module=network, work=work)
        for m in (FedSMOO(0.2), SAM(0.2))
    )
    assert_same(play_out(ours, cohorts=one), play_out(sam, cohorts=one))


def test_both_options_of_scaffold_leave_the_same_variate_after_one_step():
    one, work = {1: [0], 2: [0]}, Work(9, local_steps=1)
    one_step = [
        trainer_of(Method(minimizer, client, loss=Plain()), module=network, work=work)
        for minimizer, client in ((ScaffoldOne(), FedAvg()), (SGD(), Scaffold()))
    ]
    assert_same(*(play_out(trainer, cohorts=one) for trainer in one_step))


def test_a_minimiser_that_remembers_is_refused_as_a_phase():
    with pytest.raises(ValueError, match="then: LESAM remembers"):
        Late(SGD(), LESAM(0.1), 10)


class Clash(LESAM):
    """A minimiser whose vector has the name of its client's."""

    memory = ("c_i",)


def test_two_vectors_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"Clash, --client Scaffold, .* one name: c_i, c_i"):
        Method(Clash(0.1), Scaffold(), loss=Plain())


class HalfMinimizer(SGD):
    """A minimiser that forgot what else it needs."""

    memory = ("h",)


def test_a_minimiser_that_defines_half_of_it_is_refused():
    with pytest.raises(ValueError, match=r"--minimizer HalfMinimizer: keeps .*must define finish"):
        Method(HalfMinimizer(), FedAvg(), loss=Plain())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: FedDyn(-1.0), "alpha"),
        (lambda: FedCM(0.0), "alpha"),
        (lambda: AdaBest(-1.0), "mu"),
        (lambda: FedSWA(2.0), "rho_end"),
        (lambda: FedMoSWA(2.0), "rho_end"),
        (lambda: Scaffold(-1.0), "strength"),
        (lambda: SAM(0.1, rho_0=-1.0), "rho_0"),
        (lambda: SAM(0.1, warmup=-1), "warmup"),
        (lambda: FedDynServer(5, "clients"), "evaluated"),
        (lambda: AdaBestServer(1.0), "beta"),
        (lambda: FedACG(1.0), "server_momentum"),
    ],
)
def test_values_that_make_no_sense_are_refused(make, says):
    with pytest.raises(ValueError, match=f"^{says}: must"):
        make()


class Worded(FedDyn):
    memory = "h_i"


class Forgetful(FedDyn):
    memory = ()


class Folding(FedDyn):
    def fold(self, sent, replies, share):
        return {}


@pytest.mark.parametrize(
    ("correction", "says"),
    [
        (Worded(), "memory must be a tuple of names, got 'h_i'"),
        (Forgetful(), "defines finish, but names no vectors"),
        (Folding(), "defines fold, but names no vectors in exchanged"),
    ],
)
def test_what_a_class_says_of_its_vectors_goes_together(correction, says):
    with pytest.raises(UsageError, match=f"--client {type(correction).__name__}: {says}"):
        Method(SGD(), correction, loss=Plain())
