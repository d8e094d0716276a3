"""Measures compute in float32 wherever they are called from, and leave the flags as they were."""

import little
import pytest
import torch
from torch import nn

from fedsam.flatness.measures.adversarial import adversarial
from fedsam.flatness.measures.clients import clients
from fedsam.flatness.measures.connectivity import connectivity
from fedsam.flatness.registry import MEASURES, take
from fedsam.flatness.subject import subject_of_network

OPERATIONS = [
    getattr(getattr(torch.backends, backend), operation)
    for backend, operations in {
        "cuda": ("matmul",),
        "cudnn": ("conv", "rnn"),
        "mkldnn": ("matmul", "conv", "rnn"),
    }.items()
    for operation in operations
]
FEW = {"images": 16, "batch": 8, "steps": 2, "probes": 2, "eigenvalues": 2, "points": 3}


def flags():
    return [operation.fp32_precision for operation in OPERATIONS]


@pytest.fixture
def coarse():
    """What a script may have said before it measures; the GPU's flags exist without a GPU."""
    before = flags()
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    yield flags()
    for operation, value in zip(OPERATIONS, before, strict=True):
        operation.fp32_precision = value


def watched(side=8):
    """Return a subject whose network notes the flags, and the dtype of its products."""
    seen = []
    subject = little.subject(side=side)

    def note(module, inputs, output):
        seen.append((*flags(), torch.is_autocast_enabled("cpu")))

    subject.network.module.register_forward_hook(note)
    return subject, seen


@pytest.mark.parametrize("name", [*MEASURES, "connectivity"])
def test_every_product_of_a_measure_is_exact_and_the_flags_are_restored(name, coarse):
    subject, seen = watched(32 if name == "corruptions" else 8)
    with torch.autocast("cpu", torch.bfloat16):
        if name == "connectivity":
            connectivity([("a", subject), ("b", subject)], points=3, images=8)
        else:
            take(subject, name, FEW)
    assert seen
    assert set(seen) == {("ieee",) * 6 + (False,)}
    assert flags() == coarse


def test_flags_are_restored_where_a_measure_fails(coarse):
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    labels = torch.full((8,), 7)  # no such output
    subject = subject_of_network(
        module, (torch.zeros(8, 1, 8, 8, dtype=torch.uint8), labels), mean=(0.5,), std=(0.5,)
    )
    for measure in (MEASURES["slope"], adversarial, clients):
        with pytest.raises((IndexError, RuntimeError)):
            measure(subject)
        assert flags() == coarse
