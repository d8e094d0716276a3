"""A checkpoint's tensors: a safetensors file, written without a copy of what it holds."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load as load_tensors

from fedsam.runs.checkpoint import DTYPES, Snapshot, load, parts_of, save

SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
ONE = st.tuples(SHAPES, st.sampled_from(list(DTYPES)))


def filled(shape, dtype, seed):
    drawn = np.random.default_rng(seed).integers(0, 100, shape)
    return torch.from_numpy(np.asarray(drawn)).to(dtype)


@given(st.dictionaries(st.text(max_size=9), ONE, max_size=5))
def test_the_package_reads_what_is_written(kinds):
    kinds.pop("__metadata__", None)
    tensors = {n: filled(*kind, seed) for seed, (n, kind) in enumerate(kinds.items())}
    tensors["one"] = torch.tensor(3.0).expand(1)
    read = load_tensors(b"".join(map(bytes, parts_of(tensors))))
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_parts_are_the_tensors_memory_also_where_they_share_it():
    whole = torch.rand(6, 5)
    tensors = {
        "whole": whole,
        "rows": whole[2:],
        "turned": whole.T,
        "leaf": torch.nn.Parameter(whole),
    }
    header, *parts = parts_of(tensors)
    assert len(bytes(header)) % 8 == 0
    at = [np.frombuffer(part, np.uint8).ctypes.data for part in parts]
    # by name: leaf, rows, turned (a copy), whole
    assert at[0] == at[3] == whole.data_ptr()
    assert at[1] == whole[2:].data_ptr()
    read = load_tensors(b"".join(map(bytes, parts_of(tensors))))
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_what_is_read_goes_without_its_file(tmp_path):
    tensors = {"memory.3.c_i": torch.rand(1000), "model": torch.rand(7).bfloat16()}
    save(tmp_path, Snapshot(4, {"a": 1}, tensors))
    (file,) = tmp_path.rglob("*.safetensors")
    read = load(tmp_path)
    file.write_bytes(b"")
    assert (read.round, read.tree) == (4, {"a": 1})
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("damage", [b"", b"\x00", b"\xff" * 64])
def test_a_damaged_file_is_none(tmp_path, damage):
    save(tmp_path, Snapshot(4, {}, {"model": torch.rand(9)}))
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(damage + file.read_bytes()[len(damage) + 1 :])
    assert load(tmp_path) is None
