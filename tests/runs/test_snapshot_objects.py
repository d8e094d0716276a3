"""A strategy's state as numbers and back: every kind of value, what cannot be kept, no pickle."""

import json
import math
from collections import deque

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedsam.base.errors import TrainingError
from fedsam.base.vector import Layout
from fedsam.messages import VectorRecord
from fedsam.runs import checkpoint

LAYOUT = Layout.of(nn.Linear(2, 3))
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
KEYS = st.text() | st.integers() | st.tuples(st.integers(), st.text())
TREES = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.lists(inner).map(deque)
        | st.dictionaries(KEYS, inner)
    ),
    max_leaves=12,
)


def same(a, b):
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    if isinstance(a, list | tuple | deque):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


def through_json(value, there=None):
    tensors = {}
    tree = json.loads(json.dumps(checkpoint.flatten(value, "it", tensors)))
    return checkpoint.unflatten(tree, tensors, LAYOUT, there)


@given(TREES)
def test_plain_values_and_containers_come_back_as_they_were(value):
    assert same(through_json(value), value)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "bool"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
def test_arrays_and_tensors_keep_dtype_and_shape(dtype, shape):
    array = np.ones(shape, dtype)
    back = through_json([array, torch.from_numpy(array), array.dtype.type(1)])
    assert isinstance(back[0], np.ndarray)
    assert back[0].dtype == array.dtype
    assert back[0].shape == shape
    assert np.array_equal(back[0], array)
    assert torch.equal(back[1], torch.from_numpy(array))
    assert type(back[2]) is type(array.dtype.type(1))


def test_records_and_layouts_come_back():
    state = torch.arange(9.0)
    plain = ArrayRecord({"a": Array(np.eye(2)), "b": Array(np.array(3))})
    vector, record, layout = through_json([VectorRecord(LAYOUT, state), plain, LAYOUT])
    assert torch.equal(vector.state, state)
    assert layout is LAYOUT
    assert np.array_equal(record["a"].numpy(), np.eye(2))
    assert record["b"].numpy().shape == ()


class Inner:
    def __init__(self):
        self.values = deque([torch.zeros(2)])
        self.count = 0


class Outer:
    def __init__(self, rate):
        self.rate = rate
        self.inner = Inner()
        self.rule = lambda x: x
        self.kind = Inner


def test_an_object_is_filled_where_the_config_made_it():
    old, new = Outer(0.5), Outer(0.7)
    made = checkpoint.flatten(old, "it", {})
    old.inner.count, old.late = 3, (1, 2)
    old.inner.values.append(torch.ones(2))
    tensors = {}
    tree = checkpoint.without_defaults(checkpoint.flatten(old, "it", tensors), made)
    rule, inner = new.rule, new.inner
    assert checkpoint.unflatten(tree, tensors, LAYOUT, new) is new
    assert new.inner is inner
    assert (new.inner.count, new.late) == (3, (1, 2))
    assert [v.tolist() for v in new.inner.values] == [[0, 0], [1, 1]]
    assert new.rule is rule
    assert new.rate == 0.7  # unchanged since it was made: the config's word counts


class Loop:
    def __init__(self):
        self.me = self


@pytest.mark.parametrize(
    "value", [{1, 2}, torch.Generator(), np.random.default_rng(0), Loop(), 1j, b"bytes"]
)
def test_what_cannot_be_kept_is_named(value):
    with pytest.raises(TrainingError, match=r"it\..* which no checkpoint can hold"):
        checkpoint.flatten({"x": [value]}, "it", {})


def test_arrays_are_copied_and_tensors_are_not():
    array, tensor, tensors = np.zeros(2), torch.zeros(2), {}
    checkpoint.flatten([array, tensor], "it", tensors)
    array[0] = 1
    assert tensors["it.0"].tolist() == [0, 0]
    assert tensors["it.1"] is tensor


def test_a_record_may_be_copied_as_flowers_strategies_do():
    record = VectorRecord(LAYOUT, torch.arange(9.0))
    again = record.copy()
    assert isinstance(again, VectorRecord)
    assert again.state is record.state
    assert list(again) == list(record)
