"""Whose partition is whose in a deployment: by key, or first come; and no node stops the others."""

import json
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid
from test_flower import KEYS, Deployment, InMemoryGrid

from fedsam import client_app
from fedsam.base.errors import TrainingError, UsageError
from fedsam.config.schema import from_run_config
from fedsam.engines import flower
from fedsam.engines.flower import FlowerGrid, RollCall
from fedsam.engines.node_keys import keys_of, owners
from fedsam.messages import PARTITION
from fedsam.simulate.run import run

PUBLIC = [ec.generate_private_key(ec.SECP384R1()).public_key() for _ in range(4)]
PEM = [key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo) for key in PUBLIC]
SSH = [key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode() for key in PUBLIC]
OWNERS = {SSH[k]: k for k in range(3)}


class Keyed(Deployment):
    """Nodes whose public keys Flower knows; some answer the roll call as they like.

    Attributes
    ----------
    keys : dict
        From node id to what the SuperLink has as its public key.
    says : dict
        From node id to the content, or the error, of its answer; in place of the honest one.
    """

    def __init__(self, partitions, keys=None, says=None):
        super().__init__(partitions)
        self.keys, self.says = dict(keys or {}), dict(says or {})

    def get_nodes(self):
        return [
            SimpleNamespace(node_id=node, public_key=self.keys.get(node, b""))
            for node in self.contexts
        ]

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        honest = [m for m in messages if self._honest(m)]
        replies = super().send_and_receive(honest, timeout=timeout)
        return replies + [
            Message(self.says[m.metadata.dst_node_id], reply_to=m)
            for m in messages
            if m not in honest and self.says[m.metadata.dst_node_id] is not None
        ]

    def _honest(self, message):
        return (
            message.metadata.message_type != "query"
            or message.metadata.dst_node_id not in self.says
        )


def says(partition):
    return RecordDict({"config": ConfigRecord({PARTITION: partition})})


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    client_app.resident.cache_clear()
    for name, seconds in {"POLL": 0.01, "LINE": 0.03, "SETTLED": 0.1}.items():
        monkeypatch.setattr(flower, name, seconds)
    yield
    client_app.resident.cache_clear()


@pytest.fixture
def keys_file(tmp_path):
    """Return a function that writes a file of keys."""

    def write(*lines):
        path = tmp_path / "keys"
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    return write


@pytest.fixture
def said(caplog):
    """Return a function that returns what was warned of, without who was waited for."""
    return lambda: [m for m in caplog.messages if not m.startswith("waiting for nodes")]


def test_a_partition_is_its_keys_whoever_claims_it(said):
    grid = Keyed({70: 0, 71: 0, 72: 1, 73: 2}, {70: PEM[3], 71: PEM[0], 72: PEM[1], 73: PEM[2]})
    assert dict(RollCall(grid, 3, owners=OWNERS)) == {0: 71, 1: 72, 2: 73}
    assert said() == ["node 70 left out: its key is not in --node-keys"]
    assert all(70 not in nodes for nodes in grid.asked)  # a stranger is not even asked


def test_a_node_that_claims_anothers_partition_holds_nothing(said):
    keys = {70: PEM[0], 71: PEM[1], 72: PEM[2]}
    grid = Keyed({70: 0, 71: 1, 72: 2}, keys, {72: says(0)})
    roll = RollCall(grid, 3, owners=OWNERS)
    assert dict(roll) == {0: 70, 1: 71}
    assert roll[2] < 0
    assert said() == [
        "node 72 left out: it says partition 0, its key's is 2",
        "the run begins without partition 2; a node may still join",
    ]


def test_without_keys_the_first_holds_it_and_the_clash_is_named(said):
    grid = Keyed({70: 0, 71: 1, 72: 0})
    assert dict(RollCall(grid, 3)) == {0: 70, 1: 71}
    assert said() == [
        "node 72 left out: it says partition 0, which node 70 holds",
        "the run begins without partition 2; a node may still join",
    ]


