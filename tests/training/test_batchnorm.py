"""What becomes of BatchNorm's statistics: of the mixture, of each client, of training images."""

from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from cohorts import trainer_of
from conftest import quick_config
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import update_bn

from fedsam import client_app
from fedsam.base.errors import UsageError
from fedsam.base.system import Interrupted, Stop
from fedsam.base.vector import Layout
from fedsam.data.images import Images
from fedsam.data.plan import Work
from fedsam.engines.codec import pack
from fedsam.engines.local import LocalGrid
from fedsam.engines.threads import ThreadExecutor
from fedsam.messages import (
    ARRAYS,
    CONFIG,
    LEARNING_RATE,
    MEMORY,
    PARTITION,
    ROUND,
    only_record,
    plain_record,
    state_of,
    vectors_of,
)
from fedsam.server.rounds import play
from fedsam.simulate.build.strategy import new_strategy
from fedsam.simulate.build.trainer import new_trainer
from fedsam.training.batchnorm import layers, pooled
from fedsam.training.client import STATISTICS, ClientJob

NORMED = {"model": "resnet20", "model_options": {"norm": "batch"}, "clients": 6}
SMALL = {**NORMED, "clients_per_round": 3, "local_steps": 2, "batch_size": 8, "rounds": 2}


def net():
    """Two norms, a frozen weight and dropout, 3 classes of 2 x 8 x 8 images."""
    torch.manual_seed(4)
    module = nn.Sequential(
        *(nn.Conv2d(2, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Flatten(), nn.BatchNorm1d(36), nn.Linear(36, 3)),
    )
    module[-1].bias.requires_grad_(False)
    return module.double()


def without_dropout():
    module = net()
    module[3] = nn.Identity()
    return module


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_pooled_statistics_are_those_of_all_images_together(data):
    """Clients of any size, each with the mean and variance of its own images."""
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    layout = Layout.of(net())
    channels = 4 + 36
    samples = [rng.normal(rng.normal(0, 5), rng.uniform(0.1, 3), (n, channels)) for n in sizes]
    state = torch.from_numpy(rng.normal(size=layout.size))
    where = layout.statistics
    states = []
    for sample in samples:
        mine = state + 1
        mine[where[0]] = torch.from_numpy(sample.mean(0))
        mine[where[1]] = torch.from_numpy(sample.var(0))
        states.append(mine)
    before = state.clone()
    new = pooled(state, states, sizes, layout)
    everything = np.concatenate(samples)
    np.testing.assert_allclose(new[where[0]], everything.mean(0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(new[where[1]], everything.var(0), rtol=1e-9, atol=1e-12)
    rest = torch.ones(layout.size, dtype=torch.bool)
    rest[torch.cat(where)] = False
    assert torch.equal(new[rest], before[rest])
    assert torch.equal(state, before)


def test_places_are_the_statistics_by_their_names():
    module = net()
    layout = Layout.of(module)
    tensors = {name: torch.full(t.shape, 0.0) for name, t in module.state_dict().items()}
    for name in ("1.running_mean", "5.running_mean"):
        tensors[name] += 1
    for name in ("1.running_var", "5.running_var"):
        tensors[name] += 2
    state = layout.write(tensors)
    means, variances = layout.statistics
    assert torch.equal((state == 1).nonzero()[:, 0], means.sort().values)
    assert torch.equal((state == 2).nonzero()[:, 0], variances.sort().values)
    assert len(layers(module)) == 2
    assert (
        layers(nn.Sequential(nn.GroupNorm(1, 2), nn.BatchNorm1d(2, track_running_stats=False)))
        == []
    )


def images_of(number):
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (number, 2, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.arange(number) % 3
    return Images(pixels, labels, (0.4, 0.5), (0.2, 0.3), dtype=torch.float64)


@pytest.mark.parametrize("module", [net, without_dropout])
def test_update_bn_is_that_of_pytorch(module):
    """On three mini-batches, of 335, 334 and 334 images; dropout, which draws, is left out."""
    images, trainer = images_of(1003), trainer_of(module=module)
    rows = torch.randperm(1003, generator=torch.Generator().manual_seed(1))
    start = trainer.new_network().state + 0.1
    made = []
    for threads in (1, 2):
        with closing(ThreadExecutor(trainer, threads)) as executor:
            made.append(executor.update_bn(start, images, rows))
            again = executor.update_bn(made[-1], images, rows)
    assert torch.equal(*made)
    assert torch.equal(again, made[0])  # what was there is forgotten
    theirs = without_dropout()
    theirs.load_state_dict(trainer.layout.whole(start))
    update_bn([images.rows(part).images for part in rows.tensor_split(3)], theirs)
    mine = trainer.layout.whole(made[0])
    for name, tensor in theirs.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(mine[name], tensor, rtol=1e-10, atol=1e-12)
        elif "tracked" not in name:
            assert torch.equal(mine[name], tensor)
    assert not torch.equal(mine["1.running_var"], trainer.layout.whole(start)["1.running_var"])


def test_update_bn_ends_also_where_the_run_was_asked_to_stop():
    trainer, stop = trainer_of(module=net), Stop()
    with closing(ThreadExecutor(trainer, 1, stop)) as threads:
        stop.signal = 15
        state = threads.update_bn(trainer.new_network().state, trainer.test, torch.arange(60))
        assert state.isfinite().all()
        with pytest.raises(Interrupted):
            threads.evaluate(state, trainer.test)


def test_a_client_goes_on_from_its_own_statistics_and_returns_the_global_ones():
    """Two rounds of PyTorch's own BatchNorm, whose statistics nobody else touches."""
    trainer = trainer_of(module=without_dropout, work=Work(4, local_steps=3))
    trainer = replace(trainer, local_statistics=True)
    P, start = trainer.layout.trainable, trainer.new_network().state
    theirs = without_dropout()
    memory = None
    for round in (1, 2):
        sent = start + 0.01 * round  # the server's of this round, statistics too
        done = trainer.train_client(trainer.new_network(), ClientJob(4, sent, round, 0.1, memory))
        given = trainer.layout.whole(sent)
        own = [e.name for e in trainer.layout.entries if e.offset >= P] if round == 2 else []
        kept = {name: theirs.state_dict()[name] for name in own}
        theirs.load_state_dict(given | kept)
        theirs.train()
        plan = trainer.plan(4, round)
        for step in range(3):
            batch = trainer.train.batch(plan, step)
            loss = nn.functional.cross_entropy(theirs(batch.images), batch.targets)
            parameters = [p for p in theirs.parameters() if p.requires_grad]
            with torch.no_grad():
                for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                    p -= 0.1 * g
        expected = trainer.layout.write({n: t.detach() for n, t in theirs.state_dict().items()})
        memory = done.memory
        torch.testing.assert_close(memory[STATISTICS], expected[P:])
        torch.testing.assert_close(done.state[:P], expected[:P])
        assert torch.equal(done.state[P:], sent[P:])
        seen = trainer.own_state(start, memory)
        assert torch.equal(seen, torch.cat([start[:P], memory[STATISTICS]]))
    assert not torch.equal(memory[STATISTICS], start[P:])


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam", "flwr.serverapp.strategy:FedAvgM"])
def test_a_round_with_pooled_statistics(tmp_path, strategy):
    """The parameters are the strategy's own, the statistics those of its three clients."""
    config = quick_config(tmp_path / "unused", **SMALL, strategy=strategy, bn="pooled")
    trainer, initial = new_trainer(config)
    turns = []
    with closing(ThreadExecutor(trainer, 1)) as threads:
        for bn in ("pooled", "values"):
            mine = new_strategy(config.model_copy(update={"bn": bn}))
            keys = {"rounds": [1], "sample": lambda *_: [0, 2, 5], "seed": 0, "lr": lambda _: 0.1}
            turns += play(mine, LocalGrid(threads), initial, node_of=range(6), **keys)
    P, (means, variances) = initial.layout.trainable, initial.layout.statistics
    clients = [only_record(reply.content.array_records).state for reply in turns[0].replies]
    n = trainer.partition.sizes[[0, 2, 5]].double().numpy()
    mean, var = [np.stack([c[where].double() for c in clients]) for where in (means, variances)]
    whole = n @ mean / n.sum()
    ours, plain = [turn.arrays.state for turn in turns]
    np.testing.assert_allclose(ours[means], whole, rtol=1e-4, atol=1e-6)
    expected = n @ (var + mean**2) / n.sum() - whole**2
    np.testing.assert_allclose(ours[variances], expected, rtol=1e-4)
    assert (ours[variances] != plain[variances]).any()
    assert torch.equal(ours[:P], plain[:P])
    assert turns[0].metrics == turns[1].metrics


def test_what_is_trained_does_not_depend_on_where_statistics_are_kept(quick):
    """Mini-batches are normalised by their own; local ones stay where they are, to the byte."""
    ends = {}
    for bn in ("values", "pooled", "local"):
        folder = quick(**SMALL, bn=bn, update_bn=40).folder
        ends[bn] = [load_file(folder / f"model{part}.safetensors") for part in ("", "-trained")]
    (evaluated, values), (_, pooled), (same, local) = ends.values()
    for name, tensor in values.items():
        if "running" not in name and "tracked" not in name:
            assert torch.equal(pooled[name], tensor)
            assert torch.equal(local[name], tensor)
    assert all(local[name].eq(0).all() for name in local if "running_mean" in name)
    assert all(local[name].eq(1).all() for name in local if "running_var" in name)
    assert any(not torch.equal(values[name], pooled[name]) for name in values if "var" in name)
    for name, tensor in evaluated.items():  # nothing of what was there is left in them
        assert "tracked" in name or torch.equal(same[name], tensor)


def local_trainer(tmp_path):
    config = quick_config(tmp_path / "unused", **SMALL, bn="local", update_bn=40, device="cpu")
    return new_trainer(config)


def test_a_client_is_evaluated_with_its_own_statistics(tmp_path):
    trainer, initial = local_trainer(tmp_path)
    with closing(ThreadExecutor(trainer, 1)) as threads:
        grid = LocalGrid(threads)
        config = ConfigRecord({ROUND: 1, LEARNING_RATE: 0.1})
        content = RecordDict({ARRAYS: initial, CONFIG: config})
        question = RecordDict({ARRAYS: initial})
        list(grid.send_and_receive([Message(content, 2, MessageType.TRAIN)]))
        asked = [Message(question, client, MessageType.EVALUATE) for client in (2, 3)]
        answers = [only_record(a.content.metric_records) for a in grid.send_and_receive(asked)]
        own = trainer.own_state(initial.state, grid.memories[2])
        for client, state, answer in zip((2, 3), (own, initial.state), answers, strict=True):
            rows = trainer.partition[client]
            assert answer["loss"] == threads.evaluate(state, trainer.train, rows)["loss"]
    assert set(grid.memories) == {2}


def test_local_statistics_on_the_other_engines(tmp_path):
    """A Ray actor and a SuperNode in this process: two rounds of one client, to the byte."""
    from fedsam.engines.ray import ClientActor, answers_of

    trainer, initial = local_trainer(tmp_path)
    actor, here = ClientActor(lambda: trainer, "."), trainer.new_network()
    run_config = {"out": "", "model": SMALL["model"], "model-options": "{norm: batch}"}
    run_config |= {"clients": 6, "clients-per-round": 3, "local-steps": 2, "batch-size": 8}
    run_config |= {"rounds": 2, "eval-every": 2, "alpha": 1.0, "device": "cpu"}
    run_config |= {"bn": "local", "update-bn": 40}
    context = Context(1, 7, {PARTITION: 2}, RecordDict(), run_config)
    memory, remote = None, None
    for round in (1, 2):
        done = trainer.train_client(here, ClientJob(2, initial.state, round, 0.1, memory))
        memory = done.memory
        shared, own = pack([initial.state, {}]), pack([[2, round, 0.1, remote]])
        _, (answer,) = answers_of(actor.train(shared, own), initial.state.device)
        remote = answer.memory
        assert torch.equal(answer.state, done.state)
        assert torch.equal(remote[STATISTICS], memory[STATISTICS])
        settings = ConfigRecord({ROUND: round, LEARNING_RATE: 0.1})
        content = RecordDict({ARRAYS: plain_record(initial), CONFIG: settings})
        reply = client_app.app(Message(content, 7, MessageType.TRAIN), context)
        record = only_record(reply.content.array_records)
        assert torch.equal(state_of(record, trainer.layout), done.state)
        kept = vectors_of(context.state, trainer.layout, MEMORY)
        assert torch.equal(kept[STATISTICS], memory[STATISTICS])
    client_app.resident.cache_clear()
    assert remote.keys() == {STATISTICS}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bn": "local"}, "--bn local: the global model has no statistics.*--update-bn"),
        ({"update_bn": 1}, "--update-bn 1: one image has no variance"),
        ({"update_bn": 9, "lifelong": 2}, "--update-bn: goes without --lifelong"),
        ({"bn": "mean"}, "--bn mean: input should be 'values', 'pooled' or 'local'"),
        ({"bn": "pooled", "model_options": {}}, "--bn pooled: the model has no BatchNorm"),
        ({"update_bn": 9, "model": "digits-cnn", "model_options": {}}, "--update-bn 9: the model"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(quick, given, message):
    with pytest.raises(UsageError, match=message):
        quick(**SMALL | given)
