"""Models that draw random numbers: seeds repeat, and all passes of a step see the same ones."""

import pytest
import torch

from fedsam.training.method import Minimizer

MODELS = [f"tests.training.test_dry_pass:{name}" for name in ("Dropout", "OfPython", "OfNumPy")]


class Twice(Minimizer):
    """SGD along the second of two gradients at one point, which are the same."""

    def step(self, w, grad, descend, local):
        first, second = grad(w), grad(w)
        assert torch.equal(first, second)
        return descend(w, second), {}


def model_of(outcome):
    return (outcome.folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("model", MODELS)
def test_a_seed_repeats_whatever_the_threads_and_the_generators(quick, model):
    torch.manual_seed(1)
    one = model_of(quick(model=model, threads=1))
    torch.manual_seed(2)
    assert model_of(quick(model=model, threads=2)) == one
    assert model_of(quick(model=model, threads=2, seed=1)) != one


def test_several_runs_as_one_program_draw_what_each_draws_alone(quick):
    alone = model_of(quick(model=MODELS[0]))
    assert model_of(quick(model=MODELS[0], cohort="slots")) == alone  # falls back, and says why


@pytest.mark.parametrize("model", MODELS)
def test_sam_without_a_radius_is_sgd(quick, model):
    assert model_of(quick(model=model, minimizer="sam", rho=0.0)) == model_of(quick(model=model))


@pytest.mark.parametrize("model", MODELS)
def test_a_mini_batch_has_one_gradient_at_a_point(quick, model):
    twice = quick(model=model, minimizer=f"{__name__}:Twice")
    assert model_of(twice) == model_of(quick(model=model))


def test_steps_and_clients_draw_different_numbers(quick, monkeypatch):
    from fedsam.training import client

    keys = []
    streams = client.global_streams

    def noted(seed, *key):
        keys.append(key)
        return streams(seed, *key)

    monkeypatch.setattr(client, "global_streams", noted)
    quick(model=MODELS[0], rounds=2, minimizer="sam", eval_every=2)
    training = [key for key in keys if key[0] == "model"]
    assert len(training) == 2 * len(set(training))  # two passes a step, one key
    assert {key[1] for key in training} == {1, 2}


def test_an_evaluation_that_draws_repeats(quick):
    accuracies = [
        quick(model="tests.training.test_dry_pass:MonteCarlo").summary["last_accuracy"]
        for _ in range(2)
    ]
    assert accuracies[0] == accuracies[1]
