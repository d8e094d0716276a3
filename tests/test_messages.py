"""Records: models as Flower's arrays, and as vectors."""

import copy

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from torch import nn

from fedsam.base.vector import Layout
from fedsam.messages import VectorRecord, layout_of, plain_record, state_of

MODULE = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2))
LAYOUT = Layout.of(MODULE)
NUMPY = np.zeros(1)
NAMES = [entry.name for entry in LAYOUT.entries]
SHAPES = [entry.shape for entry in LAYOUT.entries]


def state(seed):
    vector = torch.randn(LAYOUT.size, generator=torch.Generator().manual_seed(seed))
    counter = next(e for e in LAYOUT.entries if e.dtype == torch.int64)
    vector[counter.offset] = 10 * seed
    return vector


def test_a_record_is_an_ordinary_array_record():
    record = VectorRecord(LAYOUT, state(3))
    model = copy.deepcopy(MODULE)
    model.load_state_dict(record.to_torch_state_dict())
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == LAYOUT.read(record.state)[name].dtype
        assert torch.equal(tensor, LAYOUT.read(record.state)[name])
    plain = plain_record(record)
    assert type(plain["0.weight"]).__name__ == "Array"
    assert torch.equal(state_of(plain, LAYOUT), record.state)
    assert record["0.weight"].data == plain["0.weight"].data


def test_a_record_of_another_model_is_refused():
    other = ArrayRecord({"weight": torch.ones(2)})
    with pytest.raises(ValueError, match="differ in"):
        state_of(other, LAYOUT)
    shapes = {n: torch.zeros((*t.shape, 1)) for n, t in LAYOUT.read(state(1)).items()}
    with pytest.raises(ValueError, match="has shape"):
        state_of(ArrayRecord(shapes), LAYOUT)


def test_a_record_of_two_precisions_loses_none():
    arrays = {"a": torch.ones(2), "b": torch.full((2,), 1 + 1e-12, dtype=torch.float64)}
    record = ArrayRecord(arrays)
    layout = layout_of(record)
    back = layout.read(state_of(record, layout))
    assert all(torch.equal(back[name], tensor) for name, tensor in arrays.items())
    assert [back[name].dtype for name in arrays] == [torch.float32, torch.float64]


def test_arrays_are_made_when_somebody_looks(monkeypatch):
    made = []
    monkeypatch.setattr("fedsam.messages.TensorArray", lambda e, s: made.append(e) or Array(NUMPY))
    record = VectorRecord(LAYOUT, state(3))
    assert torch.equal(record.state, state(3))
    assert torch.equal(record.copy().state, state(3))
    assert made == []
    assert list(record) == [entry.name for entry in LAYOUT.entries]
    assert len(record) == len(record.items()) == len(made) == len(LAYOUT.entries)


@pytest.mark.parametrize(
    ("look", "seen"),
    [
        (len, len(LAYOUT.entries)),
        (list, NAMES),
        (lambda record: record["0.bias"].shape, (2,)),
        (lambda record: "0.bias" in record, True),
        (lambda record: record == {}, False),
        (lambda record: all(name in repr(record) for name in NAMES), True),
        (lambda record: list(record.keys()), NAMES),
        (lambda record: [array.shape for array in record.values()], SHAPES),
        (
            lambda record: [(name, array.shape) for name, array in record.items()],
            [*zip(NAMES, SHAPES, strict=True)],
        ),
    ],
)
def test_each_way_of_looking_finds_the_arrays(look, seen):
    assert look(VectorRecord(LAYOUT, state(3))) == seen


def test_an_array_that_is_put_into_a_record_is_in_its_state():
    record = VectorRecord(LAYOUT, state(3))
    record["0.bias"] = Array(np.array([7.0, 8.0], dtype=np.float32))
    expected = LAYOUT.read(state(3)) | {"0.bias": torch.tensor([7.0, 8.0])}
    assert torch.equal(record.state, LAYOUT.write(expected))
    assert torch.equal(state_of(record, LAYOUT), LAYOUT.write(expected))
    record["nobody's"] = Array(np.zeros(1, dtype=np.float32))
    with pytest.raises(ValueError, match="nobody's"):
        _ = record.state


def test_arrays_that_are_taken_out_stay_in_the_state():
    record = VectorRecord(LAYOUT, state(3))
    names = list(record)
    assert [record.pop(name).shape for name in names] == [entry.shape for entry in LAYOUT.entries]
    assert len(record) == 0
    assert torch.equal(record.state, state(3))
