"""SCAFFOLD against its algorithm box, and the seam for what clients keep and exchange."""

import re

import naive
import pytest
import torch
from cohorts import convolutions, start_of, trainer_of
from fedsam.clients.corrections.fedavg import FedAvg
from fedsam.clients.corrections.scaffold import Scaffold
from fedsam.clients.losses.plain import Plain
from fedsam.clients.minimizers.sam import SAM
from fedsam.clients.minimizers.sgd import SGD
from fedsam.strategies.fedavg import FedAvg as FedAvgServer
from flwr.app import Message, RecordDict

from fedsam import as_strategy
from fedsam.data.plan import Work
from fedsam.engines.batched import BatchedExecutor, BatchedPrograms, BatchedRun
from fedsam.engines.local import LocalGrid
from fedsam.engines.threads import ThreadExecutor
from fedsam.messages import VectorRecord, train_reply
from fedsam.server.rounds import play
from fedsam.server.screening import usable
from fedsam.server.side_vectors import SideVectors
from fedsam.training.batched_gradient import Slots, Vmapped
from fedsam.training.method import Method

COHORTS = {1: [0, 2, 4], 2: [0, 1, 4], 3: [2, 3, 4], 4: [0, 1, 2]}
LR = 0.05


def rounds(trainer, gradients=None, cohorts=COHORTS, lr=LR):
    """Play rounds with given cohorts; return the grid, the side vectors and each round's state."""
    threads = ThreadExecutor(trainer, 2)
    run = BatchedRun(trainer, lambda r: cohorts.get(r, []))
    grid = LocalGrid(
        threads, BatchedExecutor(BatchedPrograms(threads, gradients), run) if gradients else None
    )
    side_vectors = SideVectors(trainer.method, trainer.layout, len(trainer.partition))
    cohort = len(cohorts[1])
    turns = play(
        as_strategy(
            FedAvgServer(),
            fraction_evaluate=0.0,
            min_train_nodes=cohort,
            min_available_nodes=cohort,
        ),
        grid,
        VectorRecord(trainer.layout, start_of(trainer)),
        rounds=cohorts,
        sample=lambda r, attempt: cohorts[r],
        seed=0,
        lr=lambda round: lr,
        node_of=range(len(trainer.partition)),
        side_vectors=side_vectors,
    )
    states = [turn.arrays.state for turn in turns]
    threads.close()
    return grid, side_vectors, states


def by_hand(trainer):
    """The algorithm box, a parameter at a time, on the same mini-batches."""
    layout, population = trainer.layout, len(trainer.partition)
    w = layout.read(start_of(trainer))
    c = {name: torch.zeros_like(t) for name, t in w.items()}
    kept = {k: dict(c) for k in range(population)}
    states = []
    for number, clients in COHORTS.items():
        ends, news = [], []
        for k in clients:
            model = convolutions()
            model.load_state_dict(w)
            plan = trainer.plan(k, number)
            batches = [trainer.train.batch(plan, step) for step in range(len(plan))]
            pairs = [(batch.images, batch.targets) for batch in batches]
            news.append(naive.scaffold(model, pairs, lr=LR, c_i=kept[k], c=c))
            ends.append(naive.values(model))
        n = [trainer.examples(k) for k in clients]
        w = {
            name: sum(nk * end[name] for nk, end in zip(n, ends, strict=True)) / sum(n)
            for name in w
        }
        c = {
            name: c[name]
            + sum(new[name] - kept[k][name] for k, new in zip(clients, news, strict=True))
            / population
            for name in c
        }
        kept |= dict(zip(clients, news, strict=True))
        states.append(layout.write(w))
    return kept, c, states


