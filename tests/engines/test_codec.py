"""What goes through the codec comes back as it was, to the bit and the dtype."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedsam.engines.codec import pack, unpack
from fedsam.training.client import ClientJob
from fedsam.training.loop import Result

CPU = torch.device("cpu")
W, C = torch.tensor([0.1, -0.0, float("inf")]), torch.tensor([1e-45, 3.0], dtype=torch.float64)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


def assert_same(back, value):
    if isinstance(value, Tensor):
        assert (back.dtype, back.shape) == (value.dtype, value.shape)
        bits = [t.contiguous().reshape(-1).view(torch.uint8).tolist() for t in (back, value)]
        assert bits[0] == bits[1]
    elif isinstance(value, Mapping):
        assert list(back) == list(value)
        for name in value:
            assert_same(back[name], value[name])
    elif isinstance(value, list | tuple):
        for one, other in zip(back, value, strict=True):
            assert_same(one, other)
    else:
        assert type(back) is type(value)
        assert repr(back) == repr(value)  # of NaN, too


def tensors():
    shapes = st.lists(st.integers(0, 3), max_size=3)
    bits = st.lists(st.integers(0, 255), min_size=27 * 8, max_size=27 * 8)

    def made(shape, dtype, bits):
        count = int(np.prod(shape))
        if dtype == torch.bool:
            bits = [bit % 2 for bit in bits]
        raw = torch.tensor(bits, dtype=torch.uint8)[: count * dtype.itemsize].clone()
        return raw.view(dtype).view(shape).T if len(shape) == 2 else raw.view(dtype).view(shape)

    return st.builds(made, shapes, st.sampled_from(DTYPES), bits)


PLAIN = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text()
VALUES = st.recursive(
    PLAIN | tensors(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(min_size=1), inner),
    max_leaves=8,
)


@given(VALUES)
def test_whatever_is_packed_comes_back(value):
    assert_same(unpack(pack(value), CPU), value)
    assert_same(unpack(pack(value).tobytes(), CPU), value)


def test_jobs_and_results_come_back():
    for value in (
        ClientJob(3, W, 2, 0.1, None, {}),
        ClientJob(3, W, 2, 0.1, MappingProxyType({"c": C}), {"c": W, "d": C}),
        Result(W, 12, 4, float("nan"), {}, {"c": C}),
    ):
        assert_same(type(value)(*unpack(pack(value), CPU)), value)


def test_tensors_are_copies_each_with_memory_of_its_own():
    """Ray's arrays may not be written to, and one vector that is kept must not keep the others."""
    packed = pack([W, C])
    packed.flags.writeable = False
    first, second = unpack(packed, CPU)
    first += 1
    assert torch.equal(unpack(packed, CPU)[0], W)
    assert second.untyped_storage().nbytes() == C.nbytes


def test_what_is_no_value_is_refused():
    with pytest.raises(TypeError, match="a set cannot be packed"):
        pack({"a": {1}})
