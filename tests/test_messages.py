"""Records: models as Flower's arrays, and as vectors."""

import copy

import pytest
import torch
from flwr.app import ArrayRecord
from torch import nn

from fedsam.base.vector import Layout
from fedsam.messages import VectorRecord, layout_of, plain_record, state_of

MODULE = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2))
LAYOUT = Layout.of(MODULE)


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
