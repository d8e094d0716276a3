"""The round loop: any strategy, seeded cohorts, what is left out, when it stops."""

import json
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fedsam.base.errors import TrainingError
from fedsam.base.randomness import sample_clients
from fedsam.training.method import Minimizer


def model(outcome):
    return load_file(outcome.folder / "model.safetensors")


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a | b)


def lines(outcome):
    return [json.loads(x) for x in (outcome.folder / "metrics.jsonl").read_text().splitlines()]


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(quick):
    first, again, other = quick(seed=3), quick(seed=3), quick(seed=4)
    name = "model.safetensors"
    assert (first.folder / name).read_bytes() == (again.folder / name).read_bytes()
    assert (first.folder / name).read_bytes() != (other.folder / name).read_bytes()


def test_cohorts_are_keyed_by_seed_and_round(quick):
    outcome = quick(seed=5)
    cohorts = [line["clients"] for line in lines(outcome)[1:]]
    assert cohorts == [sample_clients(5, r, 20, 5) for r in range(1, 5)]
    assert all(len(set(cohort)) == 5 for cohort in cohorts)


@pytest.mark.parametrize("algorithm", ["fedavg", "fedasam"])
def test_the_number_of_threads_changes_no_byte(quick, algorithm):
    one, two, five = (quick(algorithm=algorithm, threads=n) for n in (1, 2, 5))
    name = "model.safetensors"
    assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()
    assert (one.folder / name).read_bytes() == (five.folder / name).read_bytes()
    clean = [[{k: v for k, v in x.items() if k != "seconds"} for x in lines(o)] for o in (one, two)]
    assert clean[0] == clean[1]


def test_ours_and_flowers_fedavg_agree(quick):
    ours = model(quick())
    theirs = model(quick(strategy="flwr.serverapp.strategy:FedAvg"))
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("FedAvgM", {"server_momentum": 0.9}),
        ("FedAdam", {"eta": 0.01}),
        ("FedYogi", {"eta": 0.01}),
        ("FedAdagrad", {"eta": 0.01}),
        ("FedMedian", {}),
        ("FedTrimmedAvg", {"beta": 0.2}),
        ("Krum", {"num_malicious_nodes": 1}),
    ],
)
def test_flowers_strategies_run_unchanged(quick, name, options):
    plain = model(quick())
    outcome = quick(strategy=f"flwr.serverapp.strategy:{name}", strategy_options=options)
    assert outcome.summary["rounds"] == 4
    assert not same(model(outcome), plain)
    assert all(tensor.isfinite().all() for tensor in model(outcome).values())


def test_flowers_fedavgm_without_momentum_is_fedavg(quick):
    ours = model(quick())
    theirs = model(quick(strategy="flwr.serverapp.strategy:FedAvgM"))
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-5, atol=1e-6)


def test_flowers_fedavgm_is_momentum_on_the_pseudo_gradient(quick):
    # after one round the velocity is the pseudo-gradient itself, so momentum shows in the second
    options = {"server_momentum": 0.5}
    strategy = "flwr.serverapp.strategy:FedAvgM"
    one = [model(quick(rounds=1, strategy=strategy, strategy_options=o)) for o in ({}, options)]
    for name in one[0]:
        np.testing.assert_allclose(one[0][name], one[1][name], rtol=1e-5, atol=1e-7)
    two = [model(quick(rounds=2, strategy=strategy, strategy_options=o)) for o in ({}, options)]
    start = model(quick(rounds=1, local_epochs=0))
    for name in start:
        expected = two[0][name] + 0.5 * (one[0][name] - start[name])
        np.testing.assert_allclose(two[1][name], expected, rtol=1e-4, atol=1e-6)


def test_a_round_without_steps_is_the_identity(quick):
    first, third = model(quick(rounds=1, local_epochs=0)), model(quick(rounds=3, local_epochs=0))
    for name in first:  # the weights n_k / n sum to 1 up to rounding
        np.testing.assert_allclose(first[name], third[name], rtol=1e-6)


class Poison(Minimizer):
    """SGD of which some clients return NaN, from round ``first`` on."""

    batchable = False  # it looks at one number

    def __init__(self, first: int = 1, everyone: bool = False) -> None:
        self.first = first
        self.everyone = everyone

    def step(self, w, grad, descend, local):
        w = descend(w, grad(w))
        bad = self.everyone or float(grad(w).sum()) > 0
        return (w * float("nan") if local.round >= self.first and bad else w), {}


