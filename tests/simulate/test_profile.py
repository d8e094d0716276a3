"""Time by phase: nested phases are counted once, each run's apart, and none where none is asked."""

import gzip
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest
import torch
from safetensors.torch import load_file

from fedsam.base.timers import WAITING, Recorder, carried, recording, timed


class Clock:
    """A clock that goes only when it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def go(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def recorder(clock):
    return Recorder(clock)


def test_a_phase_is_without_those_inside_it(clock, recorder):
    inner = timed("inner")(clock.go)

    @timed("outer")
    def outer():
        inner(1.0)
        clock.go(10.0)
        with timed("middle"):
            clock.go(100.0)
            inner(2.0)

    with recording(recorder):
        outer()
    assert recorder.calls == {"inner": 2, "middle": 1, "outer": 1}
    assert recorder.seconds == {"inner": 3.0, "middle": 100.0, "outer": 10.0}


def test_a_phase_that_raises_is_counted_and_ended(clock, recorder):
    @timed("fails")
    def fails():
        clock.go(1.0)
        raise KeyError

    with recording(recorder):
        with timed("around"):
            clock.go(4.0)
            with pytest.raises(KeyError), timed("within"):
                fails()
        with timed("after"):
            clock.go(2.0)
    assert recorder.seconds == {"fails": 1.0, "within": 0.0, "around": 4.0, "after": 2.0}


def test_what_is_decorated_keeps_its_name_and_what_it_returns():
    def divide(a, *, by):
        """Divide."""
        return a / by

    call = timed("x")(divide)
    assert (call.__name__, call.__doc__, call(6, by=3)) == ("divide", "Divide.", 2)


def test_nothing_is_recorded_outside(clock, recorder):
    step = timed("step")(clock.go)
    step(1.0)
    with recording(recorder):
        pass
    step(1.0)
    with timed("step"):
        clock.go(1.0)
    assert not recorder.calls
    assert carried(step) is step


def test_threads_record_only_what_is_carried_to_them(clock, recorder):
    numbers = count()
    step = timed("step")(lambda _: next(numbers))
    with ThreadPoolExecutor(3) as pool, recording(recorder):
        list(pool.map(step, range(5)))
        assert not recorder.calls
        list(pool.map(carried(step), range(7)))
        list(pool.map(step, range(5)))
    assert recorder.calls == {"step": 7}


def test_a_run_that_is_not_profiled_records_nothing(quick, monkeypatch):
    def never(recorder):
        raise AssertionError("a clock was read")

    monkeypatch.setattr(Recorder, "begin", never)
    outcome = quick(rounds=2)
    assert not outcome.phases
    assert not (outcome.folder / "profile.json").exists()


def test_two_runs_at_once_are_not_mixed(quick):
    together = threading.Barrier(3)
    asked = [{"rounds": 3, "profile": True}, {"rounds": 5, "profile": True}, {"rounds": 4}]

    def go(wanted):
        together.wait()
        return quick(**wanted, threads=2, eval_every=1)

    with ThreadPoolExecutor(3) as pool:
        *profiled, plain = pool.map(go, asked)
    assert not plain.phases
    for outcome, rounds in zip(profiled, (3, 5), strict=True):
        calls = {row.name: row.calls for row in outcome.phases}
        assert calls["strategy sends"] == calls["strategy aggregates"] == rounds
        assert calls["messages"] == rounds
        assert calls["rest of local training"] == calls["draw plans"] == 5 * rounds
        assert calls["write"] == 1 + rounds
        # two steps a client, whose mini-batches are gathered at once
        assert calls["forward and backward"] == 2 * calls["gather and augment"] == 10 * rounds


@pytest.mark.parametrize("cohort", ["off", "slots"])
def test_a_profiled_run_is_the_same_run_with_a_table(quick, cohort):
    plain = quick(algorithm="fedasam", cohort=cohort)
    begin = time.perf_counter()
    profiled = quick(algorithm="fedasam", cohort=cohort, profile=True, threads=1)
    whole = time.perf_counter() - begin
    assert not plain.phases
    models = [load_file(o.folder / "model.safetensors") for o in (plain, profiled)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    rows = {row["name"]: row for row in json.loads((profiled.folder / "profile.json").read_text())}
    assert rows["strategy aggregates"]["calls"] == 4
    assert rows["draw plans"]["calls"] >= 4 * 5
    assert rows["forward and backward"]["seconds"] > 0
    if cohort == "off":
        assert rows["gather and augment"]["calls"] == 4 * 5  # both mini-batches at once
        assert rows["forward and backward"]["calls"] == 4 * 5 * 2 * 2  # clients, steps, passes
    spent = sum(row["seconds"] for row in rows.values() if row["name"] != WAITING)
    assert 0.2 * profiled.summary["seconds"] < spent < whole  # one thread works at a time


def test_a_trace_holds_the_third_to_fifth_round(quick):
    outcome = quick(rounds=6, trace=True)
    with gzip.open(outcome.folder / "trace.json.gz", "rt") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    backward = "autograd::engine::evaluate_function: NllLossBackward0"
    assert names.count(backward) == 3 * 5 * 2  # rounds x clients x steps: 64 images and 8
    assert outcome.summary["rounds"] == 6
