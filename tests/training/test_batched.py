"""A cohort as one program: the numbers of its clients one by one, whatever their sizes."""

from dataclasses import replace

import pytest
import torch
from cohorts import (
    DEVICES,
    ENGINES,
    PLAIN,
    as_cohort,
    assert_same,
    convolutions,
    one_by_one,
    start_of,
    trainer_of,
    vectors_of,
)
from conftest import combined
from fedsam.clients.corrections.fedavg import FedAvg
from fedsam.clients.corrections.fedprox import FedProx
from fedsam.clients.corrections.scaffold import Scaffold
from fedsam.clients.losses.plain import Plain
from fedsam.clients.minimizers.asam import ASAM
from fedsam.clients.minimizers.late import Late
from fedsam.clients.minimizers.lookbehind import Lookbehind
from fedsam.clients.minimizers.m_sam import MSAM
from fedsam.clients.minimizers.sam import SAM
from fedsam.clients.minimizers.sgd import SGD
from torch import nn

from fedsam.base.errors import UsageError
from fedsam.config import plugins
from fedsam.config.schema import resolve
from fedsam.data.plan import Work
from fedsam.simulate.build.method import new_method
from fedsam.training import batched
from fedsam.training.batched import Program, stacked, why_not
from fedsam.training.batched_gradient import Slots
from fedsam.training.client import ClientJob
from fedsam.training.method import Method, Minimizer

MINIMIZERS = plugins.names("fedsam.clients.minimizers")
CLIENTS = plugins.names("fedsam.clients.corrections")
SOME = combined(MINIMIZERS, CLIENTS, plain=("sgd", "fedavg"), more=25)
# so that each shows what it is in two rounds of mini-batches of 4
OPTIONS = {"late": {"then": "vasso", "start": 1}, "looksam": {"k": 3}, "m_sam": {"m": 3}}


@DEVICES
@ENGINES
@pytest.mark.parametrize(("minimizer", "client"), SOME)
def test_batched_equals_one_by_one(gradients, minimizer, client, device):
    """Every method in the folders, momentum, all augmentations, ragged clients; two rounds."""
    keys = {"minimizer": minimizer, "minimizer_options": OPTIONS.get(minimizer, {}), "rounds": 2}
    base = {"client": client, "rho": 0.1, "eta": 0.2, "momentum": 0.9, "weight_decay": 0.01}
    method = new_method(resolve(keys | base))
    trainer = trainer_of(method, device=device)
    state = start_of(trainer)
    before = state.clone()
    trainers = [trainer] * 5
    program = Program(trainers, gradients, capture=device == "cuda")
    for round in (1, 2):
        jobs = [
            ClientJob(client, state, round, 0.02 / round, *vectors_of(trainer, round * client))
            for client in (4, 1, 0, 3, 2)
        ]
        together = as_cohort(trainers, jobs, gradients, program)
        assert_same(together, one_by_one(trainers, jobs))
    assert torch.equal(state, before)
    assert why_not([trainer], gradients) == ""


