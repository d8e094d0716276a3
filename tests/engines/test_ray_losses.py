"""The Ray engine at its seam, without a cluster: whatever way an actor is lost, and the address."""

import functools
import logging
import math
import os
import socket
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import quick_config
from hypothesis import given
from hypothesis import strategies as st

from fedsam import client_app
from fedsam.base.errors import TrainingError, UsageError
from fedsam.engines.codec import pack, unpack
from fedsam.engines.threads import ThreadExecutor
from fedsam.simulate.build import trainer as building
from fedsam.simulate.build.executors import new_ray_executor
from fedsam.simulate.build.trainer import new_trainer
from fedsam.simulate.resume import resumed
from fedsam.simulate.run import run
from fedsam.training.client import ClientJob, Trainer, longest_first

grpc = pytest.importorskip("grpc")
exceptions = pytest.importorskip("ray.exceptions", reason="pip install 'fedsam[ray]'")
engine = pytest.importorskip("fedsam.engines.ray")


@pytest.fixture(autouse=True)
def no_cluster():
    """End the Ray that tests before have left in this process."""
    pytest.importorskip("ray").shutdown()


FULL = exceptions.ObjectStoreFullError("the store is full")


def in_task(cause: Exception) -> Exception:
    """Return what ray.get raises of an exception in an actor."""
    return exceptions.RayTaskError("train", "a traceback", cause).as_instanceof_cause()


LOSSES = {
    "memory": exceptions.OutOfMemoryError("Killed: low on memory.\nMemory on the node: ..."),
    "node": exceptions.NodeDiedError("the node is dead"),
    "store": FULL,
    "disk": exceptions.OutOfDiskError("the disk is full"),
    "actor": exceptions.ActorDiedError(),
    "unavailable": exceptions.ActorUnavailableError("no connection", b"1" * 16),
    "worker": exceptions.WorkerCrashedError(),
    "raylet": exceptions.LocalRayletDiedError(),
    "system": exceptions.RaySystemError("gone"),
    "object": exceptions.ObjectLostError("00", None, "here"),
    "owner": exceptions.OwnerDiedError("00", None, "here"),
    "argument": in_task(FULL),
}


class FakeRay:
    """Ray's functions, of which an answer is computed when it is asked for.

    Attributes
    ----------
    ready, train : deque
        What the next calls of these methods raise; None for nothing.
    calls : list
        The arguments of the calls of ``train``.
    """

    def __init__(self, *, there=False):
        self.there, self.began, self.killed = there, 0, []
        self.ready, self.train, self.calls = deque(), deque(), []
        self.exceptions = exceptions

    def is_initialized(self):
        return self.there

    def init(self, *address, **options):
        self.there, self.began = True, self.began + 1

    def shutdown(self):
        self.there = False

    def get_runtime_context(self):
        return SimpleNamespace(gcs_address="127.0.0.1:6379")

    def cluster_resources(self):
        return {"CPU": 8.0}

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": 8.0}}]

    def put(self, value):
        return value

    def wait(self, replies, num_returns, timeout):
        return replies[:1], replies[1:]

    def get(self, reply):
        return reply()

    def kill(self, actor):
        self.killed.append(actor)

    def remote(self, cls):
        def new(*arguments):
            actor = cls(*arguments)
            return SimpleNamespace(
                ready=self._method(actor.ready, self.ready),
                train=self._method(actor.train, self.train),
            )

        return SimpleNamespace(options=lambda **needs: SimpleNamespace(remote=new))

    def _method(self, method, failures):
        def call(*arguments):
            if failures is self.train:
                self.calls.append(arguments)

            def answer():
                if failures and (failure := failures.popleft()) is not None:
                    raise failure
                return method(*arguments)

            return answer

        return SimpleNamespace(remote=call)


@pytest.fixture
def fake(monkeypatch):
    fake = FakeRay()
    monkeypatch.setattr(engine, "ray", fake)
    return fake


@pytest.fixture
def jobs(tmp_path):
    """A config for Ray, its trainer, five jobs, and what they come to on a thread."""
    config = quick_config(tmp_path / "none", engine="ray", workers=2)
    trainer, initial = new_trainer(config)
    jobs = [ClientJob(client, initial.state, 1, 0.1) for client in range(5)]
    threads = ThreadExecutor(trainer, 1)
    yield config, trainer, jobs, threads.train(jobs)
    threads.close()