def test_a_client_that_returns_nan_is_left_out_with_a_warning(quick, caplog):
    with caplog.at_level(logging.WARNING, "fedsam"):
        outcome = quick(minimizer="test_rounds:Poison")
    left = [client for line in lines(outcome) for client in line.get("left_out", [])]
    assert left
    assert caplog.text.count("left out: its update is not finite") == len(left)
    assert all(tensor.isfinite().all() for tensor in model(outcome).values())


def test_if_every_client_returns_nan_the_run_stops_with_the_last_good_model(quick, tmp_path):
    good = model(quick(rounds=2))
    with pytest.raises(TrainingError, match="round 3: no client returned a usable update"):
        quick(
            minimizer="test_rounds:Poison",
            minimizer_options={"first": 3, "everyone": True},
            out=str(tmp_path / "poisoned"),
        )
    assert same(load_file(tmp_path / "poisoned" / "model.safetensors"), good)


def test_target_accuracy_and_patience_stop_early(quick):
    reached = quick(rounds=300, eval_every=1, target_accuracy=0.3)
    assert reached.summary["ended"] == "reached --target-accuracy 0.3"
    assert reached.summary["rounds"] < 300
    assert reached.summary["last_accuracy"] >= 0.3
    stuck = quick(rounds=300, eval_every=1, patience=3, local_epochs=0)
    assert stuck.summary["rounds"] == 4  # one best, then three that are no better
    assert "--patience 3" in stuck.summary["ended"]


def test_local_work_in_steps_epochs_and_fractions(quick):
    def steps(**given):
        return lines(quick(rounds=1, partition="iid", clients=12, batch_size=16, **given))[1][
            "train_steps"
        ]

    # 1442 images, 12 clients of 120 or 121: 8 mini-batches of 16 an epoch
    assert steps() == 8
    assert steps(local_epochs=2) == 16
    assert steps(local_epochs=0.5) == 4
    assert steps(local_epochs=0.01) == 1
    assert steps(local_steps=5) == 5


def test_swa_evaluates_the_average_and_trains_on_from_the_plain_model(quick):
    options = {"rounds": 8, "swa_start": 4, "swa_cycle": 1, "eval_every": 1}
    plain, swa = quick(**options), quick(swa=True, **options)
    trained = load_file(swa.folder / "model-trained.safetensors")
    assert same(trained, model(plain))
    ends = [model(quick(**(options | {"rounds": r}))) for r in (5, 6, 7, 8)]
    for name, average in model(swa).items():
        mean = torch.stack([end[name].double() for end in ends]).mean(0)
        np.testing.assert_allclose(average, mean, rtol=1e-5, atol=1e-7)
    before = [[x["accuracy"] for x in lines(o)[:5]] for o in (plain, swa)]
    assert before[0] == before[1]


@pytest.mark.parametrize("average", ["ema", "wima"])
def test_ema_and_wima_leave_training_alone(quick, average):
    options = {"rounds": 6, "swa_start": 0}
    averaged = quick(average=average, **options)
    trained = load_file(averaged.folder / "model-trained.safetensors")
    assert same(trained, model(quick(**options)))
    assert not same(trained, model(averaged))


def test_fedprox_combines_with_asam(quick):
    names = ["fedavg", "fedprox"]
    mu = {"client_options": {"mu": 1.0}}
    runs = [
        quick(minimizer="asam", client=c, local_steps=3, **(mu if c == "fedprox" else {}))
        for c in names
    ]
    start = model(quick(rounds=1, local_epochs=0))
    moved = [sum(float((model(r)[n] - start[n]).square().sum()) for n in start) for r in runs]
    assert 0 < moved[1] < moved[0]


def test_bf16_trains_near_fp32(quick):
    fp32, bf16 = quick(rounds=1), quick(rounds=1, precision="bf16")
    assert not same(model(fp32), model(bf16))
    for name, tensor in model(fp32).items():
        assert tensor.dtype == torch.float32
        np.testing.assert_allclose(model(bf16)[name], tensor, atol=2e-3)
