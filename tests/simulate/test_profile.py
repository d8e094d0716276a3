"""Time by phase: nested phases are counted once, and nothing is left in place afterwards."""

import gzip
import json
import time

import pytest
import torch
from fedsam.strategies.fedavg import FedAvg
from safetensors.torch import load_file

from fedsam import as_strategy
from fedsam.simulate.profile import WAITING, Phases
from fedsam.training.client import Trainer
from fedsam.training.flat_module import FlatModule
from fedsam.training.method import Method


def test_a_phase_is_without_those_inside_it():
    phases = Phases()
    inner = phases._timed(lambda: time.sleep(0.05), "inner")

    def outer():
        inner()
        time.sleep(0.1)
        inner()

    phases._timed(outer, "outer")()
    rows = {row.name: row for row in phases.rows()}
    assert (rows["inner"].calls, rows["outer"].calls) == (2, 1)
    assert 0.1 <= rows["inner"].seconds < 0.15
    assert 0.1 <= rows["outer"].seconds < 0.15


def test_methods_are_put_back_even_by_an_error():
    strategy = as_strategy(FedAvg(), fraction_evaluate=0.0)
    aggregate = type(strategy).aggregate_train
    before = FlatModule.gradient, Trainer.plan, Method.step, aggregate
    with pytest.raises(KeyError), Phases().watching(strategy):
        {}["an error while it watches"]
    aggregate = type(strategy).aggregate_train
    assert (FlatModule.gradient, Trainer.plan, Method.step, aggregate) == before


@pytest.mark.parametrize("cohort", ["off", "slots"])
def test_a_profiled_run_is_the_same_run_with_a_table(quick, cohort):
    plain = quick(algorithm="fedasam", cohort=cohort)
    profiled = quick(algorithm="fedasam", cohort=cohort, profile=True, threads=1)
    assert not plain.phases
    models = [load_file(o.folder / "model.safetensors") for o in (plain, profiled)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    rows = {row["name"]: row for row in json.loads((profiled.folder / "profile.json").read_text())}
    assert rows["strategy aggregates"]["calls"] == 4
    assert rows["draw plans"]["calls"] >= 4 * 5
    assert rows["forward and backward"]["seconds"] > 0
    if cohort == "off":
        assert rows["forward and backward"]["calls"] == 2 * rows["gather and augment"]["calls"]
    spent = sum(row["seconds"] for row in rows.values() if row["name"] != WAITING)
    assert spent > 0.5 * profiled.summary["seconds"]


def test_a_trace_holds_the_third_to_fifth_round(quick):
    outcome = quick(rounds=6, trace=True)
    with gzip.open(outcome.folder / "trace.json.gz", "rt") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    backward = "autograd::engine::evaluate_function: NllLossBackward0"
    assert names.count(backward) == 3 * 5 * 2  # rounds x clients x steps: 64 images and 8
    assert outcome.summary["rounds"] == 6
