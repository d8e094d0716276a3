"""Kendall's tau and the generalisation gap: against scipy, by hand, and coverage."""

import math

import numpy as np
import pytest
import torch
from conftest import quick_config
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedsam.base.errors import UsageError
from fedsam.flatness.measures.fit import fit
from fedsam.flatness.subject import Subject
from fedsam.report.correlation import kendall
from fedsam.simulate.build.trainer import new_trainer


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=25))
def test_it_is_scipys_tau_b_also_with_ties(pairs):
    x, y = zip(*pairs, strict=True)
    expected = stats.kendalltau(x, y, variant="b").statistic
    found = kendall(x, y)
    assert found.runs == len(pairs)
    if math.isnan(expected):
        assert math.isnan(found.tau)
        assert len(set(x)) == 1 or len(set(y)) == 1
    else:
        assert found.tau == pytest.approx(expected, abs=1e-12)
        assert -1 <= found.low <= found.high <= 1


def test_the_interval_is_that_of_scipys_bootstrap():
    generator = np.random.default_rng(0)
    x = generator.normal(size=30)
    y = x + generator.normal(size=30)
    expected = stats.bootstrap(
        (x, y),
        lambda a, b: stats.kendalltau(a, b).statistic,
        paired=True,
        vectorized=False,
        method="percentile",
        n_resamples=2000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    found = kendall(x, y)
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.03)
    assert found.low < found.tau < found.high
    assert kendall(x, y) == found
    assert kendall(x, y, seed=1)[1:3] != found[1:3]


def test_order_is_all_that_counts():
    x, y = [0.1, 5.0, 2.0, 9.0], [1.0, 3.0, 2.0, 4.0]
    assert kendall(x, y)[:3] == (1.0, 1.0, 1.0)
    assert kendall(x, [-v for v in y]).tau == -1.0
    assert kendall([math.exp(v) for v in x], y) == kendall(x, y)
    assert kendall(y, x).tau == kendall(x, y).tau


def test_two_runs_are_too_few():
    with pytest.raises(UsageError, match="needs 3 runs at least, got 2"):
        kendall([1.0, 2.0], [1.0, 2.0])


def test_the_fit_of_a_model_is_that_of_a_plain_loop(tmp_path):
    trainer, initial = new_trainer(quick_config(tmp_path / "unused"))
    scalars = fit(Subject.of(trainer, initial.state))["scalars"]
    module = trainer.new_module().eval()
    module.load_state_dict(initial.layout.read(initial.state))
    for name, images in (("train", trainer.train), ("test", trainer.test)):
        batch = images.rows(torch.arange(len(images)))
        with torch.no_grad():
            output = module(batch.images).double()
        right = (output.argmax(1) == batch.targets).double().mean().item()
        loss = torch.nn.functional.cross_entropy(output, batch.targets).item()
        assert scalars[f"{name} accuracy"] == pytest.approx(right, abs=1e-12)
        assert scalars[f"{name} loss"] == pytest.approx(loss, rel=1e-6)
    assert len(scalars) == 4
