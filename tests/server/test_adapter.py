"""A server method as a Flower Strategy: what the formula is given, and what Flower gets of it."""

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
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedsam import UsageError, as_strategy
from fedsam.base.errors import TrainingError
from fedsam.base.strategy import ServerMethod
from fedsam.base.vector import Layout, weighted_mean
from fedsam.messages import LEARNING_RATE, VectorRecord, only_record, train_reply
from fedsam.server import compat
from fedsam.server.adapter import mean_metrics
from fedsam.server.grids import CohortGrid
from fedsam.server.screening import usable

compat.identify_process()
LAYOUT = Layout.of(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
P = LAYOUT.trainable
W = torch.randn(4, LAYOUT.size, generator=torch.Generator().manual_seed(2))
W[:, LAYOUT.statistics[1]] = W[:, LAYOUT.statistics[1]].abs()  # a variance is not negative
EXAMPLES, STEPS = [1, 20, 300, 4], [7, 5, 3, 1]
FOUR = {"min_train_nodes": 4, "min_available_nodes": 4, "fraction_evaluate": 0.0}
METHODS = {
    "FedAvg": (FedAvg(), flower.FedAvg(**FOUR)),
    "FedAvgM": (
        FedAvgM(0.7, 0.5),
        flower.FedAvgM(server_learning_rate=0.7, server_momentum=0.5, **FOUR),
    ),
    "FedAdam": (FedAdam(0.1), flower.FedAdam(eta=0.1, beta_1=0.9, beta_2=0.99, **FOUR)),
    "FedYogi": (FedYogi(0.1), flower.FedYogi(eta=0.1, beta_1=0.9, beta_2=0.99, **FOUR)),
    "FedAdagrad": (FedAdagrad(0.1), flower.FedAdagrad(eta=0.1, **FOUR)),
}


def started(strategy, nodes=4, round=1, start=None):
    """Return the strategy after it has sent a model, of zeros unless one is given."""
    record = VectorRecord(LAYOUT, torch.zeros(LAYOUT.size) if start is None else start)
    config = ConfigRecord({LEARNING_RATE: 0.1})
    list(strategy.configure_train(round, record, config, CohortGrid(None, range(nodes))))
    return strategy


def reply(node, record=None):
    question = Message(RecordDict(), node, MessageType.TRAIN)
    record = record or VectorRecord(LAYOUT, W[node])  # a row of the cohort's matrix
    return Message(train_reply(record, EXAMPLES[node], STEPS[node], float(node)), reply_to=question)


def replies():
    return [reply(node) for node in range(4)]


class Spy(ServerMethod):
    """Keeps what its formula was handed; its model is what it was told."""

    state = ("v",)
    takes = ("steps", "loss")

    def __init__(self, new=None):
        self.new, self.handed = new, []

    def update(self, w, W, n, state, round, steps=(), loss=()):
        self.handed.append((w, W, n, dict(state), round, steps, loss))
        new = weighted_mean(W, n) if self.new is None else self.new
        return new, {"v": state["v"] + 1}


def test_a_formula_is_handed_parameters_weights_state_round_and_what_it_takes():
    method, start = Spy(), torch.arange(float(LAYOUT.size))
    strategy = started(as_strategy(method, **FOUR), start=start)
    strategy.aggregate_train(1, replies())
    started(strategy, round=2)
    strategy.aggregate_train(2, replies())
    (w, models, n, state, round, steps, loss), second = method.handed
    assert torch.equal(w, start[:P])
    assert [v.data_ptr() for v in models] == [row.data_ptr() for row in W]  # without a copy
    assert [len(v) for v in models] == [P] * 4
    assert (n, round, steps, loss) == (EXAMPLES, 1, STEPS, [0.0, 1.0, 2.0, 3.0])
    assert torch.equal(state["v"], torch.zeros(P))
    assert torch.equal(second[3]["v"], torch.ones(P))
    assert second[4] == 2


def test_what_is_not_trained_is_averaged_whatever_the_formula_does():
    before = W.clone()
    strategy = started(as_strategy(Spy(torch.full((P,), 5.0)), **FOUR))
    arrays, _ = strategy.aggregate_train(1, replies())
    assert arrays.state[:P].eq(5).all()
    assert torch.equal(arrays.state[P:], weighted_mean(W[:, P:], EXAMPLES))
    assert arrays.state.untyped_storage().data_ptr() != W.untyped_storage().data_ptr()
    assert torch.equal(W, before)


def test_fedavg_is_the_mean_weighted_by_examples():
    arrays, metrics = started(as_strategy(FedAvg(), **FOUR)).aggregate_train(1, replies())
    mean = W.double().mul(torch.tensor(EXAMPLES).view(4, 1)).sum(0) / 325
    torch.testing.assert_close(arrays.state.double(), mean, rtol=1e-6, atol=1e-6)
    assert metrics["loss"] == pytest.approx((0 * 1 + 1 * 20 + 2 * 300 + 3 * 4) / 325, rel=1e-12)


def test_fedavg_agrees_with_flowers_and_keeps_integers():
    models = W.clone()
    counter = next(e for e in LAYOUT.entries if e.dtype == torch.int64)
    models[:, counter.offset] = torch.tensor([10.0, 20.0, 30.0, 40.0])
    answers = [reply(k, VectorRecord(LAYOUT, w)) for k, w in enumerate(models)]
    ours, theirs = (
        started(strategy).aggregate_train(1, answers)[0]
        for strategy in (as_strategy(FedAvg(), **FOUR), flower.FedAvg(**FOUR))
    )
    assert list(ours) == list(theirs)
    for name in ours:
        array = ours[name].numpy()
        if name == counter.name:
            assert array.dtype == np.int64
            assert array == round(float(theirs[name].numpy()))
        else:
            np.testing.assert_allclose(array, theirs[name].numpy(), rtol=1e-5, atol=1e-6)


def test_records_that_flower_built_give_the_same_bytes():
    plain = [
        reply(k, ArrayRecord({n: t.clone() for n, t in LAYOUT.read(W[k]).items()}))
        for k in range(4)
    ]
    tensors = [reply(k, VectorRecord(LAYOUT, LAYOUT.write(LAYOUT.read(W[k])))) for k in range(4)]
    models = [
        started(as_strategy(FedAvg(), **FOUR)).aggregate_train(1, answers)[0].state
        for answers in (plain, tensors)
    ]
    assert torch.equal(*models)


def test_equal_clients_are_the_identity_and_nothing_is_changed():
    vector, before = W[0], W[0].clone()
    strategy = started(as_strategy(FedAvg(), **FOUR), start=vector)
    answers = [reply(k, VectorRecord(LAYOUT, vector)) for k in range(4)]
    arrays, _ = strategy.aggregate_train(1, answers)
    torch.testing.assert_close(arrays.state, before, rtol=1e-6, atol=1e-6)
    assert torch.equal(vector, before)


def test_a_single_client_is_returned_as_it_is_but_not_itself():
    arrays, _ = started(as_strategy(FedAvg(), **FOUR)).aggregate_train(1, [reply(2)])
    assert torch.equal(arrays.state, W[2])
    assert arrays.state.data_ptr() != W[2].data_ptr()


def test_replies_sorted_by_client_give_the_same_bytes_in_any_order_of_arrival():
    nodes, before = {node: node for node in range(4)}, VectorRecord(LAYOUT, W[0])

    def averaged(order):
        answers = usable([reply(node) for node in order], nodes, before, 1)
        assert [answer.metadata.src_node_id for answer in answers] == [0, 1, 2, 3]
        return started(as_strategy(FedAvg(), **FOUR)).aggregate_train(1, answers)[0].state

    first = averaged([0, 1, 2, 3])
    for order in ([3, 2, 1, 0], [2, 0, 3, 1], [1, 3, 0, 2]):
        assert torch.equal(averaged(order), first)


@pytest.mark.parametrize("key", ["num-examples", "steps"])
def test_it_weights_by_the_key_it_was_told_as_flowers_does(key):
    ours, theirs = (
        started(make(weighted_by_key=key, **FOUR)).aggregate_train(1, replies())
        for make in (lambda **keys: as_strategy(FedAvg(), **keys), flower.FedAvg)
    )
    for name in ("0.weight", "0.bias", "1.running_var"):
        np.testing.assert_allclose(
            ours[0][name].numpy(), theirs[0][name].numpy(), rtol=1e-5, atol=1e-6
        )
    assert ours[1]["loss"] == pytest.approx(theirs[1]["loss"])


def test_it_aggregates_metrics_as_it_was_told():
    def count(contents, key):
        return MetricRecord({"replies": len(contents)})

    for strategy in (
        flower.FedAvg(train_metrics_aggr_fn=count, **FOUR),
        as_strategy(FedAvg(), train_metrics_aggr_fn=count, **FOUR),
    ):
        assert dict(started(strategy).aggregate_train(1, replies())[1]) == {"replies": 4}


def test_replies_with_errors_are_skipped_and_none_is_none():
    strategy = started(as_strategy(FedNova(), **FOUR))
    question = Message(RecordDict(), 3, MessageType.TRAIN)
    failed = Message(Error(0, "broken"), reply_to=question)
    arrays, _ = strategy.aggregate_train(1, [reply(0), failed])
    torch.testing.assert_close(arrays.state, W[0])
    assert strategy.aggregate_train(1, [failed]) == (None, None)


@pytest.mark.parametrize(
    "method", [FedACG(), FedGloSS(5, rho=0.5), AdaBest(), FedDyn(5)], ids=lambda m: type(m).__name__
)
def test_a_round_that_is_tried_again_sends_and_ends_as_one_that_was_not(method):
    def walk(attempts):
        strategy, models = as_strategy(method, **FOUR), [torch.zeros(LAYOUT.size)]
        for r in (1, 2, 3):
            for _ in range(attempts):
                started(strategy, round=r, start=models[-1])
            models.append(strategy.aggregate_train(r, replies())[0].state)
        return models

    for once, again in zip(walk(1), walk(3), strict=True):
        assert torch.equal(once, again)


def test_what_a_method_sends_reaches_the_clients_and_statistics_are_left_alone():
    strategy, start = as_strategy(FedACG(0.5), **FOUR), torch.arange(float(LAYOUT.size))
    started(strategy, start=start)
    new = strategy.aggregate_train(1, replies())[0].state
    config = ConfigRecord({LEARNING_RATE: 0.1})
    messages = list(
        strategy.configure_train(2, VectorRecord(LAYOUT, new), config, CohortGrid(None, range(4)))
    )
    sent = only_record(messages[0].content.array_records).state
    torch.testing.assert_close(sent[:P], new[:P] + 0.5 * (new[:P] - start[:P]))
    assert torch.equal(sent[P:], new[P:])


class Short(ServerMethod):
    state = ("v",)

    def __init__(self, model, names):
        self.model, self.names = model, names

    def update(self, w, W, n, state, round):
        return self.model, dict.fromkeys(self.names, w)


@pytest.mark.parametrize(("size", "names"), [(P - 1, ["v"]), (P, []), (P, ["v", "u"])])
def test_a_formula_that_returns_something_else_is_named_in_one_line(size, names):
    strategy = started(as_strategy(Short(torch.ones(size), names), **FOUR))
    with pytest.raises(TrainingError, match=r"^Short\.update: returned a model \(\d+,\) with the"):
        strategy.aggregate_train(1, replies())


@pytest.mark.parametrize("wrong", [FedAvg, {}, flower.FedAvg(**FOUR), None])
def test_what_is_no_server_method_is_refused(wrong):
    with pytest.raises(UsageError, match="ServerMethod"):
        as_strategy(wrong)


class PlainGrid(CohortGrid):
    """Clients of somebody who knows only Flower: plain records, another answer each round."""

    def __init__(self):
        super().__init__(None, range(4))

    def moved(self, array, generator):
        noise = 0.1 * generator.standard_normal(array.shape)
        return np.asarray(array + noise).astype(array.dtype)

    def send_and_receive(self, messages, *, timeout=None):
        answers = []
        for message in messages:
            k, r = message.metadata.dst_node_id, message.content["config"]["server-round"]
            generator = np.random.default_rng((k, r))
            moved = {
                name: Array(self.moved(array.numpy(), generator))
                for name, array in message.content["arrays"].items()
            }
            answers.append(reply(k, ArrayRecord(moved)))
        return answers


@pytest.mark.parametrize("name", METHODS)
def test_in_flowers_own_loop_on_plain_records_ours_has_the_numbers_of_flowers(name):
    generator = np.random.default_rng(0)
    start = {"b": generator.standard_normal((2, 3)), "a": generator.standard_normal(4)}
    ours, theirs = (
        strategy.start(
            PlainGrid(),
            ArrayRecord({key: Array(array) for key, array in start.items()}),
            num_rounds=3,
            train_config=ConfigRecord({LEARNING_RATE: 0.1}),
        )
        for strategy in (as_strategy(METHODS[name][0], **FOUR), METHODS[name][1])
    )
    assert list(ours.arrays) == ["b", "a"]
    for key in start:
        array = ours.arrays[key].numpy()
        assert array.dtype == np.float64
        np.testing.assert_allclose(array, theirs.arrays[key].numpy(), rtol=1e-9, atol=1e-11)
        assert np.abs(array - start[key]).min() > 0
    for r in (1, 2, 3):
        assert dict(ours.train_metrics_clientapp[r]) == pytest.approx(
            dict(theirs.train_metrics_clientapp[r])
        )


@pytest.mark.parametrize(
    "method",
    [FedACG(), FedGloSS(9), AdaBest(), FedDyn(9), FedExP(), FedNova()],
    ids=lambda m: type(m).__name__,
)
def test_every_method_runs_in_flowers_own_loop(method):
    start = ArrayRecord({"a": Array(np.ones(5, np.float32)), "n": Array(np.array(3))})
    result = as_strategy(method, **FOUR).start(PlainGrid(), start, num_rounds=3)
    assert result.arrays["a"].numpy().dtype == np.float32
    assert result.arrays["n"].numpy().dtype == np.int64
    assert np.isfinite(result.arrays["a"].numpy()).all()


@given(
    st.lists(
        st.tuples(
            st.integers(1, 1000), st.floats(-1e6, 1e6), st.lists(st.floats(-9, 9), max_size=3)
        ),
        min_size=1,
        max_size=6,
    )
)
def test_the_mean_of_metrics_is_flowers(rows):
    length = min(len(row[2]) for row in rows)
    contents = [
        RecordDict({"any": MetricRecord({"n": n, "loss": loss, "per-class": list(each[:length])})})
        for n, loss, each in rows
    ]
    ours, flowers = mean_metrics(contents, "n"), aggregate_metricrecords(contents, "n")
    assert dict(ours) == dict(flowers)
    assert list(ours) == ["loss", "per-class"]
