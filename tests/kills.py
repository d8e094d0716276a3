"""A run that is killed at random moments, again and again: real processes, forked when all of
fedsam has been imported, so that a start takes a tenth of a second."""

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np

from fedsam.base.system import end_at_once
from fedsam.runs import files
from fedsam.simulate.__main__ import main

WORKERS: ForkServerContext = multiprocessing.get_context("forkserver")
LATE = ["sklearn.datasets", "matplotlib.backends.backend_agg", "safetensors.torch"]
COMMAND = ["kills", "fedsam.simulate.joint", "fedsam.simulate.progress"]
WORKERS.set_forkserver_preload([*COMMAND, *LATE])
STOPS = ("kill", "freeze and kill", "term", "int")
ENDS_WITH = {"kill": -9, "freeze and kill": -9, "term": 143, "int": 130}
REFUSED = ("writes there", "exists already", "went on with it just now")  # of two at once


def simulate(words: list[str], said: str) -> None:
    """Run the command as a process of its own does, with what it says in a file."""
    end_at_once()
    out = os.open(said, os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.exit(main(words))


def start(words: Sequence[object], said: Path) -> BaseProcess:
    """Return a process that runs the command, once that could be interrupted."""
    said.unlink(missing_ok=True)
    process = WORKERS.Process(target=simulate, args=(list(map(str, words)), str(said)))
    process.start()
    while process.is_alive() and not said.exists():
        time.sleep(0.005)
    return process


def stop(process: BaseProcess, how: str) -> None:
    """End a process; it may have ended just now."""
    if process.pid is None or not process.is_alive():
        return
    if how == "freeze and kill":
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(0.05)
    number = {"term": signal.SIGTERM, "int": signal.SIGINT}.get(how, signal.SIGKILL)
    os.kill(process.pid, number)


def left(folder: Path) -> tuple[dict[str, bytes], list[dict], dict]:
    """What a run left, but for the clock's: models, lines of metrics, summary."""
    models = {name: files.weights(folder, name).read_bytes() for name in files.models_of(folder)}
    lines = [json.loads(line) for line in (folder / files.METRICS).read_text().splitlines()]
    summary = json.loads((folder / files.SUMMARY).read_text())
    clocks = {"seconds", "rounds_per_second", "seals", "seal"}
    return (
        models,
        [{key: value for key, value in line.items() if key != "seconds"} for line in lines],
        {key: value for key, value in summary.items() if key not in clocks},
    )


def ended_well(process: BaseProcess, said: Path, how: str = "") -> bool:
    """Whether it went to its end; it may also have been stopped, in one line, or refused so."""
    process.join(300)
    text, code = said.read_text(), process.exitcode
    assert "Traceback" not in text, text
    if code == 2:
        lines = [line for line in text.splitlines() if line.startswith("fedsam: error: ")]
        assert len(lines) == 1, text
        assert any(reason in lines[0] for reason in REFUSED), text
        return False
    assert code in (0, ENDS_WITH.get(how)), (code, how, text)
    if code in (130, 143):
        last = text.strip().splitlines()[-1]
        assert last.startswith("fedsam: interrupted"), text
    return code == 0


def wait_for_more(folder: Path, before: int, processes: list[BaseProcess]) -> None:
    """Wait until a line of metrics is written."""
    file, end = folder / files.METRICS, time.monotonic() + 120
    while any(process.is_alive() for process in processes) and time.monotonic() < end:
        if file.exists() and file.stat().st_mtime_ns != before:
            return
        time.sleep(0.005)


def killed_again_and_again(
    scratch: Path, words: list[str], kills: int, seed: int, at_once: int = 1
) -> dict[str, int]:
    """Let a run end in spite of so many kills; return how many there were of each kind.

    Each time it gets somewhere, or is killed in its start. A run that has ended before all kills
    came is compared with one that was never killed, and begun anew. ``at_once``: so many processes
    go on with it at the same time.
    """
    generator = np.random.default_rng(seed)
    whole, cut = scratch / "whole", scratch / "cut"
    words = [*words, "--checkpoint-every", "1", "--quiet"]
    assert ended_well(start([*words, "--out", whole], scratch / "said"), scratch / "said")
    number, counts = 0, dict.fromkeys(STOPS, 0)
    while True:
        folder = cut / str(number)
        file = folder / files.METRICS
        before = file.stat().st_mtime_ns if file.exists() else 0
        resume = bool(files.checkpoints(folder)) and generator.random() < 0.5
        anew: list[object] = [*words, "--out", folder, "--go-on"]
        command = ["--resume", folder] if resume else anew
        logs = [scratch / f"said{n}" for n in range(at_once)]
        processes = [start(command, log) for log in logs]
        how = ""
        if sum(counts.values()) < kills:
            how = str(generator.choice(STOPS))
            if generator.random() < 0.7:  # in mid-run, else in its start
                wait_for_more(folder, before, processes)
            time.sleep(generator.uniform(0, 0.3))
            if any(process.is_alive() for process in processes):
                counts[how] += 1
            for process in processes:
                stop(process, how)
        ended = [ended_well(*pair, how) for pair in zip(processes, logs, strict=True)]
        if any(ended) and files.models_of(folder):
            assert left(folder) == left(whole)
            assert not list(folder.rglob("*.part"))
            if sum(counts.values()) == kills:
                return counts
            number += 1
