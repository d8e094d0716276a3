"""A round's clients: those of the real round, and every number against a naive loop."""

import json
from itertools import combinations

import pytest
import torch
from conftest import quick_config
from safetensors.torch import load_file

from fedsam.base.randomness import sample_clients
from fedsam.flatness.measures.cohort_spread import cohort_spread, train_cohort
from fedsam.flatness.measures.plane import plane
from fedsam.simulate.build.trainer import new_trainer


@pytest.fixture
def federation(tmp_path):
    """A run's trainer, its first model and the cohort of its first round; sizes differ."""
    config = quick_config(tmp_path / "run", partition="shards", clients_per_round=4, rounds=1)
    trainer, initial = new_trainer(config)
    clients = sample_clients(config.seed, 1, config.clients, config.clients_per_round)
    return config, trainer, initial.state, clients


def loss_by_hand(trainer, state, images, rows):
    module = trainer.new_module()
    module.load_state_dict(trainer.layout.read(state))
    batch = images.rows(rows)
    with torch.no_grad():
        output = module.double().eval()(batch.images.double())
    loss = torch.nn.functional.cross_entropy(output, batch.targets).item()
    return loss, (output.argmax(1) != batch.targets).double().mean().item()


def test_the_average_is_the_model_of_the_real_round(federation, quick):
    config, trainer, state, clients = federation
    before = state.clone()
    cohort = train_cohort(trainer, state, clients, round=1, lr=config.lr)
    assert torch.equal(state, before)
    same = {"partition": "shards", "clients_per_round": 4, "rounds": 1, "eval_every": 1}
    outcome = quick(**same)
    model = trainer.layout.write(load_file(outcome.folder / "model.safetensors"))
    assert torch.equal(cohort.average, model)
    found = cohort_spread(cohort, points=3, images=50)["scalars"]
    line = json.loads((outcome.folder / "metrics.jsonl").read_text().splitlines()[-1])
    for name in ("client_norm", "client_drift", "update_norm"):
        assert found[name] == pytest.approx(line[name], rel=1e-6)


def test_every_number_by_a_naive_loop(federation):
    config, trainer, state, clients = federation
    said = []
    tick = lambda *done: said.append(done)  # noqa: E731
    cohort = train_cohort(trainer, state, clients, round=1, lr=config.lr, tick=tick)
    assert said == [(n, 4) for n in range(1, 5)]
    said.clear()
    found = cohort_spread(cohort, points=3, images=10**6, tick=tick)
    scalars, states = found["scalars"], [s.double() for s in cohort.states]
    w = state.double()
    pairs = list(combinations(range(4), 2))
    apart = {(i, j): (states[i] - states[j]).norm().item() for i, j in pairs}
    cosine = torch.nn.functional.cosine_similarity
    alike = {(i, j): cosine(states[i] - w, states[j] - w, dim=0).item() for i, j in pairs}
    for i, j in pairs:
        assert found["distances"][i][j] == pytest.approx(apart[i, j], rel=1e-6)
        assert found["cosines"][j][i] == pytest.approx(alike[i, j], rel=1e-5)
    assert scalars["distance_mean"] == pytest.approx(sum(apart.values()) / 6, rel=1e-6)
    assert scalars["distance_max"] == pytest.approx(max(apart.values()), rel=1e-6)
    assert scalars["cosine_mean"] == pytest.approx(sum(alike.values()) / 6, rel=1e-5)
    assert scalars["cosine_min"] == pytest.approx(min(alike.values()), rel=1e-5)

    every = torch.arange(len(trainer.test))
    average, of_average = loss_by_hand(trainer, cohort.average, trainer.test, every)
    losses, heights = [], []
    for row, client, end in zip(found["clients"], clients, cohort.states, strict=True):
        rows = trainer.partition[client]
        assert (row["client"], row["images"]) == (client, len(rows))
        for which, model in (("before", state), ("after", end)):
            own, _ = loss_by_hand(trainer, model, trainer.train, rows)
            assert row[f"own_loss_{which}"] == pytest.approx(own, rel=1e-5)
        losses.append(loss_by_hand(trainer, end, trainer.test, every)[0])
        middle = loss_by_hand(trainer, (end + cohort.average) / 2, trainer.test, every)[0]
        heights.append(max(0, middle - (losses[-1] + average) / 2))
        assert row["test_loss"] == pytest.approx(losses[-1], rel=1e-5)
    assert scalars["test_loss"] == pytest.approx(average, rel=1e-5)
    assert scalars["test_error"] == pytest.approx(of_average, abs=1e-9)
    assert scalars["test_loss_gap"] == pytest.approx(average - sum(losses) / 4, rel=1e-4)
    assert scalars["test_loss_barrier"] == pytest.approx(sum(heights) / 4, abs=1e-5)
    assert scalars["own_loss_after"] < scalars["own_loss_before"]  # they have trained
    assert said == [(n, 20) for n in range(1, 21)]


def test_three_of_them_span_a_plane(federation):
    config, trainer, state, clients = federation
    cohort = train_cohort(trainer, state, clients, round=1, lr=config.lr)
    found = plane(cohort.subjects(), points=2, images=100)
    assert [m["name"] for m in found["models"][:3]] == [f"client {k}" for k in clients[:3]]
    first, second = (torch.tensor([m["x"], m["y"]]) for m in found["models"][:2])
    apart = (cohort.states[0] - cohort.states[1]).norm().item()
    assert (first - second).norm().item() == pytest.approx(apart, rel=1e-5)


def test_a_single_client_is_its_own_average(federation):
    config, trainer, state, clients = federation
    cohort = train_cohort(trainer, state, clients[:1], round=1, lr=config.lr)
    scalars = cohort_spread(cohort, points=3, images=50)["scalars"]
    alone = ("distance_mean", "distance_max", "client_drift", "test_loss_gap", "cosine_mean")
    assert [scalars[name] for name in alone] == [0.0] * 5
    assert scalars["train_loss_barrier"] == pytest.approx(0, abs=1e-9)
