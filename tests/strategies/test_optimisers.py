"""Methods against Flower's own on the same replies or their formulas; what all of them promise."""

import json

import numpy as np
import pytest
import torch
from fedsam.strategies.adabest import AdaBest
from fedsam.strategies.fedacg import FedACG
from fedsam.strategies.fedadagrad import FedAdagrad
from fedsam.strategies.fedadam import FedAdam
from fedsam.strategies.fedavg import FedAvg
from fedsam.strategies.fedavgm import FedAvgM
from fedsam.strategies.feddyn import FedDyn
from fedsam.strategies.fedexp import FedExP
from fedsam.strategies.fedgloss import FedGloSS
from fedsam.strategies.fednova import FedNova
from fedsam.strategies.fedyogi import FedYogi
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import strategy as flower
from torch import nn

from fedsam import as_strategy
from fedsam.base.vector import Layout
from fedsam.config.plugins import build
from fedsam.messages import LEARNING_RATE, VectorRecord, state_of, train_reply
from fedsam.server import compat
from fedsam.server.grids import CohortGrid

compat.identify_process()
PLAIN = Layout.of(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).double())
NORMED = Layout.of(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double())
CLIENTS, EXAMPLES, STEPS = 8, [1, 20, 300, 4, 9, 60, 7, 33], [7, 5, 3, 1, 2, 2, 4, 6]
FLOWER = {"min_train_nodes": CLIENTS, "min_available_nodes": CLIENTS, "fraction_evaluate": 0.0}


def state(layout, *seed):
    generator = torch.Generator().manual_seed(sum(7**i * s for i, s in enumerate(seed)) + 1)
    return torch.randn(layout.size, generator=generator, dtype=torch.float64)


def rounds(strategy, layout=PLAIN, count=4, clients=CLIENTS):
    """Return the strategy's models over rounds in which each client answers with its own noise."""
    w, models = state(layout, 99), []
    for r in range(1, count + 1):
        config = ConfigRecord({LEARNING_RATE: 0.1})
        record = VectorRecord(layout, w)
        list(strategy.configure_train(r, record, config, CohortGrid(None, range(clients))))
        replies = []
        for k in range(clients):
            question = Message(RecordDict(), k, MessageType.TRAIN)
            moved = VectorRecord(layout, w + 0.1 * state(layout, r, k))
            content = train_reply(moved, EXAMPLES[k], STEPS[k], 0.5)
            replies.append(Message(content, reply_to=question))
        new, _ = strategy.aggregate_train(r, replies)
        w = state_of(new, layout)
        models.append(w)
    return models


def updates(layout, w, r):
    return torch.stack([0.1 * state(layout, r, k) for k in range(CLIENTS)])


