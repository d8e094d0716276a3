"""Averages around any strategy against arithmetic: members, rates, copies."""

import pytest
import torch
from fedsam.strategies.averages.ema import EMA
from fedsam.strategies.averages.swa import SWA
from fedsam.strategies.averages.wima import WiMA
from fedsam.strategies.fedavg import FedAvg
from flwr.app import ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvgM
from torch import nn

from fedsam import as_strategy
from fedsam.base.vector import Layout
from fedsam.messages import LEARNING_RATE, VectorRecord, only_record, state_of, train_reply
from fedsam.server import compat
from fedsam.server.grids import CohortGrid
from fedsam.server.wrapped import Averaged, Wrapped

LAYOUT = Layout.of(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
compat.identify_process()
FOUR = {"min_train_nodes": 4, "min_available_nodes": 4, "fraction_evaluate": 0.0}


class Nodes(CohortGrid):
    """A grid of which only the node ids are asked."""

    def __init__(self, count=4):
        super().__init__(None, range(count))


def state(seed):
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(LAYOUT.size, generator=generator)
    counter = next(e for e in LAYOUT.entries if e.dtype == torch.int64)
    vector[counter.offset] = 10 * seed
    return vector


def reply(node, vector, examples, record=None):
    question = Message(RecordDict(), node, MessageType.TRAIN)
    arrays = record if record is not None else VectorRecord(LAYOUT, vector)
    return Message(train_reply(arrays, examples, 3, float(node)), reply_to=question)


def config(lr=0.1):
    return ConfigRecord({LEARNING_RATE: lr})


VECTORS = [state(k) for k in (1, 2, 3, 4)]


class Walk(Wrapped):
    """A strategy whose model after round r is r everywhere."""

    def aggregate_train(self, server_round, replies):
        _, metrics = super().aggregate_train(server_round, replies)
        return VectorRecord(LAYOUT, torch.full((LAYOUT.size,), float(server_round))), metrics


def walk(rule, rounds, observe=lambda r, a, s: None):
    """Drive an average through rounds of ``Walk``; return it and the learning rates it sent."""
    strategy, rates = Averaged(Walk(as_strategy(FedAvg(), **FOUR)), rule), {}
    arrays = VectorRecord(LAYOUT, torch.zeros(LAYOUT.size))
    for r in range(1, rounds + 1):
        mine = config(0.01)
        messages = list(strategy.configure_train(r, arrays, mine, Nodes()))
        assert dict(mine) == {LEARNING_RATE: 0.01}  # the caller's record is left alone
        rates[r] = messages[0].content["config"][LEARNING_RATE]
        arrays, _ = strategy.aggregate_train(r, [reply(0, VECTORS[0], 1)])
        assert arrays.state.eq(r).all()
        observe(r, arrays, strategy)
    return strategy, rates


def members(rule, rounds):
    return [r for r in range(1, rounds + 1) if rule.collects(r)]


def test_swa_collects_at_the_ends_of_the_papers_cycles():
    rule = SWA(7500, 10, 1e-4)
    assert members(rule, 10_000) == list(range(7510, 10_001, 10))
    assert rule.rate(7500, 0.01) == 0.01
    assert rule.rate(7501, 0.01) == pytest.approx(0.9 * 0.01 + 0.1 * 1e-4)
    assert all(rule.rate(r, 0.01) == pytest.approx(1e-4) for r in members(rule, 10_000))


def test_swa_follows_the_official_code_on_request():
    # there, rounds are counted from 0: i = 7510, ..., 9990, 249 models, each after the round with
    # the highest learning rate of its cycle
    rule = SWA(7500, 10, 1e-4, phase="official")
    indices = [r - 1 for r in members(rule, 10_000)]
    assert indices == list(range(7510, 9991, 10))
    assert len(indices) == 249
    assert rule.rate(7511, 0.01) == pytest.approx(0.00901)
    for r in range(7501, 7541):
        t = (((r - 1) % 10) + 1) / 10
        assert rule.rate(r, 0.01) == pytest.approx((1 - t) * 0.01 + t * 1e-4)


def test_a_start_between_cycles_still_collects_at_the_lowest_rate():
    rule = SWA(3, 4, 1e-4)
    assert members(rule, 16) == [7, 11, 15]
    assert [rule.rate(r, 0.01) for r in (7, 11, 15)] == pytest.approx([1e-4] * 3)


def test_swa_is_the_arithmetic_mean_of_its_members():
    strategy, rates = walk(SWA(4, 3, 1e-4), 14)
    assert strategy.members == 3
    assert strategy.state.tolist() == pytest.approx([(7 + 10 + 13) / 3] * LAYOUT.size, rel=1e-6)
    assert [rates[r] for r in (1, 4)] == [0.01, 0.01]
    assert rates[7] == pytest.approx(1e-4)


def test_a_cycle_of_one_keeps_the_learning_rate():
    strategy, rates = walk(SWA(2, 1, 1e-4), 6)
    assert set(rates.values()) == {0.01}
    assert strategy.state[0] == pytest.approx((3 + 4 + 5 + 6) / 4)


def test_the_averaged_model_is_a_copy_that_is_evaluated_from_its_start_on():
    evaluated = {}

    def observe(r, arrays, strategy):
        evaluated[r] = float(strategy.model(arrays).state[0])
        if strategy.state is not None:
            # spoil the live model: the average must not see it
            arrays.state.fill_(r)

    walk(SWA(4, 3, 1e-4), 8, observe)
    # plain to round 4; then the model of round 4 until the first cycle ends, then the mean
    assert evaluated == {1: 1, 2: 2, 3: 3, 4: 4, 5: 4, 6: 4, 7: 7, 8: 7}


@pytest.mark.parametrize("rule", [SWA(0, 1), EMA(0), WiMA(0)], ids=lambda r: type(r).__name__)
def test_later_changes_of_the_live_model_do_not_reach_the_average(rule):
    strategy = Averaged(as_strategy(FedAvg(), **FOUR), rule)
    arrays = VectorRecord(LAYOUT, torch.zeros(LAYOUT.size))
    list(strategy.configure_train(1, arrays, config(), Nodes()))
    arrays.state.fill_(7.0)
    new, _ = strategy.aggregate_train(1, [reply(0, torch.ones(LAYOUT.size), 1)])
    before = strategy.state.clone()
    new.state.fill_(9.0)
    assert torch.equal(strategy.state, before)
    assert strategy.state[0] == pytest.approx(0.01 if isinstance(rule, EMA) else 1.0)


def test_ema_has_its_closed_form():
    strategy, rates = walk(EMA(2, decay=0.9), 6)
    expected = 0.9**4 * 2 + sum(0.1 * 0.9 ** (6 - r) * r for r in (3, 4, 5, 6))
    assert strategy.state[0] == pytest.approx(expected, rel=1e-6)
    assert set(rates.values()) == {0.01}


@pytest.mark.parametrize(
    ("window", "mean"), [(3, (6 + 7 + 8) / 3), (100, (3 + 4 + 5 + 6 + 7 + 8) / 6), (1, 8)]
)
def test_wima_is_the_mean_of_the_last_models(window, mean):
    strategy, _ = walk(WiMA(2, window=window), 8)
    assert strategy.state[0] == pytest.approx(mean, rel=1e-6)


def test_an_average_around_flowers_strategy_leaves_its_path_alone():
    def path(wrap):
        strategy = wrap(FedAvgM(server_momentum=0.5, **FOUR))
        arrays, out = VectorRecord(LAYOUT, state(0)), []
        for r in (1, 2, 3):
            list(strategy.configure_train(r, arrays, config(), Nodes()))
            new, _ = strategy.aggregate_train(r, [reply(0, state(r), 1), reply(1, state(r + 9), 3)])
            arrays = VectorRecord(LAYOUT, state_of(new, LAYOUT))
            out.append(arrays.state)
        return torch.stack(out)

    plain = path(lambda s: s)
    assert torch.equal(path(lambda s: Averaged(s, EMA(1))), plain)


def test_flowers_own_loop_evaluates_the_average():
    class Echo(Nodes):
        """Answers each train message with the model plus one."""

        def send_and_receive(self, messages, *, timeout=None):
            out = []
            for message in messages:
                vector = only_record(message.content.array_records).state + 1
                out.append(
                    Message(train_reply(VectorRecord(LAYOUT, vector), 1, 1, 0.0), reply_to=message)
                )
            return out

    seen = {}
    strategy = Averaged(as_strategy(FedAvg(), **FOUR), SWA(1, 1))
    strategy.start(
        Echo(),
        VectorRecord(LAYOUT, torch.zeros(LAYOUT.size)),
        num_rounds=4,
        train_config=config(),
        evaluate_fn=lambda r, a: seen.update({r: float(a.state[0])}) or MetricRecord({"x": 1}),
    )
    assert seen == {0: 0, 1: 1, 2: 2, 3: 2.5, 4: 3}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SWA(0, phase="start"), "phase"),
        (lambda: EMA(0, decay=1.0), "decay"),
        (lambda: WiMA(0, window=0), "window"),
    ],
)
def test_averages_refuse_what_makes_no_sense(make, says):
    with pytest.raises(ValueError, match=f"^{says}: must"):
        make()