def same(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine.state, other.state)
        assert mine[1:] == other[1:]


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("when", ["ready", "train"])
def test_however_an_actor_is_lost_its_clients_are_trained_again(fake, jobs, caplog, kind, when):
    config, trainer, asked, expected = jobs
    getattr(fake, when).extend([None, LOSSES[kind]])
    executor = new_ray_executor(config, trainer)
    executor.wait_for_one()
    same(executor.train(asked), expected)
    assert len(fake.killed) == 1
    (record,) = caplog.records
    said = record.getMessage()
    assert record.levelno == logging.WARNING
    assert said.startswith("a Ray actor died; ")
    assert ("is trained again" in said) == (when == "train")
    assert "\n" not in said
    assert (
        "OutOfMemoryError: Killed: low on memory. Memory on the node: ...)" in said
        or kind != "memory"
    )
    executor.close()
    assert len(fake.killed) == 3  # the two that were left, too
    assert not fake.there


def clients_of(call):
    """Return the clients that a call of ``train`` carries."""
    return [client for client, *_ in unpack(call[1], torch.device("cpu"))]


def in_second_round(fake, executor, asked):
    """Train some jobs twice; return the results and calls of the second time."""
    executor.train(asked)
    assert [len(clients_of(made)) for made in fake.calls[:2]] == [1, 1]  # no pace is known yet
    fake.calls.clear()
    return executor.train(asked), fake.calls


def test_a_short_round_is_one_call_an_actor(fake, jobs, monkeypatch):
    config, trainer, asked, expected = jobs
    monkeypatch.setattr(engine, "CALL", math.inf)
    done, calls = in_second_round(fake, new_ray_executor(config, trainer), asked)
    same(done, expected)
    steps = [[trainer.steps(client) for client in clients_of(call)] for call in calls]
    assert sorted([*clients_of(calls[0]), *clients_of(calls[1])]) == [job.client for job in asked]
    assert [len(call) > 1 for call in steps] == [True, True]
    assert abs(sum(steps[0]) - sum(steps[1])) <= max(map(trainer.steps, range(5)))


def test_where_a_client_takes_long_each_is_a_call(fake, jobs, monkeypatch):
    config, trainer, asked, expected = jobs
    monkeypatch.setattr(engine, "CALL", 1e-6)  # to which one step is long
    done, calls = in_second_round(fake, new_ray_executor(config, trainer), asked)
    same(done, expected)
    assert len(calls) == 5
    told = [trainer.steps(clients_of(call)[0]) for call in calls]
    assert told == sorted(told, reverse=True)


def test_a_client_that_is_given_seconds_has_a_call_of_its_own(fake, jobs, monkeypatch):
    """Its neighbours in a call would be left out with it."""
    config, trainer, asked, _ = jobs
    monkeypatch.setattr(engine, "CALL", math.inf)
    limited = config.model_copy(update={"client_timeout": 600.0})
    _, calls = in_second_round(fake, new_ray_executor(limited, trainer), asked)
    assert len(calls) == 5


def test_all_clients_of_a_call_are_trained_again(fake, jobs, monkeypatch, caplog):
    config, trainer, asked, expected = jobs
    monkeypatch.setattr(engine, "CALL", math.inf)
    executor = new_ray_executor(config, trainer)
    executor.train(asked)
    fake.train.append(LOSSES["actor"])
    fake.calls.clear()
    same(executor.train(asked), expected)
    lost = clients_of(fake.calls[0])
    assert len(lost) > 1
    named = ", ".join(map(str, lost))
    assert f"a Ray actor died; clients {named} are trained again; 1 of 2 actors" in caplog.text


def test_one_client_of_a_call_that_raises_is_left_out_alone(fake, jobs, monkeypatch):
    config, trainer, asked, expected = jobs
    monkeypatch.setattr(engine, "CALL", math.inf)
    train = Trainer.train_client

    def sometimes(self, network, job):
        if job.client == 3:
            raise ValueError("not three")
        return train(self, network, job)

    executor = new_ray_executor(config, trainer)
    executor.train(asked)
    monkeypatch.setattr(Trainer, "train_client", sometimes)
    done = executor.train(asked)
    wrong = done.pop(3)
    same(done, [one for number, one in enumerate(expected) if number != 3])
    assert wrong.reason.startswith("ValueError: not three (")
    assert isinstance(wrong.error, TrainingError)


