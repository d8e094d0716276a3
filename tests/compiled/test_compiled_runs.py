"""Runs whose steps are machine code: the same bytes on any threads, after a kill, in a fork."""

import os

import pytest
import torch
from conftest import quick_config
from safetensors.torch import load_file

from fedsam.base.system import Interrupted
from fedsam.compiled.steps import FOLDER
from fedsam.engines.threads import computing
from fedsam.simulate.build import steps
from fedsam.simulate.build.trainer import new_trainer
from fedsam.simulate.resume import resumed
from fedsam.simulate.run import run
from fedsam.training.client import ClientJob

SETTING = {"rounds": 3, "algorithm": "fedasam", "clients": 20, "batch_size": 32, "alpha": 100}


@pytest.fixture(autouse=True)
def compiler(monkeypatch, tmp_path_factory):
    """Compile short runs too, into a folder of the tests'."""
    monkeypatch.setattr(steps, "PAYS_FROM", 0)
    monkeypatch.setenv(FOLDER, str(tmp_path_factory.getbasetemp() / "compiled"))


def bytes_of(outcome):
    return (outcome.folder / "model.safetensors").read_bytes()


def test_compiled_runs_end_in_the_same_bytes_and_near_the_plain_one(tmp_path, caplog):
    one, two, plain = (
        run(quick_config(tmp_path / name, **SETTING, **more))
        for name, more in {
            "one": {"compile": True, "threads": 1},
            "two": {"compile": True, "threads": 2},
            "plain": {},
        }.items()
    )
    assert not [record for record in caplog.records if "compile:" in record.message]
    assert bytes_of(one) == bytes_of(two) != bytes_of(plain)
    for name, tensor in load_file(plain.folder / "model.safetensors").items():
        ours = load_file(one.folder / "model.safetensors")[name]
        torch.testing.assert_close(ours, tensor, rtol=1e-3, atol=1e-5)

    def stopping(line):
        if line["round"] == 2:
            raise KeyboardInterrupt

    config = quick_config(tmp_path / "killed", **SETTING, compile=True, checkpoint_every=1)
    with pytest.raises(Interrupted):
        run(config, stopping)
    config, snapshot = resumed(tmp_path / "killed", {})
    assert bytes_of(run(config, snapshot=snapshot)) == bytes_of(one)


def test_a_forked_process_uses_what_its_parent_compiled(tmp_path):
    config = quick_config(tmp_path / "run", **SETTING, compile=True)
    trainer, initial = new_trainer(config)
    job = ClientJob(0, initial.state, 1, config.lr)
    with computing(trainer):
        ours = trainer.train_client(trainer.new_network(), job).state
        made = len(trainer.compiled._programs)
        child = os.fork()
        if not child:
            theirs = trainer.train_client(trainer.new_network(), job).state
            same = torch.equal(ours, theirs) and len(trainer.compiled._programs) == made
            os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert made
