"""Clients that fail and nodes that lie: left out, counted, and the model as it would be without."""

import json
import logging
from io import BytesIO

import numpy as np
import pytest
import torch
from conftest import quick_config
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from fedsam.base.errors import TrainingError
from fedsam.base.vector import Layout
from fedsam.engines.local import LocalGrid
from fedsam.messages import (
    ARRAYS,
    EXCHANGED,
    METRICS,
    VectorRecord,
    model_of,
    plain_record,
    state_of,
    vectors_of,
    vectors_record,
)
from fedsam.server.screening import Limits, usable
from fedsam.simulate.run import run
from fedsam.training.client import Asked
from fedsam.training.method import Minimizer

LAYOUT = Layout.of(nn.Linear(3, 2))
BEFORE = VectorRecord(LAYOUT, torch.arange(8.0))
NODES = {101: 0, 102: 1, 103: 2}


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def content(model, examples=5, *, metrics=None, without=(), **more):
    said = {"num-examples": examples, "steps": 1, "loss": 0.5} | (metrics or {})
    record = MetricRecord({name: said[name] for name in said if name not in without})
    return RecordDict({ARRAYS: model, METRICS: record} | more)


def vector(offset):
    return VectorRecord(LAYOUT, torch.arange(8.0) + offset)


def plain(offset=1.0, **arrays):
    return ArrayRecord({**plain_record(vector(offset)), **arrays})


def answer(node, body):
    question = Message(RecordDict(), node, "train")
    return Message(body, reply_to=question)


def npy(array):
    buffer = BytesIO()
    np.save(buffer, array, allow_pickle=array.dtype == object)
    return buffer.getvalue()


def npz():
    buffer = BytesIO()
    np.savez(buffer, a=GOOD)
    return buffer.getvalue()


def with_header(text, elements=bytes(8), version=b"\x01\x00"):
    """A NumPy file of our own making, whose header is any text."""
    size = len(text).to_bytes(2 if version == b"\x01\x00" else 4, "little")
    return b"\x93NUMPY" + version + size + text + elements


def described(descr, shape="(2,)"):
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()


def forged(array, shape=(2,), dtype="float32", data=None):
    """An array whose header says one thing and whose bytes say another."""
    return Array(dtype=dtype, shape=tuple(shape), stype="numpy.ndarray", data=data or npy(array))