@pytest.mark.parametrize(("of_others", "limit"), [(False, "INSIDE"), (True, "USUAL")])
def test_a_large_state_goes_into_the_store_once_a_round(fake, jobs, monkeypatch, of_others, limit):
    config, trainer, asked, expected = jobs
    fake.there = of_others
    stored = []
    monkeypatch.setattr(fake, "put", lambda value: stored.append(value) or value)
    executor = new_ray_executor(config, trainer)
    same(executor.train(asked), expected)
    assert not stored  # its 72 KiB travel inside the call
    executor.close()
    monkeypatch.setattr(engine, limit, 1000)
    executor = new_ray_executor(config, trainer)
    same(executor.train(asked), expected)
    same(executor.train(asked), expected)
    assert len(stored) == 2


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 200))
def test_what_fits_begins_with_the_first_and_is_full(steps, most):
    waiting = longest_first(steps)
    chosen = engine.fitting(waiting, steps, most)
    total = sum(steps[number] for number in chosen)
    assert chosen[0] == waiting[0]
    assert len(set(chosen)) == len(chosen)
    assert total <= most or len(chosen) == 1
    left = [steps[number] for number in waiting if number not in chosen]
    assert all(total + one > most for one in left)


def test_past_the_limit_it_stops_with_a_checkpoint_that_goes_on(fake, quick, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "DEATHS", 3)
    monkeypatch.setattr(engine, "CALL", 0.0)  # each client a call of its own
    # a death between answers does not count; the others come in the second round of five
    fake.train.extend([None] * 3 + [LOSSES["node"]] + [None] * 4 + [LOSSES["memory"]] * 4)
    out = tmp_path / "ray"
    with pytest.raises(TrainingError) as stopped:
        quick(engine="ray", workers=2, out=out)
    start = (
        "4 Ray actors died one after another; the last: OutOfMemoryError: Killed: low on memory."
    )
    assert str(stopped.value).startswith(start)
    config, snapshot = resumed(out, {"engine": "local"})
    assert snapshot.round == 1
    run(config, snapshot=snapshot)
    local = quick().folder
    assert (out / "model.safetensors").read_bytes() == (local / "model.safetensors").read_bytes()


def test_a_mistake_of_our_code_in_an_actor_is_no_loss(fake, jobs):
    config, trainer, asked, _ = jobs
    fake.train.extend([in_task(ZeroDivisionError("mine"))])
    with pytest.raises(ZeroDivisionError, match="a traceback"):
        new_ray_executor(config, trainer).train(asked)
    fake.train.extend([in_task(UsageError("--rho: wrong"))])
    with pytest.raises(UsageError, match=r"^--rho: wrong$"):
        new_ray_executor(config, trainer).train(asked)


def test_a_full_store_of_the_driver_is_one_line(fake, jobs, monkeypatch):
    config, trainer, asked, _ = jobs

    def put(value):
        raise FULL

    monkeypatch.setattr(fake, "put", put)
    monkeypatch.setattr(engine, "INSIDE", 0)  # whatever travels goes into the store
    with pytest.raises(TrainingError, match=r"^Ray: ObjectStoreFullError: .*the store is full"):
        new_ray_executor(config, trainer).train(asked)


def test_an_actor_that_cannot_start_is_said_before_the_run_has_a_folder(fake, quick, tmp_path):
    said = "Traceback: ...\nUsageError: --partition-options: mine.csv cannot be read"
    wrong = exceptions.RayTaskError("__init__", said, UsageError("mine.csv"), actor_id="1")
    fake.ready.append(exceptions.ActorDiedError(wrong))
    with pytest.raises(TrainingError, match=r"a Ray actor cannot start: .*mine.csv cannot be read"):
        quick(engine="ray", workers=1, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("address", ["", "auto", "127.0.0.1:6379"])
def test_a_ray_that_is_there_is_used_and_left_alone(fake, quick, address):
    fake.there = True
    quick(engine="ray", workers=2, ray_address=address)
    assert (fake.there, fake.began, len(fake.killed)) == (True, 0, 2)
    fake.there = False
    quick(engine="ray", workers=2)
    assert (fake.there, fake.began) == (False, 1)


def test_another_ray_than_the_one_that_is_there_is_refused(fake, quick):
    fake.there = True
    with pytest.raises(UsageError, match="--ray-address h:1: this process uses the Ray at 127"):
        quick(engine="ray", workers=2, ray_address="h:1")
    assert fake.there
    with pytest.raises(UsageError, match="--workers 9: Ray has 8 CPUs"):
        quick(engine="ray", workers=9)
    assert fake.there


def test_relative_paths_mean_the_folder_of_the_command(tmp_path, monkeypatch):
    (tmp_path / "command").mkdir()
    (tmp_path / "command" / "mine.csv").write_text("")
    monkeypatch.chdir(tmp_path)  # where the cluster was started
    engine.enter(str(tmp_path / "command"))
    assert Path("mine.csv").exists()
    engine.enter(str(tmp_path / "nowhere"))  # a node without it: what it finds is nobody's
    assert Path.cwd() == Path(os.sep)


def test_actors_enter_the_folder_before_they_make_their_trainer(fake, jobs, tmp_path, monkeypatch):
    trainer = jobs[1]
    (tmp_path / "command").mkdir()
    monkeypatch.chdir(tmp_path / "command")
    seen = []

    def make():
        seen.append(Path.cwd())
        return trainer

    executor = engine.RayExecutor(trainer, make, 1)
    monkeypatch.chdir(tmp_path)
    executor._start()
    assert seen == [tmp_path / "command"] * 2


class Silent:
    """Listens, and never says a word."""

    def __init__(self):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]

    def close(self):
        self.socket.close()


