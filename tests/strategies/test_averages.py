"""Averages: exact means over long runs, what is sent to be evaluated, and what is left alone."""

import math

import pytest
import torch
from fedsam.strategies.averages.ema import EMA
from fedsam.strategies.averages.swa import SWA
from fedsam.strategies.averages.wima import WiMA
from fedsam.strategies.fedavg import FedAvg
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp.strategy import FedAvgM
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedsam import as_strategy
from fedsam.base.vector import Layout
from fedsam.messages import LEARNING_RATE, VectorRecord, only_record, state_of, train_reply
from fedsam.server import compat
from fedsam.server.grids import CohortGrid
from fedsam.server.wrapped import Averaged, Wrapped

compat.identify_process()
LAYOUT = Layout.of(nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2)))
NODES = CohortGrid(None, range(2))
TWO = {"min_train_nodes": 2, "min_available_nodes": 2}


class Walk(Wrapped):
    """A strategy whose global models are those of a list."""

    def __init__(self, models):
        super().__init__(as_strategy(FedAvg(), min_evaluate_nodes=2, **TWO))
        self.models = iter(models)

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        return arrays and VectorRecord(LAYOUT, next(self.models).clone()), metrics


def reply(node, vector):
    question = Message(RecordDict(), node, MessageType.TRAIN)
    return Message(train_reply(VectorRecord(LAYOUT, vector), 1, 1, 0.0), reply_to=question)


def walk(rule, models, start=None, spoil=False):
    """Drive ``rule`` through the global models; return the ``Averaged`` and the rates it sent."""
    strategy, rates = Averaged(Walk(models), rule), []
    arrays = VectorRecord(LAYOUT, torch.zeros(LAYOUT.size) if start is None else start)
    for r in range(1, len(models) + 1):
        config = ConfigRecord({LEARNING_RATE: 0.01})
        messages = list(strategy.configure_train(r, arrays, config, NODES))
        rates.append(messages[0].content["config"][LEARNING_RATE])
        sent = arrays
        arrays, _ = strategy.aggregate_train(r, [reply(0, models[r - 1])])
        if spoil:
            sent.state.fill_(float("nan"))
    return strategy, rates


def models_of(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, LAYOUT.size, generator=generator))


def exact_mean(vectors):
    columns = torch.stack(list(vectors)).double().T.tolist()
    return torch.tensor([math.fsum(c) / len(c) for c in columns], dtype=torch.float64)


def assert_is(state, expected, atol):
    torch.testing.assert_close(state.double(), expected, rtol=0, atol=atol)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 8), st.integers(1, 5), st.integers(1, 25), st.sampled_from(["end", "official"])
)
def test_swa_is_the_mean_of_every_cth_model_after_its_start(start, cycle, rounds, phase):
    models = models_of(rounds)
    strategy, _ = walk(SWA(start, cycle, phase=phase), models)
    first = start + cycle + (phase == "official")  # 1-based round of the first member
    members = models[first - 1 :: cycle]
    assert strategy.members == len(members)
    if members:
        assert_is(strategy.state, exact_mean(members), atol=1e-6)
    elif rounds > start > 0:  # the model at the start stands in, and is no member later
        assert torch.equal(strategy.state, models[start - 1])
    elif rounds <= start:
        assert strategy.state is None


def test_swa_of_the_papers_length_is_exact_to_float32():
    models = models_of(260)
    strategy, _ = walk(SWA(10, 1), models)
    assert strategy.members == 250
    assert_is(strategy.state, exact_mean(models[10:]), atol=1e-6)


@pytest.mark.parametrize("cycle", [2, 4, 10])
def test_swas_rate_falls_linearly_over_each_cycle(cycle):
    rule = SWA(6, cycle, 1e-4)
    for r in range(7, 7 + 3 * cycle):
        t = ((r - 7) % cycle + 1) / cycle
        assert rule.rate(r, 0.01) == pytest.approx((1 - t) * 0.01 + t * 1e-4, rel=1e-12)
    assert [rule.rate(r, 0.01) for r in range(1, 7)] == [0.01] * 6


def test_swa_sends_the_rates_it_promises():
    rule = SWA(2, 3, 1e-4)
    _, rates = walk(rule, models_of(9))
    assert rates == [rule.rate(r, 0.01) for r in range(1, 10)]


