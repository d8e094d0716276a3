"""Any reply at all, against every strategy: it is left out, or one of the right form."""

import logging
import tracemalloc
from functools import cache
from io import BytesIO

import numpy as np
import pytest
import torch
from fedsam.clients.corrections.scaffold import Scaffold
from fedsam.clients.losses.plain import Plain
from fedsam.clients.minimizers.sgd import SGD
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fedsam.base.vector import Layout
from fedsam.config.schema import resolve
from fedsam.messages import (
    ARRAYS,
    EXAMPLES,
    EXCHANGED,
    LEARNING_RATE,
    LOSS,
    METRICS,
    NUMPY_FILE,
    STEPS,
    VectorRecord,
    plain_content,
    state_of,
    train_reply,
)
from fedsam.server.grids import CohortGrid
from fedsam.server.replies import LONGEST, bounds_of
from fedsam.server.screening import Limits, usable
from fedsam.server.side_vectors import SideVectors
from fedsam.simulate.build.strategy import new_strategy
from fedsam.training.client import Asked
from fedsam.training.method import Method

LAYOUT = Layout.of(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
P = LAYOUT.trainable
BEFORE = VectorRecord(LAYOUT, torch.arange(float(LAYOUT.size)) / LAYOUT.size)
HOSTILE, COHORT = 3, 8  # Bulyan needs seven beside it
NODES = {100 + client: client for client in range(COHORT)}
ASKED = {client: Asked(examples=10 + client, steps=2) for client in range(COHORT)}
OF_FLOWER = {
    "FedAvg": {},
    "FedAvgM": {"server_momentum": 0.5},
    "FedAdam": {},
    "FedYogi": {},
    "FedAdagrad": {},
    "FedMedian": {},
    "FedTrimmedAvg": {},
    "Krum": {"num_malicious_nodes": 1},
    "MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 4},
    "Bulyan": {"num_malicious_nodes": 1},
    "QFedAvg": {"client_learning_rate": 0.1, "q": 2.0},
}
OURS = ["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "fedacg", "feddyn", "fedexp"]
OURS += ["fedgloss", "fednova", "adabest"]


def config(strategy, **keys):
    counts = {"clients": COHORT, "clients_per_round": COHORT, "rounds": 2}
    return resolve(counts | {"strategy": strategy, "average": "ema", "swa_start": 0} | keys)


CONFIGS = {name: config(name) for name in OURS} | {
    name: config(f"flwr.serverapp.strategy:{name}", strategy_options=options)
    for name, options in OF_FLOWER.items()
}
CONFIGS |= {f"fedavg and {name}": config("fedavg", average=name) for name in ("swa", "wima")}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr("gc.collect", lambda: 0)  # Flower asks for it after each array
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.ERROR)
    with np.errstate(all="ignore"):  # a client that lies well may let a square overflow
        yield
    logger.setLevel(before)


def honest_content(client, *, beside):
    generator = torch.Generator().manual_seed(client)
    state = BEFORE.state + 0.1 * torch.rand(LAYOUT.size, generator=generator)
    vectors = {"c": torch.rand(P, generator=generator)} if beside else None
    asked = ASKED[client]
    return train_reply(VectorRecord(LAYOUT, state), asked.examples, asked.steps, 0.5, vectors)


def answer(client, body):
    return Message(body, reply_to=Message(RecordDict(), 100 + client, "train"))


def honest(*, beside):
    clients = [client for client in range(COHORT) if client != HOSTILE]
    return [answer(client, honest_content(client, beside=beside)) for client in clients]


def npy(array):
    buffer = BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def npz(array):
    buffer = BytesIO()
    np.savez(buffer, array)
    return buffer.getvalue()


SHAPES = st.sampled_from([(2,), (2, 3), (), (0,), (-1,), (10**12,), (2, 3, 1), (6,), (True,)])
FLOATS = st.floats(width=64) | st.sampled_from([float("nan"), 1e308, -1e308, 1e-320, 1e16, -10.0])
INTEGERS = st.integers() | st.sampled_from([0, -1, 1, 2**31, 2**62, 2**63, -(2**70), 10**400])
NAMES = st.sampled_from([*(e.name for e in LAYOUT.entries), "c", EXAMPLES, STEPS, LOSS, "train"])
LONG = st.sampled_from(["\x1b[31m", "\n", "a", "\u202e", "\0"]).map(lambda text: text * 100_000)
TEXTS = st.text(max_size=20) | LONG
DESCR = st.sampled_from(["'<f4'", "'>f4'", "'|O'", "'<M8[s]'", "[('a', '<f4')]", "('<f4', (2,))"])
NUMBERS = st.sampled_from(["(2,)", "(2, 3)", "()", "(-1,)", "(1000000000000,)"]) | st.sampled_from(
    ["-" * 900 + "2", "(" * 190 + ")" * 190, "[2] * 10**9", "print()", "9" * 5000]
)
HEADERS = st.builds(
    "{{'descr': {}, 'fortran_order': {}, 'shape': {}, }}\n".format,
    DESCR,
    st.sampled_from(["False", "True", "None", "1"]),
    NUMBERS,
).map(str.encode)


@st.composite
def bytes_of_an_array(draw):
    """The bytes of a right array, of another one, of a forged file, or any bytes."""
    values = st.floats(width=32) | st.sampled_from([0.5, -10.0, 1e15, 1e19])
    array = np.full(draw(SHAPES.filter(lambda s: s in [(2,), (2, 3), (), (0,)])), draw(values))
    array = array.astype(draw(st.sampled_from(["<f4", ">f4", "<f8", "<i8", "|b1", "O"])))
    kind = draw(st.sampled_from(["npy", "fortran", "npz", "cut", "flipped", "forged", "any"]))
    if kind == "npz":
        return npz(array)
    if kind == "any":
        return draw(st.binary(max_size=300) | st.just(bytes(10**6)))
    if kind == "forged":
        text, version = draw(HEADERS | st.binary(max_size=99)), draw(st.sampled_from([1, 2, 3, 9]))
        length = len(text) + draw(st.sampled_from([0, 0, 0, -1, 1, 30_000]))
        size = max(length, 0).to_bytes(2 if version == 1 else 4, "little")
        return b"\x93NUMPY" + bytes([version, 0]) + size + text + draw(st.binary(max_size=40))
    data = npy(np.asfortranarray(array) if kind == "fortran" else array)
    place = draw(st.integers(0, len(data) - 1))
    if kind == "cut":
        return data[:place]
    if kind == "flipped":
        return data[:place] + bytes([data[place] ^ draw(st.integers(1, 255))]) + data[place + 1 :]
    return data


ANY_ARRAY = st.builds(
    lambda dtype, shape, stype, data: Array(dtype=dtype, shape=shape, stype=stype, data=data),
    st.sampled_from(["float32", "float64", "int64", "bool", "object", "float32" * 10**5]),
    SHAPES,
    st.sampled_from([NUMPY_FILE, NUMPY_FILE, "torch.pickle", ""]),
    bytes_of_an_array(),
)
ANY_NUMBER = INTEGERS | FLOATS
ANY_METRIC = ANY_NUMBER | st.lists(INTEGERS, max_size=3) | st.lists(FLOATS, max_size=3)
ANY_VALUE = ANY_METRIC | TEXTS | st.booleans() | st.binary(max_size=9) | st.lists(TEXTS, max_size=2)
ANY_RECORD = st.one_of(
    st.dictionaries(NAMES | TEXTS, ANY_ARRAY, max_size=4).map(ArrayRecord),
    st.dictionaries(NAMES | TEXTS, ANY_METRIC, max_size=4).map(MetricRecord),
    st.dictionaries(NAMES | TEXTS, ANY_VALUE, max_size=4).map(ConfigRecord),
)
ANY_KEY = st.sampled_from([ARRAYS, METRICS, EXCHANGED, "config", "other"]) | TEXTS


def another_array(draw, content):
    content[ARRAYS][draw(NAMES)] = draw(ANY_ARRAY)


def other_numbers(draw, content):
    entry = draw(st.sampled_from(LAYOUT.entries))
    value = draw(st.floats(width=32) | st.sampled_from([-10.0, 1e15, 3e38]))
    if not entry.dtype.is_floating_point:
        value = draw(st.integers(-(2**63), 2**63 - 1))
    dtype = str(entry.dtype).removeprefix("torch.")
    content[ARRAYS][entry.name] = Array(np.full(entry.shape, value, dtype))


def another_metric(draw, content):
    content[METRICS][draw(NAMES | TEXTS)] = draw(ANY_METRIC)


def another_loss(draw, content):
    content[METRICS][LOSS] = draw(st.floats(0, 1e300))


def another_record(draw, content):
    content[draw(ANY_KEY)] = draw(ANY_RECORD)


def other_vectors(draw, content):
    if EXCHANGED in content:
        value = draw(st.floats(width=32) | st.sampled_from([1e15, 3e38]))
        content[EXCHANGED] = ArrayRecord({"c": Array(np.full(P, value, np.float32))})


def something_less(draw, content):
    record = draw(st.sampled_from([content, *content.values()]))
    if names := list(record):
        del record[draw(st.sampled_from(names))]


CHANGES = [another_array, another_array, other_numbers, other_numbers, other_numbers]
CHANGES += [another_metric, another_metric, another_loss, another_record, other_vectors]


@st.composite
def replies(draw, *, beside):
    """Any error, any records, or an honest reply that was changed in up to three places."""
    kind = draw(st.sampled_from(["changed"] * 6 + ["any", "error"]))
    if kind == "error":
        return Error(draw(st.integers(-5, 300)), draw(st.none() | TEXTS))
    if kind == "any":
        return RecordDict(draw(st.dictionaries(ANY_KEY, ANY_RECORD, max_size=4)))
    content = plain_content(honest_content(HOSTILE, beside=beside))
    for change in draw(st.lists(st.sampled_from(CHANGES), max_size=3)):
        change(draw, content)
        if not (
            isinstance(content.get(ARRAYS), ArrayRecord)
            and isinstance(content.get(METRICS), MetricRecord)
        ):
            return content
    if draw(st.integers(0, 5)) == 0:
        something_less(draw, content)
    return content


def taken_of(answers, *, beside, limits, bounds):
    """Return the replies that are taken, and the hostile one's fate."""
    names = ["c"] if beside else []
    replies = usable(
        *(answers, NODES, BEFORE, 1), limits=limits, beside=names, bounds=bounds, asked=ASKED
    )
    return replies, HOSTILE in {NODES[reply.metadata.src_node_id] for reply in replies}


def copied(reply):
    """A reply for one more strategy: Flower's take apart what they are given."""
    content = RecordDict({ARRAYS: reply.content[ARRAYS].copy(), METRICS: reply.content[METRICS]})
    return Message(content, reply_to=Message(RecordDict(), reply.metadata.src_node_id, "train"))


def aggregated(strategy, replies):
    """Return the model and its average that a strategy makes of a round."""
    grid = CohortGrid(None, range(COHORT))
    list(strategy.configure_train(1, BEFORE, ConfigRecord({LEARNING_RATE: 0.1}), grid))
    arrays, _ = strategy.aggregate_train(1, [copied(reply) for reply in replies])
    return torch.cat([state_of(arrays, LAYOUT), state_of(strategy.model(arrays), LAYOUT)])


def folded(replies):
    side_vectors = SideVectors(Method(SGD(), Scaffold(), loss=Plain()), LAYOUT, COHORT)
    side_vectors.fold([answer(HOSTILE, RecordDict({**reply.content})) for reply in replies])
    return side_vectors.vectors["c"]


@cache
def without(name, beside, limits):
    """What a strategy makes of the honest replies alone."""
    replies, _ = taken_of(honest(beside=beside), beside=beside, limits=limits, bounds={})
    return aggregated(new_strategy(CONFIGS[name]), replies)


LIMITS = [Limits(), Limits(clip_norm=1.0), Limits(max_norm=5.0), Limits(equal=True)]
SIZE = 4 * LAYOUT.size  # bytes of the model


def assert_harmless(data, caplog, most):
    """Let one reply come to a round of a strategy; of ``most`` of them, if it is taken."""
    caplog.clear()
    beside, limits = data.draw(st.booleans()), data.draw(st.sampled_from(LIMITS))
    body = data.draw(replies(beside=beside))
    first = data.draw(st.integers(0, len(CONFIGS) - 1))
    answers = [*honest(beside=beside), answer(HOSTILE, body)]
    tracemalloc.start()
    try:
        good, was_taken = taken_of(answers, beside=beside, limits=limits, bounds={})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * SIZE * COHORT + 150_000, f"{peak} bytes"
    assert len(good) == COHORT - 1 + was_taken
    assert len(caplog.records) == (not was_taken)
    for record in caplog.records:
        said = record.getMessage()
        assert said.startswith(f"round 1: client {HOSTILE} ")
        assert said.isprintable()
        assert len(said) <= LONGEST + 50
    names = sorted(CONFIGS)[first:] + sorted(CONFIGS)[:first]
    for name in names[: most if was_taken else 1]:
        strategy, there = new_strategy(CONFIGS[name]), was_taken
        if was_taken and (bounds := bounds_of(strategy)):
            answers = [*honest(beside=beside), answer(HOSTILE, body)]
            good, there = taken_of(answers, beside=beside, limits=limits, bounds=bounds)
        state = aggregated(strategy, good)
        assert state.isfinite().all(), name
        assert there or torch.equal(state, without(name, beside, limits)), name
    assert not beside or folded(good).isfinite().all()
    return was_taken


CALM = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]


@settings(max_examples=300, deadline=None, suppress_health_check=CALM, derandomize=True)
@given(data=st.data())
def test_no_reply_ends_a_round(caplog, data):
    assert_harmless(data, caplog, most=2)


@pytest.mark.long
def test_ten_thousand_replies_end_no_round(caplog):
    counts = {True: 0, False: 0}

    @settings(max_examples=10_000, deadline=None, suppress_health_check=CALM, database=None)
    @given(data=st.data())
    def one(data):
        counts[assert_harmless(data, caplog, len(CONFIGS))] += 1

    one()
    print(f"{counts[False]} left out, {counts[True]} of the right form")
    assert counts[False] > 1000
    assert counts[True] > 300
