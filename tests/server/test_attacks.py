"""Under a fifth of hostile clients a robust strategy keeps its accuracy where clients are alike."""

import pytest
from conftest import ROOT

from fedsam.config.schema import resolve

MARGIN = 0.06  # of the accuracy, where the clients' images are IID
ROBUST = ("FedTrimmedAvg", "FedMedian")
ATTACKS = ("sign flip", "large norm", "BatchNorm poison")


@pytest.fixture
def accuracy(tmp_path, monkeypatch):
    """Return a function from a defence and an attack to the accuracy after a few rounds."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import attacks

    count = iter(range(100))

    def of(defence, attack):
        few = {"rounds": 4, "eval_every": 4, "local_steps": 3, "lr": 0.5}
        keys = attacks.SETTING | attacks.SPLITS["IID"] | attacks.DEFENCES[defence] | few
        return attacks.accuracy(resolve(keys | {"out": str(tmp_path / f"{next(count)}")}), attack)

    return of


def test_a_large_norm_ruins_a_mean(accuracy):
    assert accuracy("FedAvg", "none") > 0.85
    assert accuracy("FedAvg", "large norm") < 0.3


@pytest.mark.parametrize("strategy", ROBUST)
def test_a_robust_strategy_keeps_its_accuracy(strategy, accuracy):
    clean = accuracy(strategy, "none")
    assert clean > 0.85
    for attack in ATTACKS:
        assert accuracy(strategy, attack) > clean - MARGIN, attack
