"""Splits out of files: what a run left, JSON, and every refusal."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsam.base.errors import UsageError
from fedsam.base.randomness import numpy_generator
from fedsam.config.schema import resolve
from fedsam.data.partitions.saved import saved
from fedsam.data.partitions.splits import METHODS, dirichlet
from fedsam.simulate.build.data import load_dataset, split

LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def rows_of(partition):
    return [rows.tolist() for rows in (partition[k] for k in range(len(partition)))]


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def archive(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def test_clients_come_in_order_of_their_number_then_of_their_name(tmp_path):
    text = '{"b": [0], "10": [4, 1], "9.0": [2], "a": [5], "010": [3]}'
    partition = saved(LABELS, 5, written(tmp_path / "split.json", text))
    assert rows_of(partition) == [[2], [3], [4, 1], [5], [0]]
    assert partition.indices.dtype == partition.offsets.dtype == torch.int64


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(0, 9), st.sampled_from([0.1, 1.0, 100.0]))
def test_what_was_saved_is_read_either_way(tmp_path_factory, clients, seed, alpha):
    folder = tmp_path_factory.mktemp("split")
    labels = torch.arange(120) % 7
    made = dirichlet(labels, clients, numpy_generator(seed, "partition"), alpha=alpha)
    made.save(folder / "partition.npz", made.counts(labels, 7))
    assert saved(labels, clients, folder / "partition.npz").same_as(made)
    text = json.dumps({str(k): made[k].tolist() for k in range(clients)})
    assert saved(labels, clients, written(folder / "split.json", text)).same_as(made)


REFUSED = {
    "[1, 2]": "it does not map clients to rows",
    "{}": "it does not map clients to rows",
    '{"0": 3}': "the rows of client 0 must be a list of whole numbers",
    '{"0": [0], "1": [1.0]}': "the rows of client 1 must be a list of whole numbers",
    '{"0": [true], "1": [1]}': "the rows of client 0 must be a list of whole numbers",
    '{"0": [0], "1": ["1"]}': "the rows of client 1 must be a list of whole numbers",
    '{"0": [0], "1": [99999999999999999999]}': "neither a run's partition.npz nor JSON",
    '{"0": [0], "1": [': "neither a run's partition.npz nor JSON",
    b"\xff\xfe\x00": "neither a run's partition.npz nor JSON",
    '{"0": [0], "1": [6]}': "images must lie in 0..5",
    '{"0": [0], "1": [-1]}': "images must lie in 0..5",
    '{"0": [0], "1": [0]}': "image 0 is given out more than once",
    '{"0": [0], "1": []}': "client 1 has no images",
    '{"0": [], "1": []}': "client 0 has no images",
    '{"0": [0], "0": [1]}': "client 0 stands there 2 times",
    '{"0": [NaN], "1": [1]}': "the rows of client 0 must be a list of whole numbers",
    '{"0": ' + "[" * 100_000: "neither a run's partition.npz nor JSON",
    '{"0": [' + "9" * 5000 + "]}": "neither a run's partition.npz nor JSON",
    '{"0": [0]}': "makes 1; give --clients 1",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: str(text)[:40])
def test_a_wrong_json_is_refused_in_one_line(tmp_path, text):
    with pytest.raises(UsageError) as caught:
        saved(LABELS, 2, written(tmp_path / "split.json", text))
    assert REFUSED[text] in str(caught.value)
    assert "split.json" in str(caught.value)
    assert "\n" not in str(caught.value)


WHOLE = {"indices": np.arange(6), "offsets": np.array([0, 2, 6])}
HALF = archive(**WHOLE)[:200]
WRONG = {
    "empty": (b"", "it is no NumPy archive"),
    "an array": (b"\x93NUMPY\x01\x00", "it is no NumPy archive"),
    "csv": (b"user_id,image_id,class\n0,0,0\n", "it is no NumPy archive"),
    "cut off": (HALF, "it is no NumPy archive"),
    "no offsets": (archive(indices=np.arange(6)), "offsets"),
    "pickled": (archive(**{**WHOLE, "indices": np.array([0, None])}), "allow_pickle=False"),
    "floats": (archive(**{**WHOLE, "indices": np.arange(6.0)}), "indices must be whole numbers"),
    "a table": (archive(**{**WHOLE, "indices": np.eye(6, dtype=int)}), "indices must be whole"),
    "no client": (archive(**{**WHOLE, "offsets": np.array([0])}), "offsets must lead from 0"),
    "short": (archive(**{**WHOLE, "offsets": np.array([0, 2, 5])}), "offsets must lead from 0 to"),
    "falling": (archive(**{**WHOLE, "offsets": np.array([0, 7, 6])}), "offsets must not fall"),
    "other classes": (archive(**WHOLE, counts=np.array([[2, 0, 0], [1, 2, 1]])), "other classes"),
    "more classes": (archive(**WHOLE, counts=np.zeros((2, 10), dtype=int)), "other classes"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_archive_is_refused_in_one_line(tmp_path, name):
    content, says = WRONG[name]
    with pytest.raises(UsageError) as caught:
        saved(LABELS, 2, written(tmp_path / "partition.npz", content))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_archive_whose_bytes_are_damaged_is_refused(tmp_path):
    dirichlet(LABELS, 2, numpy_generator(0, "partition"), alpha=1.0).save(
        tmp_path / "good.npz", torch.tensor([[1, 1, 1], [1, 1, 1]])
    )
    content = bytearray((tmp_path / "good.npz").read_bytes())
    with zipfile.ZipFile(tmp_path / "good.npz") as members:
        begin = members.getinfo("indices.npy").header_offset
    content[begin + 50 : begin + 70] = b"x" * 20
    with pytest.raises(UsageError, match="neither a run's partition"):
        saved(LABELS, 2, written(tmp_path / "partition.npz", bytes(content)))


def test_seeds_share_one_split_by_its_seed_or_by_a_runs_folder(tmp_path, monkeypatch):
    def of(**given):
        config = resolve({"clients": 20, **given})
        return split(config, load_dataset(config))

    first = of(seed=3)
    assert not first.same_as(of(seed=4))
    assert first.same_as(of(seed=4, split_seed=3))
    assert of(seed=3, split_seed=0).same_as(of(seed=0))
    run = tmp_path / "a run: 1"  # no import path, though it holds a colon
    run.mkdir()
    labels = load_dataset(resolve({})).train_labels
    first.save(run / "partition.npz", first.counts(labels, 10))
    monkeypatch.setenv("RUNS", str(tmp_path))
    for place in (str(run), str(run / "partition.npz"), "$RUNS/a run: 1"):
        assert first.same_as(of(seed=5, partition=place))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "iid").mkdir()  # a method's name stays one
    assert of(partition="iid").same_as(METHODS["iid"](labels, 20, numpy_generator(0, "partition")))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"partition": "nowhere/run"}, "--partition: no 'nowhere/run'"),
        ({"partition": "nowhere.npz"}, "--partition nowhere.npz: neither"),
        ({"partition": "nowhere.json"}, "--partition nowhere.json: neither"),
        ({"partition": "."}, "--partition partition.npz: neither"),
        ({"partition": "$NOT_THERE/a"}, "--partition $NOT_THERE/a: the environment has no"),
        (
            {"partition": ".", "partition_options": {"run_out": "redraw"}},
            "--partition-options: . is a file and takes none",
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_path_that_leads_to_no_split_is_refused(tmp_path, monkeypatch, given, says):
    monkeypatch.chdir(tmp_path)
    config = resolve(given)
    with pytest.raises(UsageError) as caught:
        split(config, load_dataset(config))
    assert str(caught.value).startswith(says)