class Web:
    """A web server."""

    def __init__(self):
        self.server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class Other:
    """A gRPC server that is not Ray's."""

    def __init__(self):
        self.server = grpc.server(ThreadPoolExecutor(1))
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()

    def close(self):
        self.server.stop(None).wait()


@pytest.mark.parametrize("kind", [Silent, Web, Other])
def test_an_address_where_something_else_listens_is_one_line_at_once(kind):
    listener = kind()
    begin = time.monotonic()
    try:
        with pytest.raises(UsageError) as refused:
            engine.connect(f"127.0.0.1:{listener.port}", None)
    finally:
        listener.close()
    assert time.monotonic() - begin < 10
    start = f"--ray-address 127.0.0.1:{listener.port}: no Ray cluster there ("
    assert str(refused.value).startswith(start)
    assert str(refused.value).endswith("); give auto or HOST:PORT")


def test_a_ray_that_does_not_start_here_is_one_line(quick, monkeypatch, tmp_path):
    def late(*_, **__):
        raise Exception("The current node timed out during startup.\nSome of the raylet ...")

    monkeypatch.setattr("ray.init", late)
    wrong = "Ray could not be started on this machine: The current node timed out during startup. S"
    with pytest.raises(TrainingError, match=wrong):
        quick(engine="ray", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "auto", "nowhere", "127.0.0.1:x"])
def test_a_cluster_that_is_not_there_is_named_at_once(quick, address, monkeypatch, tmp_path):
    # clusters that happen to run on this machine, of other tests or users, are none of ours
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", functools.cache(frozenset))
    with pytest.raises(UsageError, match=f"--ray-address {address}: no Ray cluster there"):
        quick(engine="ray", ray_address=address)


def flags():
    return [
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,
        torch.get_num_threads(),
    ]


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
@pytest.mark.parametrize("where", ["local", "ray", "flower"])
def test_every_engine_computes_with_the_runs_precision(
    fake, tmp_path, monkeypatch, where, precision
):
    """Flags of a GPU's products, which need none: TF32 is a choice of the process."""
    seen = []
    train = Trainer.train_client

    def watched(self, network, job):
        seen.append(flags())
        return train(self, network, job)

    cpu = torch.device("cpu")
    monkeypatch.setattr(building, "choose_device", lambda config: cpu)  # which refuses TF32
    monkeypatch.setattr(Trainer, "train_client", watched)
    config = quick_config(tmp_path / "run", precision=precision, rounds=1, clients_per_round=1)
    before = flags()
    if where == "local":
        run(config)
    elif where == "ray":
        trainer, initial = new_trainer(config)
        actor = engine.ClientActor(lambda: trainer, ".")
        actor.train(pack([initial.state, None]), pack([[0, 1, 0.1, None]]))
    else:
        client_app.resident.cache_clear()
        flower_client(config, precision)
    assert seen == [["tf32" if precision == "tf32" else "ieee"] * 2 + [1]]
    assert flags() == before


def flower_client(config, precision):
    """Let a SuperNode train one round."""
    from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict

    from fedsam.messages import ARRAYS, CONFIG, LEARNING_RATE, PARTITION, ROUND, plain_record

    keys = {"clients": 20, "clients-per-round": 1, "rounds": 1, "alpha": 1.0, "device": "cpu"}
    context = Context(1, 7, {PARTITION: 0}, RecordDict(), keys | {"precision": precision})
    _, initial = new_trainer(config)
    settings = ConfigRecord({ROUND: 1, LEARNING_RATE: 0.1})
    content = RecordDict({ARRAYS: plain_record(initial), CONFIG: settings})
    client_app.app(Message(content, 7, MessageType.TRAIN), context)
    client_app.resident.cache_clear()
