"""Flower's runtime at its seam: a Grid that says which nodes there are, and lets them answer."""

import json
import logging
import traceback

import pytest
from conftest import quick_config
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedsam import client_app, server_app
from fedsam.base.errors import TrainingError, UsageError
from fedsam.config.schema import PATHS, Config, empty_run_config, from_run_config, keys
from fedsam.data.sources.load import LISTINGS
from fedsam.engines import flower
from fedsam.engines.flower import RollCall
from fedsam.messages import CONFIG, PARTITION
from fedsam.simulate.run import run

KEYS = {"rounds": 5, "clients": 3, "clients-per-round": 3, "eval-every": 5, "alpha": 1.0}
KEYS |= {"local-steps": 1, "device": "cpu"}


class Deployment(Grid):
    """Nodes by id, each with its partition; those in ``dead`` never answer.

    Attributes
    ----------
    asked : list
        The nodes of each exchange.
    """

    def __init__(self, partitions, run_config=KEYS):
        self.run_config, self.dead, self.asked = run_config, set(), []
        self.contexts = {}
        for node, partition in partitions.items():
            self.join(node, partition)

    def join(self, node, partition):
        self.contexts[node] = Context(
            1, node, {PARTITION: partition}, RecordDict(), self.run_config
        )

    def get_node_ids(self):
        return list(self.contexts)

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        self.asked.append(sorted(m.metadata.dst_node_id for m in messages))
        alive = [m for m in messages if m.metadata.dst_node_id not in self.dead]
        return [client_app.app(m, self.contexts[m.metadata.dst_node_id]) for m in alive]

    set_run = run = create_message = push_messages = pull_messages = None


class InMemoryGrid(Deployment):
    """What Flower's simulation calls its Grid."""


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    client_app.resident.cache_clear()
    for name, seconds in {"POLL": 0.01, "LINE": 0.03, "SETTLED": 0.1}.items():
        monkeypatch.setattr(flower, name, seconds)
    yield
    client_app.resident.cache_clear()


def test_a_simulation_with_too_few_nodes_is_refused_at_once():
    grid = InMemoryGrid({70: 0, 71: 1, 72: 2})
    with pytest.raises(UsageError) as refused:
        RollCall(grid, 5)
    assert str(refused.value) == (
        "--clients 5: the simulation has 3 nodes; give --federation-config 'num-supernodes=5'"
    )
    assert grid.asked == []


def test_a_simulation_whose_nodes_are_still_coming_is_waited_for(monkeypatch):
    grid = InMemoryGrid({70: 0})
    monkeypatch.setattr(flower, "SETTLED", 60)
    sleep = flower.time.sleep

    def join(seconds):
        grid.join(70 + len(grid.contexts), len(grid.contexts))
        sleep(seconds)

    monkeypatch.setattr(flower.time, "sleep", join)
    assert dict(RollCall(grid, 5)) == {k: 70 + k for k in range(5)}


def test_who_is_waited_for_is_said_and_waited_for(monkeypatch, caplog):
    grid = Deployment({70: 3, 71: 1})
    sleep = flower.time.sleep

    def join(seconds):
        if len(caplog.messages) == 2:
            for node, partition in ((72, 0), (73, 2), (74, 4)):
                grid.join(node, partition)
        sleep(seconds)

    monkeypatch.setattr(flower.time, "sleep", join)
    assert dict(RollCall(grid, 5)) == {0: 72, 1: 71, 2: 73, 3: 70, 4: 74}
    line = "waiting for nodes: 2 of --clients 5 are there; nobody holds partitions 0, 2, 4"
    assert caplog.messages == [line, line]


def test_nodes_that_do_not_come_are_named():
    grid = Deployment({70: 1})
    with pytest.raises(TrainingError) as ended:
        RollCall(grid, 6, timeout=0.1, needed=2)
    assert str(ended.value) == "no node holds partition 0 (5 are missing; 1 nodes are there)"


def test_nodes_that_cannot_answer_are_said_at_once(monkeypatch):
    grid = Deployment({70: 0, 71: 1})
    monkeypatch.setattr(
        client_app, "app", lambda message, context: Message(Error(2, "no torch"), reply_to=message)
    )
    with pytest.raises(TrainingError, match=r"no node holds partition 0 .*: no torch"):
        RollCall(grid, 2)


