"""What varies between clients beside their data: who stays, how much is done, what it counts."""

import json

import numpy as np
import pytest
import torch
from conftest import quick_config
from safetensors.torch import load_file

from fedsam.base.randomness import numpy_generator
from fedsam.data.partition import Partition, shares_of_test
from fedsam.simulate.build.trainer import new_trainer
from fedsam.simulate.run import sampling
from fedsam.training.client import ClientJob


def lines_of(outcome):
    return [json.loads(line) for line in (outcome.folder / "metrics.jsonl").open()]


def model_of(outcome):
    return (outcome.folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("rate", [0.2, 0.9])
def test_clients_drop_out_at_their_rate_and_one_stays(tmp_path, rate):
    config = quick_config(tmp_path, dropout_rate=rate, clients=50, clients_per_round=10)
    trainer, _ = new_trainer(config)
    everybody = sampling(config.model_copy(update={"dropout_rate": 0.0}), trainer)
    sample = sampling(config, trainer)
    cohorts = [(everybody(r), sample(r)) for r in range(1, 501)]
    assert all(set(stayed) <= set(drawn) and stayed for drawn, stayed in cohorts)
    assert all(stayed == sorted(stayed) for _, stayed in cohorts)
    share = np.mean([len(stayed) / 10 for _, stayed in cohorts])
    expected = 1 - rate + rate**10 / 10  # one that would have gone stays where all would
    assert share == pytest.approx(expected, abs=4 * (rate * (1 - rate) / 5000) ** 0.5)
    assert sample(3) == sample(3)
    assert sample(3, 1) != sample(3, 0)


def test_a_run_whose_clients_drop_out_trains_and_repeats(quick):
    lines = lines_of(first := quick(dropout_rate=0.5))
    assert {len(line["clients"]) for line in lines[1:]} != {5}
    assert model_of(quick(dropout_rate=0.5, threads=1)) == model_of(first)
    assert model_of(quick(dropout_rate=0.5, cohort="slots")) != model_of(quick())
    assert quick(dropout_rate=0.5, strategy="flwr.serverapp.strategy:FedAvg").summary["finished"]


def test_stragglers_do_a_uniform_part_of_their_work(tmp_path):
    config = quick_config(tmp_path, stragglers=0.5, batch_size=7, clients=20)
    trainer, _ = new_trainer(config)
    whole, _ = new_trainer(config.model_copy(update={"stragglers": 0.0}))
    done = []
    for round in range(1, 201):
        part, full = trainer.plan(0, round), whole.plan(0, round)
        assert part.sizes == full.sizes[: len(part)]
        assert torch.equal(part.indices, full.indices[: len(part)])
        done.append(len(part))
    steps = whole.steps(0)
    assert steps == 11
    late = np.mean([n < steps for n in done])
    assert late == pytest.approx(0.5 * (1 - 1 / steps), abs=0.14)  # 4 standard deviations
    assert np.mean(done) == pytest.approx(0.5 * steps + 0.5 * (steps + 1) / 2, abs=1.0)
    assert set(done) == set(range(1, steps + 1))


def test_engines_agree_on_stragglers(quick):
    keys = {"stragglers": 0.7, "algorithm": "scaffold", "batch_size": 8}
    one, batched = (
        load_file(quick(**keys, cohort=c).folder / "model.safetensors") for c in ("off", "slots")
    )
    for name, tensor in one.items():
        assert torch.allclose(tensor, batched[name], atol=1e-5)


@pytest.mark.parametrize("strategy", ["fedavg", "flwr.serverapp.strategy:FedAvg"])
def test_equal_weights_are_the_plain_mean(tmp_path, quick, strategy):
    keys = {"partition": "quantity", "rounds": 1, "eval_every": 1, "clients": 5, "lr": 0.01}
    keys |= {"strategy": strategy, "clients_per_round": 5}
    trainer, initial = new_trainer(quick_config(tmp_path, **keys))
    network = trainer.new_network()
    jobs = [ClientJob(c, initial.state, 1, 0.01) for c in range(5)]
    states = [trainer.train_client(network, job).state.double() for job in jobs]
    n = trainer.partition.sizes.double()
    assert n.max() > 2 * n.min()
    means = {
        "equal": torch.stack(states).mean(0),
        "examples": (torch.stack(states) * (n / n.sum())[:, None]).sum(0),
    }
    for weighting, mean in means.items():
        outcome = quick(**keys, weighting=weighting)
        state = trainer.layout.write(load_file(outcome.folder / "model.safetensors"))
        assert torch.allclose(state.double(), mean, atol=1e-6)
    assert not torch.allclose(means["equal"], means["examples"], atol=1e-5)


def test_a_clients_share_of_the_test_set_has_the_classes_that_it_trains_on():
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, 7, 900))
    test = torch.from_numpy(rng.integers(0, 8, 400))  # of the last class nobody trains
    order = torch.from_numpy(rng.permutation(900))
    partition = Partition(order, torch.tensor([0, 100, 150, 600, 605, 900]))
    shares = shares_of_test(partition, labels, test, numpy_generator(0, "x"))
    rows = shares.indices.tolist()
    assert len(set(rows)) == len(rows)
    assert sorted(rows) == torch.nonzero(test < 7).flatten().tolist()
    held, given = partition.counts(labels, 8), shares.counts(test, 8)
    for c in range(7):
        share = held[:, c] / held[:, c].sum()
        assert (given[:, c] - share * (test == c).sum()).abs().max() <= 1


def test_every_client_is_tested_on_its_own_classes(quick):
    outcome = quick(alpha=0, client_tests=True, clients=10, clients_per_round=10, lr=0.5, rounds=8)
    last = lines_of(outcome)[-1]
    config = quick_config(outcome.folder, alpha=0, clients=10, clients_per_round=10)
    trainer, _ = new_trainer(config)
    network = trainer.new_network()
    network.load(trainer.layout.write(load_file(outcome.folder / "model.safetensors")))
    shares = shares_of_test(
        trainer.partition,
        trainer.train.targets,
        trainer.test.targets,
        numpy_generator(0, "client tests"),
    )
    accuracies = []
    for client in range(10):
        batch = trainer.test.rows(shares[client])
        with torch.no_grad():
            answers = network.module.eval()(batch.images).argmax(1)
        accuracies.append(float((answers == batch.targets).double().mean()))
    assert len(set(accuracies)) > 2
    assert last["client_accuracy"] == pytest.approx(np.mean(accuracies))
    assert last["client_accuracy_std"] == pytest.approx(np.std(accuracies))
    assert last["client_accuracy_worst"] == pytest.approx(min(accuracies))
    assert outcome.summary["client_accuracy"] == last["client_accuracy"]
    assert "client_accuracy" not in lines_of(quick())[-1]