@pytest.mark.parametrize("rule", [EMA(2), WiMA(2, 3), SWA(2, 1)], ids=lambda r: type(r).__name__)
def test_the_rate_is_left_alone_where_nothing_cycles(rule):
    assert walk(rule, models_of(6))[1] == [0.01] * 6


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 6), st.integers(1, 6), st.integers(1, 20))
def test_wima_is_the_mean_of_its_window(start, window, rounds):
    models = models_of(rounds)
    strategy, _ = walk(WiMA(start, window), models)
    inside = models[start:][-window:]
    if inside:
        assert_is(strategy.state, exact_mean(inside), atol=1e-6)
    else:
        assert strategy.state is None


def test_wimas_running_sum_does_not_drift():
    # large models first: a float32 sum would keep their rounding errors for ever
    models = [1e4 * m for m in models_of(300)] + models_of(20, seed=2)
    strategy, _ = walk(WiMA(0, 10), models)
    assert_is(strategy.state, exact_mean(models[-10:]), atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_ema_is_its_recursion(decay):
    models = models_of(12)
    strategy, _ = walk(EMA(4, decay), models)
    expected = models[3].double()
    for w in models[4:]:
        expected = decay * expected + (1 - decay) * w.double()
    assert_is(strategy.state, expected, atol=1e-6)


@pytest.mark.parametrize(
    "rule", [lambda: EMA(1, 0.5), lambda: WiMA(1, 3), lambda: SWA(1, 2)], ids=["ema", "wima", "swa"]
)
def test_no_average_looks_at_a_model_again_after_its_round(rule):
    clean, _ = walk(rule(), models_of(9))
    spoiled, _ = walk(rule(), models_of(9), spoil=True)
    assert torch.equal(spoiled.state, clean.state)


def test_integers_stay_integers_in_an_averaged_model():
    models = models_of(3)
    counter = next(e for e in LAYOUT.entries if e.dtype == torch.int64)
    for r, w in enumerate(models):
        w[counter.offset] = 10 * r + 1
    strategy, _ = walk(SWA(0, 1), models)
    record = strategy.model(VectorRecord(LAYOUT, models[-1]))
    value = record[counter.name].numpy()
    assert value.dtype == "int64"
    assert value == 11


def test_clients_evaluate_the_average_from_its_start_on():
    models = [torch.full((LAYOUT.size,), float(r)) for r in range(1, 6)]
    strategy, seen = Averaged(Walk(models), SWA(2, 1)), []
    arrays = VectorRecord(LAYOUT, torch.zeros(LAYOUT.size))
    for r in range(1, 6):
        list(strategy.configure_train(r, arrays, ConfigRecord(), NODES))
        arrays, _ = strategy.aggregate_train(r, [reply(0, models[0])])
        messages = list(strategy.configure_evaluate(r, arrays, ConfigRecord(), NODES))
        seen.append(float(only_record(messages[0].content.array_records).state[0]))
    assert seen == pytest.approx([1, 2, 3, 3.5, 4])


def test_a_failed_round_adds_no_member():
    strategy = Averaged(Walk(models_of(2)), SWA(0, 1))
    arrays = VectorRecord(LAYOUT, torch.zeros(LAYOUT.size))
    list(strategy.configure_train(1, arrays, ConfigRecord(), NODES))
    assert strategy.aggregate_train(1, []) == (None, None)
    assert strategy.members == 0
    assert strategy.state.eq(0).all()


@pytest.mark.parametrize("rule", [EMA(1, 0.5), WiMA(0, 2)], ids=["ema", "wima"])
def test_flowers_fedavgm_walks_the_same_path_inside_an_average(rule):
    def path(strategy):
        arrays, out = VectorRecord(LAYOUT, torch.ones(LAYOUT.size)), []
        for r in range(1, 5):
            config = ConfigRecord({LEARNING_RATE: 0.01})
            list(strategy.configure_train(r, arrays, config, NODES))
            clients = models_of(2, seed=r)
            new, _ = strategy.aggregate_train(r, [reply(k, v) for k, v in enumerate(clients)])
            arrays = VectorRecord(LAYOUT, state_of(new, LAYOUT))
            out.append(arrays.state)
        return out

    plain = path(FedAvgM(server_momentum=0.9, **TWO))
    averaged = Averaged(FedAvgM(server_momentum=0.9, **TWO), rule)
    assert all(torch.equal(a, b) for a, b in zip(path(averaged), plain, strict=True))
    expected = exact_mean(plain[-2:])
    if isinstance(rule, EMA):
        expected = plain[0].double()
        for w in plain[1:]:
            expected = 0.5 * expected + 0.5 * w.double()
    assert_is(averaged.state, expected, atol=1e-5)
