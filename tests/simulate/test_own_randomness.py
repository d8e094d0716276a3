"""Models that draw random numbers: seeds repeat, and all passes of a step see the same ones."""

import pytest
import torch
from safetensors.torch import load_file

from fedsam.training.method import Minimizer

FILE = "model.safetensors"
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


def test_a_buffer_that_is_assigned_anew_travels_as_one_that_is_changed_in_place(quick):
    runs = [
        load_file(quick(model=f"tests.training.test_dry_pass:{name}", cohort=cohort).folder / FILE)
        for name, cohort in (("InPlace", "off"), ("Reassigning", "off"), ("Reassigning", "slots"))
    ]
    assert 0.5 < runs[0]["seen"] < 0.99  # it has moved from 1 towards the mean of |x|
    for other in runs[1:]:
        for name, tensor in runs[0].items():
            assert torch.allclose(tensor, other[name], rtol=1e-5, atol=1e-7)