GOOD = np.zeros(2, np.float32)
ASKED = dict.fromkeys(range(3), Asked(examples=5, steps=1))
HOSTILE = {
    "another shape": plain(bias=Array(np.zeros(3, np.float32))),
    "another dtype": plain(bias=Array(np.zeros(2, np.float64))),
    "integers": plain(bias=Array(np.zeros(2, np.int64))),
    "a pickle": plain(bias=forged(np.array([print, len], object))),
    "no array": plain(bias=forged(GOOD, data=b"\x93NUMPY and then nothing")),
    "no bytes": plain(bias=forged(GOOD, data=b"\x00")),
    "cut short": plain(bias=forged(GOOD, data=npy(GOOD)[:-3])),
    "gigantic": plain(bias=forged(np.zeros(10**6, np.float32))),
    "another shape than it says": plain(bias=forged(np.zeros(1, np.float32))),
    "another dtype than it says": plain(bias=forged(np.zeros(1, np.float64))),
    "another kind": plain(
        bias=Array(dtype="float32", shape=(2,), stype="torch.pickle", data=npy(GOOD))
    ),
    "an npz": plain(bias=forged(GOOD, data=npz())),
    "a zip that is none": plain(bias=forged(GOOD, data=b"PK\x03\x04xx")),
    "a bare pickle": plain(bias=forged(GOOD, data=b"\x80\x04N.")),
    "version 2": plain(bias=forged(GOOD, data=with_header(described("'<f4'"), version=b"\2\0"))),
    "version 9": plain(bias=forged(GOOD, data=with_header(described("'<f4'"), version=b"\x09\0"))),
    "an object": plain(bias=forged(GOOD, data=with_header(described("'|O'")))),
    "a struct": plain(bias=forged(GOOD, data=with_header(described("[('a', '<f4')]")))),
    "a subarray": plain(bias=forged(GOOD, data=with_header(described("('<f4', (2,))", "()")))),
    "dates": plain(bias=forged(GOOD, data=with_header(described("'<M8[s]'"), bytes(16)))),
    "big endian": plain(bias=forged(GOOD, data=npy(GOOD.astype(">f4")))),
    "900 minus signs": plain(
        bias=forged(GOOD, data=with_header(described("'<f4'", f"({'-' * 900}2,)")))
    ),
    "190 brackets": plain(
        bias=forged(GOOD, data=with_header(described("'<f4'", "(" * 190 + "2" + ")" * 190)))
    ),
    "a negative shape": plain(
        bias=forged(GOOD, data=with_header(described("'<f4'", "(-1,)"))),
    ),
    "a shape of terabytes": plain(
        bias=forged(GOOD, data=with_header(described("'<f4'", "(1000000000000,)")))
    ),
    "a header that runs on": plain(
        bias=forged(GOOD, data=b"\x93NUMPY\x01\x00\xff\xff" + b" " * 90)
    ),
    "code in the header": plain(bias=forged(GOOD, data=with_header(b"__import__('os').abort()"))),
    "bytes behind it": plain(bias=forged(GOOD, data=npy(GOOD) + b"\x00")),
    "a name of escape codes": plain(**{"\x1b[31m\n" * 9000: Array(GOOD)}),
    "a model of another network": VectorRecord(Layout.of(nn.Linear(4, 2)), torch.zeros(10)),
    "too large to be squared": vector(1e18),
    "a name too many": plain(extra=Array(GOOD)),
    "a name too few": ArrayRecord({"bias": Array(GOOD)}),
    "nan": vector(float("nan")),
    "infinite in plain bytes": plain(float("inf")),
}
BODIES = {name: content(model) for name, model in HOSTILE.items()} | {
    "no model": RecordDict({METRICS: MetricRecord({"num-examples": 1})}),
    "no metrics": RecordDict({ARRAYS: vector(1.0)}),
    "two models": content(vector(1.0), other=vector(1.0)),
    "nothing": RecordDict(),
    "no examples": content(vector(1.0), examples=0),
    "negative examples": content(vector(1.0), examples=-4),
    "endless examples": content(vector(1.0), examples=float("inf")),
    "1e308 examples": content(vector(1.0), examples=1e308),
    "more examples than it holds": content(vector(1.0), examples=6),
    "a tenth of an example": content(vector(1.0), examples=0.1),
    "examples that are nan": content(vector(1.0), examples=float("nan")),
    "examples in a list": content(vector(1.0), examples=[5]),
    "steps in a list": content(vector(1.0), metrics={"steps": [1]}),
    "negative steps": content(vector(1.0), metrics={"steps": -5}),
    "steps that are nan": content(vector(1.0), metrics={"steps": float("nan")}),
    "2^62 steps": content(vector(1.0), metrics={"steps": 2**62}),
    "a step too few": content(vector(1.0), metrics={"steps": 0}),
    "half a step more": content(vector(1.0), metrics={"steps": 1.5}),
    "a loss in a list": content(vector(1.0), metrics={"loss": [1.0]}),
    "an endless loss": content(vector(1.0), metrics={"loss": float("-inf")}),
    "a loss of 400 digits": content(vector(1.0), metrics={"loss": 10**400}),
    "no loss": content(vector(1.0), without=["loss"]),
    "no steps": content(vector(1.0), without=["steps"]),
    "no number of examples": content(vector(1.0), without=["num-examples"]),
    "a metric too many": content(vector(1.0), metrics={"grade": 1.0}),
    "an empty metric": content(vector(1.0), metrics={"loss": []}),
    "two records of metrics": content(vector(1.0), more=MetricRecord({"num-examples": 5})),
    "a config": content(vector(1.0), config=ConfigRecord({"lr": 9.0})),
    "an empty record": content(vector(1.0), other=ArrayRecord()),
    "a model under another name": RecordDict(
        {"weights": vector(1.0), METRICS: content(vector(1.0))[METRICS]}
    ),
    "metrics where the model belongs": RecordDict({ARRAYS: MetricRecord({"num-examples": 5})}),
    "vectors nobody asked for": content(
        vector(1.0), **{EXCHANGED: vectors_record({"c": torch.zeros(8)})}
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_hostile_reply_is_left_out_and_said_so(name, caplog):
    good = [answer(101, content(vector(1.0))), answer(103, content(plain(3.0)))]
    with caplog.at_level(logging.WARNING, "fedsam"):
        kept = usable([*good, answer(102, BODIES[name])], NODES, BEFORE, 7, asked=ASKED)
    assert [NODES[reply.metadata.src_node_id] for reply in kept] == [0, 2]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("round 7: client 1 left out: ")
    assert said.isprintable()
    assert len(said) <= 240
    states = [state_of(model_of(reply.content), LAYOUT) for reply in kept]
    assert torch.equal(states[0], torch.arange(8.0) + 1)
    assert torch.equal(states[1], torch.arange(8.0) + 3)


def test_strangers_twins_errors_and_silence(caplog):
    body = content(vector(1.0))
    replies = [answer(102, body), answer(101, body), answer(102, content(vector(9.0)))]
    replies += [answer(999, body), answer(103, Error(0, "out of memory"))]
    with caplog.at_level(logging.WARNING, "fedsam"):
        kept = usable(replies, NODES, BEFORE, 1)
        usable([], NODES, BEFORE, 2)
    assert [reply.metadata.src_node_id for reply in kept] == [101, 102]
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "round 1: client 1 left out: it answered twice",
        "round 1: client 2 failed: out of memory",
        "round 2: client 0 did not answer",
        "round 2: client 1 did not answer",
        "round 2: client 2 did not answer",
    ]


@pytest.mark.parametrize("reason", ["a\nround 9: all fine", "\x1b[2J", "x" * 10**7, "\u202e", None])
def test_a_nodes_error_is_one_line_of_bounded_length(reason, caplog):
    assert usable([answer(102, Error(0, reason))], {102: 1}, BEFORE, 1) == []
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("round 1: client 1 failed: ")
    assert said.isprintable()
    assert len(said) <= 240


def test_long_updates_are_left_out_or_clipped(caplog):
    """Updates of lengths sqrt(8), 2 sqrt(8), 100 sqrt(8), on each way that a model may come."""

    def replies():
        models = vector(1.0), plain(2.0), vector(100.0)
        return [answer(node, content(m)) for node, m in zip(NODES, models, strict=True)]

    root = 8**0.5
    with caplog.at_level(logging.WARNING, "fedsam"):
        kept = usable(replies(), NODES, BEFORE, 1, limits=Limits(max_norm=10.0))
    assert [NODES[r.metadata.src_node_id] for r in kept] == [0, 1]
    assert "round 1: client 2 left out: its update is 283 long" in caplog.text
    kept = usable(replies(), NODES, BEFORE, 1, limits=Limits(clip_norm=1.5 * root))
    states = [state_of(model_of(reply.content), LAYOUT) for reply in kept]
    lengths = [float((state - BEFORE.state).norm()) for state in states]
    assert lengths == pytest.approx([root, 1.5 * root, 1.5 * root])
    assert torch.allclose(states[2] - BEFORE.state, torch.full((8,), 1.5))


NORMED = Layout.of(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
START = VectorRecord(NORMED, torch.arange(float(NORMED.size)))
VARIANCES = NORMED.statistics[1]
PARTS = {"weights": torch.arange(NORMED.trainable), "variances": VARIANCES}
PARTS |= {"means": NORMED.statistics[0], "a bias": torch.tensor([6])}


def moved(where, by):
    """The model that was sent, of which some numbers are others."""
    layout = Layout(NORMED.entries, 6 if where == "a bias" else NORMED.trainable)
    state = START.state.clone()
    state[PARTS[where]] += by
    return VectorRecord(layout, START.state), VectorRecord(layout, state)


@pytest.mark.parametrize("where", PARTS)
def test_all_that_is_averaged_has_a_length(where, caplog):
    before, after = moved(where, 3.0)
    length = 3.0 * len(PARTS[where]) ** 0.5

    def taken(**limits):
        return usable([answer(102, content(after))], NODES, before, 1, limits=Limits(**limits))

    assert not taken(max_norm=0.99 * length)
    assert f"client 1 left out: its update is {length:.3g} long" in caplog.text
    assert len(taken(max_norm=1.01 * length)) == 1
    (reply,) = taken(clip_norm=length / 4)
    change = model_of(reply.content).state - START.state
    torch.testing.assert_close(change, (after.state - START.state) / 4)


def test_a_counter_has_no_length():
    state = START.state.clone()
    (counter,) = [e for e in NORMED.entries if not e.dtype.is_floating_point]
    state[counter.offset] += 1000
    body = content(VectorRecord(NORMED, state))
    (reply,) = usable([answer(102, body)], NODES, START, 1, limits=Limits(max_norm=1e-3))
    assert torch.equal(model_of(reply.content).state, state)


TWO = st.lists(st.floats(0, 2.0**49, width=32), min_size=2, max_size=2)


@given(numbers=TWO, most=st.floats(1e-6, 1e6))
@settings(deadline=None)
def test_a_variance_that_is_clipped_is_not_negative(numbers, most):
    state = START.state.clone()
    state[VARIANCES] = torch.tensor(numbers)
    body = content(VectorRecord(NORMED, state))
    (reply,) = usable([answer(102, body)], NODES, START, 1, limits=Limits(clip_norm=most))
    assert model_of(reply.content).state[VARIANCES].min() >= 0


@pytest.mark.parametrize("value", [-1e-3, -10.0, -1e30])
def test_a_negative_variance_is_left_out(value, caplog):
    state = START.state.clone()
    state[VARIANCES[1]] = value
    for model in (VectorRecord(NORMED, state), plain_record(VectorRecord(NORMED, state))):
        assert usable([answer(102, content(model))], NODES, START, 1) == []
    assert caplog.text.count("client 1 left out: ") >= 2


@pytest.mark.parametrize("unit", [1.0, 1e3, 1e-4])
def test_a_vector_beside_the_model_is_no_longer_than_the_limit_allows_an_update(unit):
    """Updates of lengths 1, 2 and 3 and a limit of 4, so twice the median: so are the vectors."""
    lengths, limit = {101: (1.0, 1.0), 102: (2.0, 50.0), 103: (3.0, 3.0)}, Limits(max_norm=4.0)

    def vectors(limits):
        answers = [
            answer(
                node,
                content(
                    vector(update / 8**0.5),
                    **{EXCHANGED: vectors_record({"c": torch.full((8,), unit * own / 8**0.5)})},
                ),
            )
            for node, (update, own) in lengths.items()
        ]
        taken = usable(answers, NODES, BEFORE, 1, limits=limits, beside=["c"])
        return [float(vectors_of(reply.content, LAYOUT)["c"].norm()) / unit for reply in taken]

    assert vectors(limit) == pytest.approx([1.0, 6.0, 3.0])  # the median of 1, 50 and 3, twice
    assert vectors(Limits(clip_norm=1.0)) == pytest.approx([1.0, 1.5, 1.5])
    assert vectors(Limits(max_norm=1e6)) == pytest.approx([1.0, 50.0, 3.0])
    assert vectors(Limits()) == pytest.approx([1.0, 50.0, 3.0])


class Poisoned(LocalGrid):
    """One client of five sends another number of its BatchNorm from round 3 on."""

    poison = 0.0

    def send_and_receive(self, messages, *, timeout=None):
        answers = super().send_and_receive(messages, timeout=timeout)
        self.rounds = getattr(self, "rounds", 0) + 1
        for reply in answers:
            if self.rounds >= 3 and reply.metadata.src_node_id == 2:
                record = reply.content[ARRAYS]
                state = record.state.clone()
                state[record.layout.statistics[1]] = self.poison
                reply.content[ARRAYS] = plain_record(VectorRecord(record.layout, state))
        return answers


def normed(shape, classes):
    pixels = shape[0] * shape[1] * shape[2]
    layers = nn.Linear(pixels, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, classes)
    return nn.Sequential(nn.Flatten(), *layers)


@pytest.mark.parametrize(
    ("poison", "average", "options"),
    [(1e20, "ema", {"decay": 0.5}), (1e8, "none", {}), (-10.0, "none", {})],
)
def test_a_poisoned_variance_costs_no_accuracy(tmp_path, monkeypatch, poison, average, options):
    monkeypatch.setattr("fedsam.simulate.run.LocalGrid", Poisoned)
    monkeypatch.setattr(Poisoned, "poison", poison)
    keys = {"clients": 5, "clients_per_round": 5, "rounds": 6, "local_steps": 20, "lr": 0.1}
    keys |= {"model": "tests.server.test_screening:normed", "alpha": 100.0, "swa_start": 2}
    keys |= {"clip_norm": 1.0, "max_norm": 100.0, "average": average, "average_options": options}
    outcome = run(quick_config(tmp_path / "run", **keys))
    left = [line.get("left_out", []) for line in lines(outcome.folder)]
    assert left == [[]] * 3 + [[2]] * 4
    assert outcome.summary["final_accuracy"] > 0.6  # of ten classes; 0.1 with the poison


@pytest.mark.parametrize(
    "keys",
    [
        {"stragglers": 0.6, "local_epochs": 1.5},
        {"lifelong": 2, "lifelong_options": {"memory": 2}, "stragglers": 0.3},
        {"local_epochs": 0.0},
    ],
    ids=str,
)
def test_what_honest_clients_did_is_what_they_were_asked_for(tmp_path, keys):
    outcome = run(quick_config(tmp_path / "run", batch_size=7, **keys))
    assert not [line for line in lines(outcome.folder) if "left_out" in line]
    assert outcome.summary["rounds"] == 4


class Faulty(Minimizer):
    """SGD of which the clients named in ``bad`` raise."""

    batchable = False  # it looks at one number

    def __init__(self, bad="", always=False):
        self.bad = set(map(int, bad.split(","))) if bad else set()
        self.always = always

    def step(self, w, grad, descend, local):
        g = grad(w)
        if self.always or float(g.sum()) > 0:
            raise ArithmeticError("what a client's\ncode may raise")
        return descend(w, g), {}


@pytest.mark.parametrize("cohort", ["off", "vmap"])
def test_a_client_that_raises_is_left_out_and_counted(tmp_path, caplog, cohort):
    config = quick_config(
        tmp_path / "run",
        minimizer="tests.server.test_screening:Faulty",
        local_steps=1,
        cohort=cohort,
    )
    with caplog.at_level(logging.WARNING, "fedsam"):
        outcome = run(config)
    left = [client for line in lines(outcome.folder) for client in line.get("left_out", [])]
    assert left
    assert caplog.text.count("failed: ArithmeticError: what a client's code may raise") == len(left)
    assert "(test_screening.py:" in caplog.text
    assert outcome.summary["finished"]


def test_too_few_usable_updates_let_others_try_and_then_stop_the_run(tmp_path, caplog):
    keys = {"minimizer": "tests.server.test_screening:Faulty", "local_steps": 1}
    few = quick_config(tmp_path / "few", min_clients=3, seed=9, **keys)
    with caplog.at_level(logging.WARNING, "fedsam"):
        outcome = run(few)
    assert "updates can be used, --min-clients is 3" in caplog.text  # and others were asked
    for line in lines(outcome.folder)[1:]:
        assert len(line["clients"]) - len(line.get("left_out", [])) >= 3
    plain = lines(run(quick_config(tmp_path / "plain", seed=9)).folder)
    again = [
        a["clients"] == b["clients"]
        for a, b in zip(lines(outcome.folder)[1:], plain[1:], strict=True)
    ]
    assert True in again
    assert False in again
    with pytest.raises(ArithmeticError, match="what a client's\ncode may raise"):  # all, at once
        run(quick_config(tmp_path / "all", minimizer_options={"always": True}, **keys))
    assert not json.loads((tmp_path / "all" / "summary.json").read_text())["finished"]
    with pytest.raises(TrainingError, match=r"only . of --min-clients 5 clients returned"):
        run(quick_config(tmp_path / "five", min_clients=5, **keys))


def test_limits_that_no_update_reaches_change_no_byte(tmp_path):
    first = run(quick_config(tmp_path / "a")).folder
    other = run(quick_config(tmp_path / "b", max_norm=1e6, clip_norm=1e6, min_clients=5)).folder
    name = "model.safetensors"
    assert (first / name).read_bytes() == (other / name).read_bytes()
    clipped = load_file(run(quick_config(tmp_path / "c", clip_norm=1e-3)).folder / name)
    start = load_file(run(quick_config(tmp_path / "d", rounds=1, local_epochs=0)).folder / name)
    walked = sum(float((clipped[n] - start[n]).square().sum()) for n in clipped) ** 0.5
    assert walked <= 4 * 1e-3 * 1.001  # four rounds


def test_a_cohort_that_does_not_fit_is_halved(tmp_path, monkeypatch, caplog):
    from fedsam.training.batched import Program

    begin = Program.begin

    def small_memory(program, jobs, plans):
        if len(jobs) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        begin(program, jobs, plans)

    monkeypatch.setattr(Program, "begin", small_memory)
    with caplog.at_level(logging.WARNING, "fedsam"):
        halved = run(quick_config(tmp_path / "halved", cohort="vmap", algorithm="fedasam"))
    said = [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()]
    assert said == [
        "cohort: out of memory with 5 clients; now 3 at a time",
        "cohort: out of memory with 3 clients; now 2 at a time",
    ]
    monkeypatch.undo()
    whole = run(quick_config(tmp_path / "whole", cohort="vmap", algorithm="fedasam"))
    first, second = (load_file(o.folder / "model.safetensors") for o in (halved, whole))
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-6)