NONSENSE = {
    "a text": (says("two"), "partition-id is 'two', no number of a partition"),
    "below zero": (says(-1), "partition-id is -1, no number of a partition"),
    "beyond the clients": (says(3), "it says partition 3, --clients 3 have fewer"),
    "true": (says(True), "partition-id is True, no number of a partition"),
    "a fraction": (says(1.5), "partition-id is 1.5, no number of a partition"),
    "a list": (says([2]), "partition-id is a list, no number of a partition"),
    "a long text": (says("2" * 10**6), None),
    "lines and colours": (says("\x1b[31m\nround 9: all fine"), None),
    "no record": (RecordDict(), None),
    "two records": (RecordDict({"a": ConfigRecord(), "b": ConfigRecord()}), None),
    "another record": (RecordDict({"config": ArrayRecord()}), None),
    "an empty record": (RecordDict({"config": ConfigRecord()}), None),
    "an error": (Error(2, "no torch"), "it answered: no torch"),
    "an error of many lines": (Error(2, "\x1b[31m\nround 9: all fine" * 10**5), None),
    "nothing": (None, "it does not say which partition it holds"),
}


@pytest.mark.parametrize("keyed", [False, True], ids=["first come", "by key"])
@pytest.mark.parametrize("kind", NONSENSE)
def test_no_answer_stops_the_start(kind, keyed, said):
    answer, reason = NONSENSE[kind]
    keys = {70: PEM[0], 71: PEM[1], 72: PEM[2]}
    grid = Keyed({70: 0, 71: 1, 72: 2}, keys, {72: answer})
    roll = RollCall(grid, 3, timeout=0.3, owners=OWNERS if keyed else None)
    assert dict(roll) == {0: 70, 1: 71}
    left_out, without = said()
    assert left_out.startswith("node 72 left out: ")
    assert left_out.isprintable()
    assert len(left_out) < 400
    assert reason is None or left_out == f"node 72 left out: {reason}"
    assert without == "the run begins without partition 2; a node may still join"


def test_too_few_partitions_with_a_node_are_an_error():
    grid = Keyed({70: 0, 71: 0, 72: 0})
    with pytest.raises(TrainingError) as ended:
        RollCall(grid, 3, needed=2)
    assert str(ended.value) == (
        "no node holds partition 1 (2 are missing; "
        "node 71: it says partition 0, which node 70 holds)"
    )


def test_answers_of_nodes_that_were_not_asked_and_second_answers_count_for_nothing():
    class Echo(Keyed):
        def send_and_receive(self, messages, *, timeout=None):
            replies = super().send_and_receive(messages, timeout=timeout)
            stranger = Message(says(2), reply_to=Message(RecordDict(), 99, "query"))
            return [
                stranger,
                *replies,
                Message(says(2), reply_to=Message(RecordDict(), 70, "query")),
            ]

    assert dict(RollCall(Echo({70: 0, 71: 1, 72: 2}), 3)) == {0: 70, 1: 71, 2: 72}


def test_a_newcomer_takes_only_what_nobody_holds(said):
    grid = Keyed({70: 0, 71: 1})
    roll = RollCall(grid, 2)
    grid.join(80, 0)
    grid.join(81, 1)
    roll.note_silent({71})
    assert (roll[0], roll[1]) == (70, 81)
    assert said() == [
        "node 80 left out: it says partition 0, which node 70 holds",
        "client 1: node 81 holds it now",
    ]


def test_a_newcomer_needs_the_key_of_the_partition_that_is_free(said):
    grid = Keyed({70: 0, 71: 1, 72: 2}, {70: PEM[0], 71: PEM[1], 72: PEM[2]})
    roll = RollCall(grid, 3, owners=OWNERS)
    roll.note_silent({72})
    grid.join(80, 2)
    grid.keys[80] = PEM[3]
    assert roll[2] == 72
    grid.join(81, 2)
    grid.keys[81] = PEM[2]
    assert roll[2] == 81
    assert said() == [
        "node 80 left out: its key is not in --node-keys",
        "client 2: node 81 holds it now",
    ]


