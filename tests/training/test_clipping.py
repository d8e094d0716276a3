"""Clipped gradients against PyTorch's own clip_grad_norm_, one by one and as a cohort."""

from dataclasses import replace

import pytest
import torch
from cohorts import (
    ENGINES,
    as_cohort,
    assert_same,
    one_by_one,
    start_of,
    trainer_of,
    vectors_of,
)
from fedsam.clients.corrections.fedavg import FedAvg
from fedsam.clients.corrections.fedprox import FedProx
from fedsam.clients.losses.plain import Plain
from fedsam.clients.minimizers.sam import SAM
from fedsam.clients.minimizers.sgd import SGD
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import clip_grad_norm_

from fedsam.base.vector import clipped
from fedsam.config import plugins
from fedsam.config.schema import resolve
from fedsam.data.plan import Work
from fedsam.simulate.build.method import new_method
from fedsam.training.client import ClientJob
from fedsam.training.method import Local, Method

CLIENTS = plugins.names("fedsam.clients.corrections")
WORK = Work(4, local_epochs=2.0)
LR = 0.1
BASES = {
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr, weight_decay=0.1),
    "nesterov": lambda parameters, lr: torch.optim.SGD(
        parameters, lr, momentum=0.9, weight_decay=0.1, nesterov=True
    ),
    "adamw": lambda parameters, lr: torch.optim.AdamW(parameters, lr, weight_decay=0.1),
}


def torchs(v, length):
    """Return ``v`` as PyTorch clips it, in three tensors of its own."""
    parts = [nn.Parameter(torch.zeros_like(part)) for part in v.tensor_split(3)]
    for part, g in zip(parts, v.tensor_split(3), strict=True):
        part.grad = g.clone()
    clip_grad_norm_(parts, length)
    return torch.cat([part.grad for part in parts])


@settings(deadline=None)
@given(
    st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=9),
    st.floats(1e-3, 1e4),
    st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=3),
)
def test_a_clipped_vector_is_pytorchs_and_a_cohorts_row_is_its_own(numbers, length, scales):
    v = torch.tensor(numbers, dtype=torch.float64)
    rows = torch.stack([scale * v for scale in scales])
    before = rows.clone()
    for row, alone in zip(clipped(rows, length), rows, strict=True):
        torch.testing.assert_close(row, torchs(alone, length), rtol=1e-12, atol=1e-300)
        assert float(row.norm()) <= length
    lengths = torch.tensor([[0.0]] + [[length]] * (len(scales) - 1), dtype=torch.float64)
    columns = clipped(rows, lengths)
    assert torch.equal(columns[0], rows[0])
    torch.testing.assert_close(columns[1:], clipped(rows, length)[1:], rtol=1e-15, atol=0)
    assert torch.equal(rows, before)


def by_hand(trainer, client, length, optimizer, memory, sent):
    """One round of a client: PyTorch's backward, clipping and optimiser, a parameter at a time."""
    layout, method = trainer.layout, trainer.method
    module = trainer.new_network().module
    module.load_state_dict(layout.read(start_of(trainer)))
    anchor, plan = layout.write(module.state_dict()), trainer.plan(client, 1)
    torch_optimiser = BASES[optimizer](module.parameters(), LR)
    local = Local(layout, anchor, 1, LR, len(plan), memory=memory, sent=sent)
    lengths = []
    for step in range(len(plan)):
        local = replace(local, step=step)
        batch = trainer.train.batch(plan, step)
        module.zero_grad()
        nn.functional.cross_entropy(module(batch.images), batch.targets).backward()
        w = layout.write(module.state_dict())
        g = layout.write({name: p.grad for name, p in module.named_parameters()})
        corrected = layout.read(method.correction.correct(w, g, local))
        for name, p in module.named_parameters():
            p.grad = corrected[name].clone()
        lengths.append(float(clip_grad_norm_(module.parameters(), length)))
        for group in torch_optimiser.param_groups:
            group["lr"] = method.correction.rate(local)
        torch_optimiser.step()
    return layout.write(module.state_dict()), lengths


@pytest.mark.parametrize("optimizer", BASES)
@pytest.mark.parametrize("client", CLIENTS)
def test_every_clients_corrected_gradient_is_clipped_before_the_decay(client, optimizer):
    keys = {"client": client, "optimizer": optimizer, "weight_decay": 0.1, "clip_gradient": 0.3}
    momentum = {"momentum": 0.9} if optimizer == "nesterov" else {}
    trainer = trainer_of(new_method(resolve(keys | momentum)), work=WORK)
    memory, sent = vectors_of(trainer, 7)
    job = ClientJob(2, start_of(trainer), 1, LR, memory, sent)
    (result,) = one_by_one([trainer], [job])
    expected, lengths = by_hand(trainer, 2, 0.3, optimizer, memory, sent)
    assert max(lengths) > 0.3
    torch.testing.assert_close(result.state, expected, rtol=1e-9, atol=1e-12)


@ENGINES
@pytest.mark.parametrize("minimizer", ["sgd", "sam", "lookbehind", "scaffold_one"])
@pytest.mark.parametrize("client", CLIENTS)
def test_a_cohort_clips_each_client_as_one_by_one(gradients, client, minimizer):
    keys = {"client": client, "minimizer": minimizer, "rho": 0.1, "clip_gradient": 0.3}
    trainer = trainer_of(new_method(resolve(keys | {"momentum": 0.9})), work=WORK)
    free = replace(trainer, method=replace(trainer.method, clip_gradient=0.0))
    jobs = [ClientJob(k, start_of(trainer), 1, LR, *vectors_of(trainer, k)) for k in range(3)]
    trainers = [trainer] * len(jobs)
    alone = one_by_one(trainers, jobs)
    assert_same(as_cohort(trainers, jobs, gradients), alone)
    others = one_by_one([free] * len(jobs), jobs)
    assert any(not torch.equal(a.state, b.state) for a, b in zip(alone, others, strict=True))


@ENGINES
def test_runs_that_clip_share_a_program_with_one_that_does_not_and_keeps_its_bytes(gradients):
    def runs(*lengths):
        methods = [
            Method(SAM(0.1 + n / 10), FedProx(0.1), 0.9, 0.01, clip_gradient=length, loss=Plain())
            for n, length in enumerate(lengths)
        ]
        train = trainer_of().train
        return [replace(trainer_of(method, work=WORK), train=train) for method in methods]

    clipping, free = runs(0.0, 0.05, 1e9), runs(0.0, 0.0, 0.0)
    jobs = [ClientJob(2, start_of(clipping[0]), 1, LR)] * 3
    together = as_cohort(clipping, jobs, gradients)
    assert_same(together, one_by_one(clipping, jobs))
    unclipped = as_cohort(free, jobs, gradients)
    same = [torch.equal(a.state, b.state) for a, b in zip(together, unclipped, strict=True)]
    assert same == [True, False, True]


def test_a_length_that_is_never_reached_changes_nothing():
    ends = []
    for length in (0.0, 1e9):
        trainer = trainer_of(Method(SGD(), FedAvg(), clip_gradient=length, loss=Plain()), work=WORK)
        ends.append(one_by_one([trainer], [ClientJob(2, start_of(trainer), 1, LR)])[0].state)
    assert torch.equal(*ends)