ANSWERS = {
    "a text": RecordDict({CONFIG: ConfigRecord({PARTITION: "two"})}),
    "a long text": RecordDict({CONFIG: ConfigRecord({PARTITION: "\x1b[2J\n" * 10**5})}),
    "a list": RecordDict({CONFIG: ConfigRecord({PARTITION: ["a" * 10**5]})}),
    "a fraction": RecordDict({CONFIG: ConfigRecord({PARTITION: 1.0})}),
    "nan": RecordDict({CONFIG: ConfigRecord({PARTITION: float("nan")})}),
    "a truth": RecordDict({CONFIG: ConfigRecord({PARTITION: True})}),
    "negative": RecordDict({CONFIG: ConfigRecord({PARTITION: -1})}),
    "bytes": RecordDict({CONFIG: ConfigRecord({PARTITION: b"\0"})}),
    "nothing": RecordDict(),
    "no partition": RecordDict({CONFIG: ConfigRecord()}),
    "more than that": RecordDict({CONFIG: ConfigRecord({PARTITION: 1, "and": 2})}),
    "two records": RecordDict({CONFIG: ConfigRecord({PARTITION: 1}), "x": ConfigRecord()}),
    "metrics": RecordDict({CONFIG: MetricRecord({PARTITION: 1})}),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_odd_answer_to_the_roll_call_costs_its_node_alone(name, monkeypatch, caplog):
    grid, honest = Deployment({70: 0, 71: 1, 72: 2}), client_app.app

    def answer(message, context):
        if context.node_id == 72:
            return Message(ANSWERS[name], reply_to=message)
        return honest(message, context)

    monkeypatch.setattr(client_app, "app", answer)
    assert dict(RollCall(grid, 2)) == {0: 70, 1: 71}
    (said,) = caplog.messages
    assert said.startswith("node 72 left out: ")
    assert said.isprintable()
    assert len(said) <= 240


def test_a_node_that_comes_back_under_a_new_id_is_found(tmp_path, caplog):
    grid = Deployment({70: 0, 71: 1, 72: 2})

    def watch(line):
        if line["round"] == 1:
            grid.dead.add(71)
        if line["round"] == 3:
            grid.join(81, 1)

    out = tmp_path / "run"
    run(from_run_config(KEYS | {"out": str(out)}), watch, grid)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("left_out", []) for line in lines] == [[], [], [1], [1], [], []]
    assert "client 1: node 81 holds it now" in caplog.messages
    trained = [nodes for nodes in grid.asked if len(nodes) == 3][1:]
    assert trained == [[70, 71, 72]] * 3 + [[70, 72, 81]] * 2
    assert grid.asked.count([81]) == 1  # asked once, when its partition was wanted


def test_a_node_that_has_left_is_said_with_what_to_do(caplog):
    grid = Deployment({70: 0, 71: 1})
    roll = RollCall(grid, 2)
    roll.note_silent({71})
    del grid.contexts[71]
    assert roll[1] == 71
    assert caplog.messages == [
        "client 1: its node has left; a SuperNode with partition-id=1 takes its place"
    ]
    assert roll[0] == 70
    assert len(caplog.messages) == 1


OURS = ["cohort", "engine", "gpus_per_worker", "processes", "ray_address", "workers"]


def test_these_keys_choose_an_engine_of_ours():
    assert sorted(keys("engine")) == OURS


@pytest.mark.parametrize("key", OURS)
def test_keys_that_say_nothing_to_flower_are_refused(key):
    name = key.replace("_", "-")
    default = Config.model_fields[key].default or 1
    with pytest.raises(UsageError, match=f"^--{name}: on Flower's runtime nodes train; leave it"):
        from_run_config(empty_run_config() | {name: default})


@pytest.mark.parametrize("key", ["out", "data-root", "partition-options"])
def test_relative_paths_are_refused(key):
    def given(path):
        return {key: path if key != "partition-options" else json.dumps({"path": path})}

    with pytest.raises(UsageError, match=f"^--{key} some/where: .* give an absolute path$"):
        from_run_config({"partition": "csv"} | given("some/where"))
    from_run_config({"partition": "csv"} | given("/some/where"))


def test_relative_paths_of_data_sets_are_refused():
    assert {kind.partition(":")[0] for kind in LISTINGS} == set(PATHS)
    for dataset in ["packed/mine", *(f"{kind}:mine" for kind in PATHS)]:
        place = dataset.rpartition(":")[2]
        with pytest.raises(UsageError, match=f"^--dataset {place}: .* give an absolute path$"):
            from_run_config({"dataset": dataset})
        from_run_config({"dataset": dataset.replace(place, f"/{place}")})
    for dataset in ("mine:make", "camvid"):
        from_run_config({"dataset": dataset})


def test_a_wrong_value_is_one_line_first(caplog):
    context = Context(1, 1, {}, RecordDict(), {"clients": 3, "clients-per-round": 5})
    said = "--clients-per-round 5: at most --clients 3"
    with pytest.raises(UsageError) as refused:
        server_app.app(Deployment({}), context)
    assert [(r.levelno, r.getMessage()) for r in caplog.records] == [
        (logging.ERROR, f"fedsam: error: {said}")
    ]
    trace = "".join(traceback.format_exception(refused.value))
    assert trace.splitlines()[-1].endswith(said)
    assert "pydantic" not in trace


def test_our_client_leaves_keys_of_another_app_alone(tmp_path):
    theirs = {"num-server-rounds": 2, "engine": "steam", "out": "their/results"}
    run_config = KEYS | {"rounds": 1}
    ours = run(
        quick_config(tmp_path / "a", **{k.replace("-", "_"): v for k, v in run_config.items()})
    )
    grid = Deployment({70: 0, 71: 1, 72: 2}, run_config | theirs)
    other = run(from_run_config(run_config | {"out": str(tmp_path / "b")}), flower=grid)
    assert not json.loads((other.folder / "metrics.jsonl").read_text().splitlines()[1]).get(
        "left_out"
    )
    model = "model.safetensors"
    assert (ours.folder / model).read_bytes() == (other.folder / model).read_bytes()