@pytest.mark.parametrize("gradients", [None, Slots, Vmapped])
def test_scaffold_is_its_algorithm_box(gradients):
    trainer = trainer_of(Method(SGD(), Scaffold(), loss=Plain()), work=Work(4, local_epochs=2.0))
    grid, side_vectors, states = rounds(trainer, gradients)
    kept, c, expected = by_hand(trainer)
    for state, other in zip(states, expected, strict=True):
        torch.testing.assert_close(state, other, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        side_vectors.vectors["c"], trainer.layout.write(c), rtol=1e-9, atol=1e-12
    )
    assert set(grid.memories) == {0, 1, 2, 3, 4}
    for k, vectors in grid.memories.items():
        torch.testing.assert_close(
            vectors["c_i"], trainer.layout.write(kept[k]), rtol=1e-9, atol=1e-12
        )


def test_scaffold_is_fedavg_in_its_first_round_and_for_a_single_client():
    work = Work(4, local_epochs=2.0)
    scaffold = trainer_of(Method(SAM(0.1), Scaffold(), loss=Plain()), work=work)
    fedavg = trainer_of(Method(SAM(0.1), FedAvg(), loss=Plain()), work=work)
    ours, theirs = rounds(scaffold)[2], rounds(fedavg)[2]
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=1e-14)
    assert not torch.allclose(ours[1], theirs[1], rtol=1e-3)


def test_only_clients_that_have_trained_have_a_memory():
    trainer = trainer_of(Method(SGD(), Scaffold(), loss=Plain()), work=Work(4))
    assert set(rounds(trainer, cohorts={1: [1, 3]})[0].memories) == {1, 3}
    plain = trainer_of(Method(SGD(), FedAvg(), loss=Plain()), work=Work(4))
    assert rounds(plain)[0].memories == {}


class Poison(Scaffold):
    """Scaffold whose third client returns NaN in the second round."""

    def finish(self, w, local):
        new = super().finish(w, local)
        bad = local.round == 2 and local.steps == 4  # client 2 alone takes four steps
        return {name: v * float("nan") for name, v in new.items()} if bad else new


def test_a_client_that_is_left_out_keeps_what_it_had_and_is_not_folded():
    trainer = trainer_of(Method(SGD(), Poison(), loss=Plain()), work=Work(4))
    cohorts = {1: [0, 2, 4], 2: [0, 2, 4]}
    grid, side_vectors, states = rounds(trainer, cohorts=cohorts)
    first = rounds(trainer, cohorts={1: [0, 2, 4]})[0]
    assert torch.equal(grid.memories[2]["c_i"], first.memories[2]["c_i"])
    assert not torch.equal(grid.memories[0]["c_i"], first.memories[0]["c_i"])
    assert side_vectors.vectors["c"].isfinite().all()
    assert states[-1].isfinite().all()


class Half(FedAvg):
    """A client that forgot what else it needs."""

    exchanged = ("h",)

    def finish(self, w, local):
        return {"h": w}


def test_a_client_that_defines_half_of_it_is_refused():
    with pytest.raises(
        ValueError, match=r"--client Half: exchanges vectors, so it must define fold"
    ):
        Method(SGD(), Half(), loss=Plain())


@pytest.mark.parametrize(
    ("vectors", "says"),
    [
        ({}, r"its record 'exchanged' is missing"),
        ({"c": torch.zeros(3)}, r"'c' is 'float32' \(3,\), the model's is float64"),
        ({"d": torch.zeros(3)}, r"it has the vector 'd', which nobody asked for"),
    ],
)
def test_a_reply_without_its_vectors_or_with_others_is_left_out(vectors, says, caplog):
    trainer = trainer_of(Method(SGD(), Scaffold(), loss=Plain()), work=Work(4))
    side_vectors = SideVectors(trainer.method, trainer.layout, 5)
    record = VectorRecord(trainer.layout, start_of(trainer))
    question = Message(RecordDict(), 0, "train")
    reply = Message(train_reply(record, 1, 1, 0.0, vectors), reply_to=question)
    assert usable([reply], {0: 0}, record, 1, beside=side_vectors.vectors) == []
    assert re.search(says, caplog.text)
