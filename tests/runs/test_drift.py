"""The lengths of a round's updates: by hand, their law, and in a real run."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from fedsam.runs.metrics import drift


def test_lengths_by_hand():
    before = torch.tensor([1.0, 1.0])
    clients = [torch.tensor([4.0, 5.0]), torch.tensor([1.0, 1.0])]  # updates (3, 4) and (0, 0)
    found = drift(before, clients, torch.tensor([1.0, 3.0]))
    assert found["client_norm"] == pytest.approx(math.sqrt(25 / 2))
    assert found["client_drift"] == pytest.approx(2.5)  # both are (1.5, 2) from their mean
    assert found["update_norm"] == 2.0


def test_pythagoras_and_what_one_client_leaves():
    generator = torch.Generator().manual_seed(0)
    before, *clients = torch.randn(6, 40, dtype=torch.float64, generator=generator)
    mean = torch.stack(clients).mean(0)
    found = drift(before, clients, mean)
    squares = found["update_norm"] ** 2 + found["client_drift"] ** 2
    assert found["client_norm"] ** 2 == pytest.approx(squares)
    alone = drift(before, clients[:1], clients[0])
    assert alone["client_drift"] == 0.0
    assert alone["client_norm"] == alone["update_norm"]


def test_a_run_writes_them_where_it_evaluates(quick):
    outcome = quick(rounds=4, eval_every=2, clients_per_round=1)
    lines = [json.loads(line) for line in (outcome.folder / "metrics.jsonl").open()]
    assert [("client_drift" in line) for line in lines] == [False, False, True, False, True]
    assert lines[2]["client_drift"] == 0.0  # a cohort of one
    before = load_file(quick(rounds=3, clients_per_round=1).folder / "model.safetensors")
    after = load_file(outcome.folder / "model.safetensors")
    length = math.sqrt(sum(float((after[n] - before[n]).square().sum()) for n in after))
    assert lines[4]["update_norm"] == pytest.approx(length, rel=1e-5)