@ENGINES
@pytest.mark.parametrize(
    "base",
    [
        {"optimizer": "nesterov", "momentum": 0.9, "weight_decay": 0.01},
        {"optimizer": "adamw", "weight_decay": 0.01},
        {"decay_in_loss": True, "momentum": 0.9, "weight_decay": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "minimizer",
    [ASAM(0.2, 0.1, filterwise=True), ASAM(0.02, 0.1, p="inf"), Lookbehind(SAM(0.1)), MSAM(0.1, 3)],
    ids=["filter-wise", "p = inf", "lookbehind", "msam"],
)
def test_base_optimisers_and_options_in_a_cohort(gradients, minimizer, base):
    trainer = trainer_of(Method(minimizer, FedProx(0.1), **base, loss=Plain()))
    jobs = [ClientJob(client, start_of(trainer), 1, 0.01) for client in range(5)]
    trainers = [trainer] * 5
    assert_same(as_cohort(trainers, jobs, gradients), one_by_one(trainers, jobs))
    assert why_not([trainer], gradients) == ""


@ENGINES
def test_after_the_late_switch_it_is_the_other_minimiser_for_all_of_a_program(gradients):
    ends = []
    for minimizer in (Late(SGD(), ASAM(0.2, 0.2), 9, start=4), SGD(), ASAM(0.2, 0.2)):
        trainer = trainer_of(Method(minimizer, FedAvg(), 0.9, loss=Plain()))
        trainers, start = [trainer] * 2, start_of(trainer)
        program = Program(trainers, gradients, capture=False)
        for round in (4, 5):
            jobs = [ClientJob(client, start, round, 0.1) for client in (0, 4)]
            ends.append(
                torch.stack([d.state for d in as_cohort(trainers, jobs, gradients, program)])
            )
    (late4, late5), (sgd4, _), (_, asam5) = zip(ends[::2], ends[1::2], strict=True)
    assert torch.equal(late4, sgd4)
    assert torch.equal(late5, asam5)


@ENGINES
@pytest.mark.parametrize(
    "work", [Work(4), Work(64), Work(7, local_epochs=0.5), Work(3, local_steps=5)]
)
def test_any_work(gradients, work):
    trainer = trainer_of(Method(SAM(0.2), FedAvg(), loss=Plain()), work=work)
    jobs = [ClientJob(client, start_of(trainer), 3, 0.1) for client in range(5)]
    trainers = [trainer] * 5
    assert_same(as_cohort(trainers, jobs, gradients), one_by_one(trainers, jobs))


@ENGINES
def test_states_of_one_round_are_not_those_of_the_next(gradients):
    """What a strategy was handed must not change when the buffers are used again."""
    trainer = trainer_of()
    program = Program([trainer] * 2, gradients, capture=False)
    jobs = [ClientJob(client, start_of(trainer), 1, 0.1) for client in (0, 1)]
    first = as_cohort([trainer] * 2, jobs, gradients, program)
    kept = [done.state.clone() for done in first]
    as_cohort([trainer] * 2, [job._replace(round=2) for job in jobs], gradients, program)
    assert all(torch.equal(done.state, copy) for done, copy in zip(first, kept, strict=True))


@DEVICES
@ENGINES
def test_clients_of_several_runs_share_one_program(gradients, device):
    """Seeds, splits, states, rates, rho, eta, mu, momentum, decay, clip, rounds of their own."""
    methods = [
        Method(ASAM(0.5, 0.2), FedProx(0.01), momentum=0.9, weight_decay=1e-3, loss=Plain()),
        Method(ASAM(0.1, 0.01), FedProx(1.0), clip_gradient=0.3, loss=Plain()),
        Method(ASAM(0.0, 0.2), FedProx(0.0), momentum=0.5, weight_decay=1e-2, loss=Plain()),
    ]
    runs = [trainer_of(method, device=device, seed=n) for n, method in enumerate(methods)]
    shared = [replace(run, train=runs[0].train) for run in runs]
    trainers = [run for run in shared for _ in range(2)]
    starts = [start_of(run, seed) for seed, run in enumerate(runs)]
    jobs = [
        ClientJob(client, starts[n], n + 1, 0.1 / (n + 1))
        for n, clients in enumerate([(0, 4), (2, 4), (1, 3)])
        for client in clients
    ]
    assert_same(as_cohort(trainers, jobs, gradients), one_by_one(trainers, jobs))


@ENGINES
def test_runs_in_one_program_switch_together(gradients):
    methods = [
        Method(Late(SGD(), ASAM(rho, 0.2), 2, start=1), FedAvg(), loss=Plain())
        for rho in (0.1, 0.4)
    ]
    runs = [trainer_of(method) for method in methods]
    trainers = [replace(run, train=runs[0].train) for run in runs for _ in range(2)]
    program, start = Program(trainers, gradients, capture=False), start_of(runs[0])
    for round in (1, 2):
        jobs = [ClientJob(client, start, round, 0.1) for client in (0, 4, 2, 4)]
        together = as_cohort(trainers, jobs, gradients, program)
        assert_same(together, one_by_one(trainers, jobs))
        assert torch.equal(together[1].state, together[3].state) == (round == 1)  # rho
    apart = [
        Method(Late(SGD(), SAM(0.1), 9, start=start), FedAvg(), loss=Plain()) for start in (3, 4)
    ]
    with pytest.raises(UsageError, match=r"Late has start \[3, 4\]"):
        stacked(apart, start)


def test_stacked_methods_hold_columns_where_they_differ():
    like = torch.zeros(1, dtype=torch.float64)
    methods = [
        Method(Lookbehind(ASAM(rho, 0.2)), FedAvg(), 0.9, loss=Plain()) for rho in (0.1, 0.4)
    ]
    merged = stacked(methods, like)
    assert merged.momentum == 0.9
    assert merged.minimizer.k == 5
    assert merged.minimizer.ascent.rho.tolist() == [[0.1], [0.4]]
    assert merged.minimizer.ascent.eta == 0.2
    assert methods[0].minimizer.ascent.rho == 0.1  # the runs' own are as they were
    assert stacked([PLAIN, PLAIN], like) is PLAIN
    for other in (
        Method(SAM(0.1), FedAvg(), loss=Plain()),
        Method(Lookbehind(SAM(0.1), k=2), FedAvg(), loss=Plain()),
    ):
        with pytest.raises(UsageError, match=r"different kinds|Lookbehind has k \[5, 2\]"):
            stacked([Method(Lookbehind(SAM(0.1)), FedAvg(), loss=Plain()), other], like)


class Mixing(Minimizer):
    """A formula that forgets the last dimension: its norm runs over all clients."""

    def step(self, w, grad, descend, local):
        g = grad(w)
        return descend(w, g / g.norm()), {}


class Branching(Minimizer):
    """A formula that asks for one number of one client."""

    def step(self, w, grad, descend, local):
        g = grad(w)
        return descend(w, g if g.norm(dim=-1).item() > 0 else w), {}


@ENGINES
@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ((nn.BatchNorm2d(4),), ""),
        ((nn.Dropout(0.5),), ""),
        ((nn.GroupNorm(2, 4),), None),
    ],
    ids=["batch-norm", "dropout", "group-norm"],
)
def test_models_that_mix_images_are_refused_with_a_reason(gradients, more, reason):
    refused = why_not([trainer_of(module=lambda: convolutions(*more))], gradients)
    assert (refused == "") == (reason is None)
    assert "\n" not in refused


