"""A deployment with one hostile node of three: it ends well, whatever that node sends."""

import json
import shutil
import sys

import pytest
from conftest import ROOT
from deployment import deployment, in_group, needs_flower

pytestmark = in_group
ROUNDS = 7
HOSTILE = 2  # the partition of the hostile node
# in place of what an honest node does; {honest} is the app's own module, under another name
APP = '''
"""A node of partition 2 that lies: at the roll call once, then in each round in another way."""

import io
from pathlib import Path

import numpy as np
from flwr.app import Array, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedsam import honest_app as honest
from fedsam.engines.flower import partition_answer
from fedsam.messages import ARRAYS, METRICS, PARTITION, ROUND, only_record

app = ClientApp()
CLAIMED = Path({claimed!r})


def npz():
    file = io.BytesIO()
    np.savez(file, a=np.zeros(2, np.float32))
    return file.getvalue()


@app.query()
def query(message, context):
    hostile = context.node_config[PARTITION] == {hostile}
    if hostile and not CLAIMED.exists():
        CLAIMED.touch()
        return partition_answer(message, 0)
    return honest.query(message, context)


@app.train()
def train(message, context):
    reply = honest.train(message, context)
    if context.node_config[PARTITION] != {hostile}:
        return reply
    content, told = reply.content, only_record(message.content.config_records)
    name, array = next(iter(content[ARRAYS].items()))
    CLAIMED.write_text(str(int(CLAIMED.read_text() or 0) + 1))
    match int(CLAIMED.read_text()):
        case 1:
            content[ARRAYS][name] = Array(array.dtype, array.shape, array.stype, npz())
        case 2:
            content[METRICS]["loss"] = [0.5]
        case 3:
            content[METRICS]["steps"] = -5
        case 4:
            content[METRICS]["num-examples"] = 10**6
        case 5:
            reason = "\\x1b[2J\\x1b[31mlost\\nround 9: all fine\\n" + "x" * 10**6
            return Message(Error(0, reason), reply_to=message)
    return reply
'''


@pytest.mark.long
@pytest.mark.slow
@needs_flower
def test_a_deployment_with_a_hostile_node_ends_well(tmp_path):
    app = tmp_path / "app"
    for room in ("fedsam", "clients", "strategies", "configs", "docs/deploy"):
        shutil.copytree(ROOT / room, app / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, app / name)
    shutil.move(app / "fedsam" / "client_app.py", app / "fedsam" / "honest_app.py")
    text = APP.format(claimed=str(tmp_path / "claimed"), hostile=HOSTILE)
    (app / "fedsam" / "client_app.py").write_text(text.lstrip())
    config = f'device="cpu" rounds={ROUNDS} algorithm="fedavg" swa=false local-steps=2'
    scripts = app / "docs" / "deploy"
    with deployment(tmp_path, 3, config, scripts, LIMIT="300") as running:
        code = running.process.wait(timeout=360)
    said = running.log
    sys.stdout.write(said)  # shown where a test fails, or with -s
    assert code == 0
    assert "the run ended as finished:completed" in said
    assert running.processes() == []
    lines = list(map(json.loads, (running.work / "run" / "metrics.jsonl").read_text().splitlines()))
    left_out = [line.get("left_out", []) for line in lines]
    assert len(left_out) == ROUNDS + 1
    assert all(out in ([], [HOSTILE]) for out in left_out)
    assert lines[-1]["accuracy"] > lines[0]["accuracy"]
    assert "left out: it says partition 0, its key's is 2" in said
    for reason in ("no NumPy file of a plain array", "loss is a list", "steps is -5"):
        assert reason in said
    assert "num-examples is 1000000, it was asked for" in said
    assert "\x1b[2J" not in said
    assert "\nround 9: all fine" not in said
    assert max(map(len, said.splitlines())) < 2000
