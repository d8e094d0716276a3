"""FedAvg's server: no copies, the order of replies, and the arguments it takes from Flower."""

import numpy as np
import pytest
import torch
from fedsam.strategies.fedavg import FedAvg
from flwr.app import ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from torch import nn

from fedsam.base.vector import Layout
from fedsam.messages import LEARNING_RATE, VectorRecord, train_reply
from fedsam.server import compat
from fedsam.server.grids import CohortGrid
from fedsam.server.rounds import usable

compat.identify_process()
LAYOUT = Layout.of(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
W = torch.randn(4, LAYOUT.size, generator=torch.Generator().manual_seed(2))
EXAMPLES, STEPS = [1, 20, 300, 4], [7, 5, 3, 1]
FOUR = {"min_train_nodes": 4, "min_available_nodes": 4, "fraction_evaluate": 0.0}


def started(strategy, nodes=4):
    """Return the strategy after it has sent a model of zeros."""
    record = VectorRecord(LAYOUT, torch.zeros(LAYOUT.size))
    config = ConfigRecord({LEARNING_RATE: 0.1})
    list(strategy.configure_train(1, record, config, CohortGrid(None, range(nodes))))
    return strategy


def reply(node):
    question = Message(RecordDict(), node, MessageType.TRAIN)
    record = VectorRecord(LAYOUT, W[node])  # a row of the cohort's matrix
    return Message(train_reply(record, EXAMPLES[node], STEPS[node], 0.5), reply_to=question)


def replies():
    return [reply(node) for node in range(4)]


class Spy(FedAvg):
    """FedAvg that remembers the tensors its formula was given."""

    def aggregate(self, w, W, n):
        self.given = W
        return super().aggregate(w, W, n)


def test_rows_of_the_cohorts_matrix_reach_the_formula_without_a_copy():
    before = W.clone()
    strategy = started(Spy(**FOUR))
    arrays, _ = strategy.aggregate_train(1, replies())
    assert [v.data_ptr() for v in strategy.given] == [row.data_ptr() for row in W]
    storage = arrays.state.untyped_storage().data_ptr()
    assert storage != W.untyped_storage().data_ptr()  # the result is no view of a client's
    assert torch.equal(W, before)


def test_a_single_client_is_returned_as_it_is_but_not_itself():
    arrays, _ = started(FedAvg(**FOUR)).aggregate_train(1, [reply(2)])
    assert torch.equal(arrays.state, W[2])
    assert arrays.state.data_ptr() != W[2].data_ptr()


def test_replies_sorted_by_client_give_the_same_bytes_in_any_order_of_arrival():
    nodes, before = {node: node for node in range(4)}, VectorRecord(LAYOUT, W[0])
    first, _ = started(FedAvg(**FOUR)).aggregate_train(1, usable(replies(), nodes, before, 1))
    for order in ([3, 2, 1, 0], [2, 0, 3, 1], [1, 3, 0, 2]):
        answers = usable([reply(node) for node in order], nodes, before, 1)
        assert [answer.metadata.src_node_id for answer in answers] == [0, 1, 2, 3]
        again, _ = started(FedAvg(**FOUR)).aggregate_train(1, answers)
        assert torch.equal(again.state, first.state)


@pytest.mark.parametrize("key", ["num-examples", "steps"])
def test_it_weights_by_the_key_it_was_told_as_flowers_does(key):
    ours, theirs = (
        started(make(weighted_by_key=key, **FOUR)).aggregate_train(1, replies())
        for make in (FedAvg, FlowerFedAvg)
    )
    for name in ("0.weight", "0.bias", "1.running_var"):
        np.testing.assert_allclose(
            ours[0][name].numpy(), theirs[0][name].numpy(), rtol=1e-5, atol=1e-6
        )
    assert ours[1]["loss"] == pytest.approx(theirs[1]["loss"])


def test_it_aggregates_metrics_as_it_was_told():
    def count(contents, key):
        return MetricRecord({"replies": len(contents)})

    for make in (FlowerFedAvg, FedAvg):
        strategy = started(make(train_metrics_aggr_fn=count, **FOUR))
        assert dict(strategy.aggregate_train(1, replies())[1]) == {"replies": 4}
