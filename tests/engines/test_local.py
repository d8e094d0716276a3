"""The local engine as a Grid: what it answers, and that the rounds leave room for Flower."""

import subprocess
import sys

import pytest
import torch
from conftest import quick_config
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp.strategy import FedAvg

from fedsam.base.errors import TrainingError
from fedsam.engines import flower
from fedsam.engines.flower import RollCall
from fedsam.engines.local import LocalGrid
from fedsam.engines.threads import ThreadExecutor
from fedsam.messages import ARRAYS, CONFIG, EXAMPLES, LEARNING_RATE, ROUND, only_record
from fedsam.server.rounds import play
from fedsam.simulate.build.strategy import new_strategy
from fedsam.simulate.build.trainer import new_trainer


@pytest.fixture
def local(tmp_path):
    config = quick_config(tmp_path / "unused")
    trainer, initial = new_trainer(config)
    threads = ThreadExecutor(trainer, 2)
    yield LocalGrid(threads), initial, config
    threads.close()


def train_message(node, record, round=1):
    config = ConfigRecord({ROUND: round, LEARNING_RATE: 0.1})
    content = RecordDict({ARRAYS: record, CONFIG: config})
    return Message(content, node, MessageType.TRAIN)


def state(reply):
    return only_record(reply.content.array_records).state


def test_nodes_are_partitions_and_replies_come_by_client(local):
    grid, initial, _ = local
    assert list(grid.get_node_ids()) == list(range(20))
    before = initial.state.clone()
    replies = list(grid.send_and_receive([train_message(k, initial) for k in (7, 2, 11)]))
    assert [reply.metadata.src_node_id for reply in replies] == [2, 7, 11]
    sizes = [int(grid.trainer.partition.sizes[k]) for k in (2, 7, 11)]
    counts = [only_record(reply.content.metric_records)[EXAMPLES] for reply in replies]
    assert counts == sizes
    assert torch.equal(initial.state, before)
    assert len({state(reply).data_ptr() for reply in replies}) == 3


def test_a_client_does_not_depend_on_its_company(local):
    grid, initial, _ = local
    alone = list(grid.send_and_receive([train_message(4, initial)]))
    together = list(grid.send_and_receive([train_message(k, initial) for k in range(10)]))
    assert torch.equal(state(alone[0]), state(together[4]))
    later = list(grid.send_and_receive([train_message(4, initial, round=2)]))
    assert not torch.equal(state(alone[0]), state(later[0]))


def test_pushed_messages_are_pulled_once(local):
    grid, initial, _ = local
    ids = list(grid.push_messages([train_message(3, initial), train_message(5, initial)]))
    assert len(set(ids)) == 2
    assert [r.metadata.src_node_id for r in grid.pull_messages(ids[1:])] == [5]
    assert [r.metadata.src_node_id for r in grid.pull_messages(ids)] == [3]
    assert list(grid.pull_messages(ids)) == []


def test_evaluate_messages_are_answered_on_the_clients_own_images(local):
    grid, initial, _ = local
    content = RecordDict({ARRAYS: initial, CONFIG: ConfigRecord()})
    (reply,) = grid.send_and_receive([Message(content, 6, MessageType.EVALUATE)])
    metrics = only_record(reply.content.metric_records)
    rows = grid.trainer.partition[6]
    assert metrics[EXAMPLES] == len(rows)
    module = grid.trainer.new_module().eval()
    module.load_state_dict(initial.layout.read(initial.state))
    batch = grid.trainer.train.rows(rows)
    loss = torch.nn.functional.cross_entropy(module(batch.images), batch.targets).detach()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_other_messages_are_answered_with_an_error(local, monkeypatch):
    grid, _, _ = local
    monkeypatch.setattr(flower, "SETTLED", 0.0)
    (reply,) = grid.send_and_receive([Message(RecordDict(), 0, MessageType.QUERY)])
    assert reply.has_error()
    assert "'query'" in reply.error.reason
    with pytest.raises(TrainingError, match=r"no node holds partition 0 .*does not answer 'query'"):
        RollCall(grid, 20)


def test_evaluation_does_not_depend_on_the_number_of_threads(local):
    grid, initial, _ = local
    results = []
    for threads in (1, 2, 3):
        executor = ThreadExecutor(grid.trainer, threads)
        results.append(executor.evaluate(initial.state, grid.trainer.train))
        executor.close()
    assert results[0] == results[1] == results[2]


def test_flowers_own_loop_runs_on_the_local_engine(local):
    """Somebody who knows only Flower: Strategy.start with federated evaluation."""
    grid, initial, _ = local
    strategy = FedAvg(fraction_train=0.25, fraction_evaluate=0.5, min_available_nodes=20)
    result = strategy.start(
        grid, initial, num_rounds=2, train_config=ConfigRecord({LEARNING_RATE: 0.1})
    )
    assert set(result.train_metrics_clientapp) == {1, 2}
    assert 0 <= result.evaluate_metrics_clientapp[2]["accuracy"] <= 1
    assert len(result.arrays) == len(initial)


def test_rounds_can_be_taken_one_by_one(local):
    grid, initial, config = local
    turns = play(
        new_strategy(config),
        grid,
        initial,
        rounds=range(1, 4),
        sample=lambda r, attempt: [r, r + 1, r + 3, 8, 9],
        seed=0,
        lr=lambda round: 0.1,
        node_of=range(20),
    )
    first, second = next(turns), next(turns)
    assert first.clients == [1, 2, 4, 8, 9]
    assert second.clients == [2, 3, 5, 8, 9]
    on = play(
        new_strategy(config),
        grid,
        first.arrays,
        rounds=[2],
        sample=lambda r, attempt: [r, r + 1, r + 3, 8, 9],
        seed=0,
        lr=lambda round: 0.1,
        node_of=range(20),
    )
    assert torch.equal(next(on).arrays.state, second.arrays.state)


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu(quick):
    from safetensors.torch import load_file

    options = {"algorithm": "fedasam", "rounds": 3}
    cpu, cuda = quick(device="cpu", **options), quick(device="cuda", **options)
    a, b = (load_file(o.folder / "model.safetensors") for o in (cpu, cuda))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


def test_no_thread_outlives_a_run(tmp_path):
    code = (
        "import threading, sys\n"
        "from fedsam.simulate.__main__ import main\n"
        f"code = main(['--rounds', '2', '--quiet', '--out', {str(tmp_path / 'run')!r}])\n"
        "left = [t.name for t in threading.enumerate() if t.name.startswith('fedsam')]\n"
        "sys.exit(code or len(left))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