def test_a_run_goes_on_without_a_node_until_it_answers_well(tmp_path, keys_file, caplog):
    keys = {70: PEM[0], 71: PEM[1], 72: PEM[2]}
    grid = Keyed({70: 0, 71: 1, 72: 2}, keys, {72: says(0)})

    def watch(line):
        if line["round"] == 2:
            del grid.says[72]
            flower.time.sleep(0.5)  # it is asked again by then

    out = tmp_path / "run"
    given = {"out": str(out), "node-keys": keys_file(*(f"{k} {SSH[k]}" for k in range(3)))}
    run(from_run_config(KEYS | given), watch, grid)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("left_out", []) for line in lines] == [[], [2], [2], [], [], []]
    assert caplog.messages.count("node 72 left out: it says partition 0, its key's is 2") == 1
    assert "client 2: node 72 holds it now" in caplog.messages


def test_nothing_is_sent_to_nobody():
    class Wire(Grid):
        get_node_ids = set_run = run = create_message = pull_messages = None

        def send_and_receive(self, messages, *, timeout=None):
            raise AssertionError

        def push_messages(self, messages):
            return [m.metadata.dst_node_id for m in messages]

    grid = FlowerGrid(Wire(), None)
    nobody = Message(RecordDict(), ~2, "train")
    assert grid.send_and_receive([nobody]) == []
    assert grid.push_messages([nobody, Message(RecordDict(), 7, "train")]) == [7]


def test_a_simulation_has_no_keys():
    with pytest.raises(UsageError, match=r"^--node-keys: a simulation's nodes have no keys"):
        RollCall(InMemoryGrid({70: 0}), 1, owners=OWNERS)


def test_our_engines_have_no_keys(quick, keys_file):
    with pytest.raises(UsageError, match=r"^--node-keys: only Flower's nodes have keys"):
        quick(node_keys=keys_file(f"0 {SSH[0]}"))


def test_a_file_of_keys_is_read_with_comments_and_notes(keys_file):
    path = keys_file("# ours", "", f"1 {SSH[1]} node-1", f"0  {SSH[0]}")
    assert owners(path, 2) == {SSH[1]: 1, SSH[0]: 0}


ED25519 = (
    "ssh-ed25519 "
    + (
        ed25519.Ed25519PrivateKey.generate()
        .public_key()
        .public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        .decode()
        .split()[1]
    )
)
WRONG = {
    "no number": ([f"first {SSH[0]}"], "line 1: must be a partition and a public key"),
    "no key": (["0"], "line 1: must be a partition and a public key"),
    "nonsense": (["0 ecdsa-sha2-nistp384 AAAA"], "line 1: "),
    "a key of another kind": ([f"0 {ED25519}"], "line 1: must be an EC key"),
    "beyond the clients": ([f"2 {SSH[0]}"], "line 1: partition 2: --clients 2 have 0 to 1"),
    "a partition twice": ([f"0 {SSH[0]}", f"0 {SSH[1]}"], "line 2: partition 0 has a line before"),
    "a key twice": ([f"0 {SSH[0]}", f"1 {SSH[0]}"], "line 2: this key has a line before"),
    "a partition without": ([f"1 {SSH[0]}"], "no key for partition 0; each of --clients 2 needs"),
    "a number of 5,000 digits": ([f"{'9' * 5000} {SSH[0]}"], "line 1: "),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_of_keys_is_refused_in_one_line(kind, keys_file):
    lines, reason = WRONG[kind]
    path = keys_file(*lines)
    with pytest.raises(UsageError) as refused:
        owners(path, 2)
    assert reason in str(refused.value)
    assert str(refused.value).startswith(f"--node-keys {path}")
    assert len(str(refused.value).splitlines()) == 1


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"^--node-keys .*/none: No such file or directory$"):
        owners(str(tmp_path / "none"), 2)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"^--node-keys .*/bytes: is no text file$"):
        owners(str(tmp_path / "bytes"), 2)


def test_keys_that_are_none_are_nobodys():
    grid = Keyed({70: 0, 71: 1, 72: 2}, {70: PEM[0], 71: b"anything", 72: b""})
    assert keys_of(grid) == {70: SSH[0]}