@pytest.mark.parametrize(
    ("ours", "options"),
    [
        (FedAvgM, {"server_momentum": 0.9}),
        (FedAvgM, {"server_momentum": 0.5, "server_learning_rate": 0.3}),
        (FedAvgM, {"server_momentum": 0.0}),
        (FedAdam, {}),
        (FedAdam, {"eta": 0.1, "beta_1": 0.5, "beta_2": 0.7, "tau": 0.1}),
        (FedYogi, {}),
        (FedYogi, {"eta": 0.1, "beta_1": 0.5, "beta_2": 0.7, "tau": 0.1}),
        (FedAdagrad, {"eta": 0.1}),
        (FedAdagrad, {"eta": 0.01, "tau": 0.1}),
    ],
    ids=str,
)
def test_a_server_optimiser_has_flowers_numbers(ours, options):
    theirs = getattr(flower, ours.__name__)
    defaults = {} if ours is FedAvgM else {"eta": 0.01}
    mine = rounds(as_strategy(ours(**options), **FLOWER))
    for a, b in zip(mine, rounds(theirs(**(defaults | options), **FLOWER)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert not torch.equal(mine[0], mine[1])


@pytest.mark.parametrize("method", [FedAvgM, FedAdam, FedYogi, FedAdagrad, FedExP])
def test_statistics_that_are_not_trained_are_averaged(method):
    P = NORMED.trainable
    (plain,) = rounds(as_strategy(FedAvg(), **FLOWER), NORMED, 1)
    (ours,) = rounds(as_strategy(method(), **FLOWER), NORMED, 1)
    torch.testing.assert_close(ours[P:], plain[P:])
    assert len(ours[P:]) == 5


def test_fedexp_is_its_formula():
    w, epsilon = state(PLAIN, 99), 0.01
    p = torch.tensor(EXAMPLES).double() / sum(EXAMPLES)
    for r, model in enumerate(rounds(as_strategy(FedExP(epsilon), **FLOWER)), 1):
        D = updates(PLAIN, w, r)
        d = (p[:, None] * D).sum(0)
        rate = max(1.0, float((p * D.square().sum(1)).sum() / (2 * (d.square().sum() + epsilon))))
        w = w + rate * d
        torch.testing.assert_close(model, w, rtol=1e-9, atol=1e-11)


def test_fedexps_rate_is_half_the_clients_where_their_updates_are_orthogonal():
    method, w = FedExP(1e-12), torch.zeros(PLAIN.size, dtype=torch.float64)
    W = list(torch.eye(PLAIN.size, dtype=torch.float64)[:10])
    torch.testing.assert_close(method.update(w, W, [1.0] * 10, {}, 1)[0], 5 * sum(W) / 10)
    same = [W[0]] * 10  # equal updates: FedAvg
    torch.testing.assert_close(method.update(w, same, [1.0] * 10, {}, 1)[0], W[0])


METHODS = [
    *(AdaBest(), FedACG(), FedAdagrad(), FedAdam(), FedAvg(), FedAvgM(), FedDyn(9), FedExP()),
    *(FedGloSS(9), FedNova(), FedYogi()),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_a_formula_changes_nothing_that_it_is_given_and_keeps_its_state(method):
    w, W = state(PLAIN, 99), [state(PLAIN, 1, k) for k in range(3)]
    old, taken = dict(method.start(w)), {name: [3.0, 4.0, 5.0] for name in method.takes}
    assert set(old) == set(method.state)
    inputs = [w, *W, *old.values()]
    before = [v.clone() for v in inputs]
    for r in (1, 2):
        sent = method.send(w, old, r)
        new, vectors = method.update(w, W, [1.0, 2.0, 3.0], old, r, **taken)
        assert set(vectors) == set(method.state)
        for v in (sent, new, *vectors.values()):
            assert (v.shape, v.dtype) == (w.shape, w.dtype)
            assert v.isfinite().all()
        assert all(map(torch.equal, inputs, before))
        old, inputs = vectors, [w, *W, *vectors.values()]
        before = [v.clone() for v in inputs]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_the_order_of_clients_does_not_matter(method):
    w, W = state(PLAIN, 99), [state(PLAIN, 1, k) for k in range(3)]
    n, steps, old = [1.0, 2.0, 3.0], [3.0, 4.0, 5.0], method.start(w)

    def updated(order):
        taken = {name: [steps[k] for k in order] for name in method.takes}
        return method.update(w, [W[k] for k in order], [n[k] for k in order], old, 1, **taken)[0]

    torch.testing.assert_close(updated([2, 0, 1]), updated([0, 1, 2]), rtol=1e-12, atol=1e-12)


def test_a_run_fills_what_has_no_default_or_is_asked_for():
    run = {"clients": 50, "momentum": 0.9}
    assert build("strategy", FedDyn, {}, **run).clients == 50
    assert build("strategy", FedNova, {}, **run).momentum == 0.9
    assert build("strategy", FedNova, {"momentum": 0.5}, **run).momentum == 0.5
    assert build("strategy", FedAdam, {"eta": 0.5}, **run).eta == 0.5


def vectors():
    w = state(PLAIN, 99)
    return torch.stack([w + 0.1 * state(PLAIN, 1, k) for k in range(CLIENTS)]).numpy()


def trimmed(W):
    """Without the lowest and the highest of each element: int(0.2 * 8) = 1."""
    return np.sort(W, axis=0)[1:-1].mean(0)


def krum_order(W, malicious=1):
    scores = []
    for k, w in enumerate(W):
        others = sorted(np.square(w - v).sum() for i, v in enumerate(W) if i != k)
        scores.append(sum(others[: len(W) - malicious - 2]))
    return np.argsort(scores)


def multikrum(W):
    chosen = krum_order(W)[:3]
    return np.average(W[chosen], axis=0, weights=np.array(EXAMPLES)[chosen])


def bulyan(W):
    """theta = K - 2 f models by Krum's score, of which the K - 4 f nearest to their median."""
    chosen = W[krum_order(W)[:6]]
    far = np.abs(chosen - np.median(chosen, axis=0))
    nearest = np.argsort(far, axis=0)[:4]
    return np.take_along_axis(chosen, nearest, axis=0).mean(0)


@pytest.mark.parametrize(
    ("name", "options", "naive"),
    [
        ("FedMedian", {}, lambda W: np.median(W, axis=0)),
        ("FedTrimmedAvg", {"beta": 0.2}, trimmed),
        ("Krum", {"num_malicious_nodes": 1}, lambda W: W[krum_order(W)[0]]),
        ("MultiKrum", {"num_malicious_nodes": 1, "num_nodes_to_select": 3}, multikrum),
        ("Bulyan", {"num_malicious_nodes": 1}, bulyan),
    ],
)
def test_flowers_robust_strategies_give_the_naive_result_on_our_records(name, options, naive):
    (model,) = rounds(getattr(flower, name)(**options, **FLOWER), count=1)
    np.testing.assert_allclose(model.numpy(), naive(vectors()), rtol=1e-9, atol=1e-11)


ROBUST = {
    "FedMedian": {},
    "FedTrimmedAvg": {"beta": 0.2},
    "Krum": {"num_malicious_nodes": 1},
    "MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 3},
    "Bulyan": {"num_malicious_nodes": 1},
}


@pytest.mark.parametrize("name", ROBUST)
def test_flowers_robust_strategies_train_on_the_local_engine(quick, name):
    outcome = quick(
        strategy=f"flwr.serverapp.strategy:{name}",
        strategy_options=ROBUST[name],
        clients_per_round=7,
        alpha=100,
        rounds=2,
    )
    line = json.loads((outcome.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert outcome.summary["rounds"] == 2
    assert line["update_norm"] > 0