class MixingAtTheEnd(Scaffold):
    """A client whose steps are its own, but what it sends is not."""

    def finish(self, w, local):
        return {name: v / v.norm() for name, v in super().finish(w, local).items()}


@ENGINES
def test_a_client_that_mixes_what_is_sent_is_refused_with_a_reason(gradients):
    assert why_not([trainer_of(Method(SAM(0.1), Scaffold(), loss=Plain()))], gradients) == ""
    reason = why_not([trainer_of(Method(SAM(0.1), MixingAtTheEnd(), loss=Plain()))], gradients)
    assert "mixes what is separate" in reason


@ENGINES
@pytest.mark.parametrize("minimizer", [Mixing(), Branching()])
def test_formulas_that_mix_clients_are_refused_with_a_reason(gradients, minimizer):
    assert why_not([trainer_of(Method(minimizer, FedAvg(), loss=Plain()))], gradients)


class Declared(SGD):
    """SGD that says no."""

    batchable = False


class Reader(nn.Identity):
    """A layer that says no."""

    batchable = False


def test_what_says_that_it_is_not_batchable_is_not_tried(monkeypatch):
    monkeypatch.setattr(batched, "compared", None)  # to call it would raise
    parts = {"minimizer": Declared(), "correction": FedAvg(), "loss": Plain()}
    assert "--minimizer Declared says" in why_not([trainer_of(Method(**parts))], Slots)
    for layer, reason in (
        (Reader(), "--model: Reader says"),
        (nn.BatchNorm2d(4, track_running_stats=False), "BatchNorm: "),
    ):
        refused = why_not([trainer_of(module=lambda layer=layer: convolutions(layer))], Slots)
        assert refused.startswith(reason)
    changes = replace(trainer_of(), changes=True)
    assert why_not([changes], Slots).startswith("the model changes its buffers in training")
    draws = replace(trainer_of(), draws=True)
    assert why_not([draws], Slots).startswith("the model draws random numbers")


class OnRho(SAM):
    """SAM that asks whether there is a radius."""

    def step(self, w, grad, descend, local):
        if self.rho > 0:
            return super().step(w, grad, descend, local)
        return descend(w, grad(w)), {}


@ENGINES
def test_a_formula_that_branches_on_a_number_in_which_runs_differ_is_told_so(gradients):
    same, apart = (
        [Method(OnRho(rho), FedAvg(), loss=Plain()) for rho in (0.1, b)] for b in (0.1, 0.2)
    )
    train = trainer_of().train
    runs = [[replace(trainer_of(m), train=train) for m in methods] for methods in (same, apart)]
    assert why_not(runs[0], gradients) == ""
    assert "a number in which the runs differ is a column" in why_not(runs[1], gradients)


class Faulty(SGD):
    """SGD with a bug that is none of batching."""

    def step(self, w, grad, descend, local):
        if w.dim() == 2:
            raise ArithmeticError("a bug")
        return super().step(w, grad, descend, local)


def test_a_bug_is_not_taken_for_what_cannot_be_batched():
    with pytest.raises(ArithmeticError, match="a bug"):
        why_not([trainer_of(Method(Faulty(), FedAvg(), loss=Plain()))], Slots)
