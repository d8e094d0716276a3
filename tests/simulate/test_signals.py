"""A signal at any moment of a command's start ends it in one line, 130 or 143."""

import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import quick_config

from fedsam.simulate.run import run

SMALL = ["--rounds", "2", "--clients", "20", "--clients-per-round", "5", "--device", "cpu"]
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}


def words_of(command, folder):
    (folder / "s.yaml").write_text("set: {clients: 20, rounds: 2}\ngrid: {seed: [0]}\n")
    return {
        "simulate": [*SMALL, "--out", "{}"],
        "sweep": ["s.yaml", "--device", "cpu", "--out", "{}"],
        "flatness": ["run", "--device", "cpu"],
        "report": ["run", "--out", "{}"],
    }[command]


def begin(command, words, number, folder):
    call = [sys.executable, "-m", f"fedsam.{command}", *(w.format(f"out{number}") for w in words)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(call, cwd=folder, text=True, **pipes)


def interrupted(command, folder, moments, seed):
    """Interrupt a command at moments that are drawn; return how it ended each time."""
    words, generator = words_of(command, folder), np.random.default_rng(seed)
    began = time.monotonic()
    process = begin(command, words, "whole", folder)
    assert process.wait(300) == 0, process.communicate()
    whole, codes = time.monotonic() - began, []
    for number in range(moments):
        process = begin(command, words, number, folder)
        delay, kind = generator.uniform(0, whole), int(generator.choice(list(SIGNALS)))
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.send_signal(kind)
        _, said = process.communicate(timeout=120)
        codes.append(process.returncode)
        if process.returncode in (0, -kind):  # it had ended; Python had not begun with fedsam
            continue
        assert process.returncode == SIGNALS[signal.Signals(kind)], (delay, whole, said)
        assert "Traceback" not in said, (delay, whole, said)
        last = said.strip().splitlines()[-1]
        assert last.startswith("fedsam: interrupted"), (delay, whole, said)
    return codes


@pytest.mark.slow
def test_a_start_is_interrupted_twice(tmp_path):
    assert len(interrupted("simulate", tmp_path, 2, seed=0)) == 2


@pytest.mark.long
@pytest.mark.parametrize("command", ["simulate", "sweep", "flatness", "report"])
def test_a_start_is_interrupted_twenty_times(tmp_path, command):
    run(quick_config(tmp_path / "run"))
    codes = interrupted(command, tmp_path, 20, seed=len(command))
    print(command, codes)
    assert len(codes) == 20
