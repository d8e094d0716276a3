"""The same line in a job script, however often it is requeued, ends in what one start ends in."""

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import quick_config

from fedsam.base.errors import StorageError, UsageError
from fedsam.base.system import Interrupted
from fedsam.runs import files
from fedsam.runs.folder import RunDir
from fedsam.runs.run import load_all
from fedsam.simulate.__main__ import main
from fedsam.simulate.resume import resumed, went_on
from fedsam.simulate.run import RunLoop, run

TARGET = {"rounds": 8, "eval_every": 1, "target_accuracy": 0.12, "lr": 0.5, "partition": "iid"}
PATIENCE = {"rounds": 8, "eval_every": 1, "patience": 3, "lr": 1e-9}
ENDS = {
    "all rounds done": {"rounds": 3},
    "reached --target-accuracy 0.12": TARGET,
    "--patience 3": PATIENCE,
    "without checkpoints": {"rounds": 3, "checkpoint_every": "0"},
}


def words_of(keys, out):
    config = {"clients": 20, "clients_per_round": 5, "eval_every": 2, "alpha": 1.0} | keys
    pairs = [(f"--{key.replace('_', '-')}", str(value)) for key, value in config.items()]
    return [*sum(pairs, ()), "--device", "cpu", "--out", str(out), "--go-on"]


def contents(folder):
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


@pytest.mark.parametrize("ending", ENDS)
def test_a_run_that_ended_is_left_alone(tmp_path, capsys, ending):
    words = words_of(ENDS[ending], tmp_path / "run")
    assert main(words) == 0
    before = contents(tmp_path / "run")
    capsys.readouterr()
    for again in (words, words):
        assert main(again) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"{tmp_path / 'run'}: has ended (")
        assert said.count("\n") == 1
    if ending != "without checkpoints":
        assert ending in said
        assert main(["--resume", str(tmp_path / "run")]) == 0
        assert "is left as it is" in capsys.readouterr().out
    assert contents(tmp_path / "run") == before


def test_more_rounds_go_on_only_where_the_rounds_ended_it(tmp_path):
    for keys, goes_on in ((ENDS["all rounds done"], True), (TARGET, False), (PATIENCE, False)):
        folder = run(quick_config(tmp_path / str(len(keys)), **keys)).folder
        place = went_on(quick_config(folder, **keys | {"rounds": 9}))
        assert (place is not None) == goes_on
        shutil.rmtree(folder)


def test_another_target_lets_it_go_on(tmp_path):
    folder = run(quick_config(tmp_path / "run", **TARGET)).folder
    config, snapshot = went_on(quick_config(folder, **TARGET | {"target_accuracy": 0.99}))
    assert run(config, snapshot=snapshot).summary["rounds"] == 8


@pytest.mark.parametrize("keys", [TARGET, PATIENCE], ids=["target", "patience"])
def test_killed_between_its_last_round_and_its_summary_it_trains_no_further(
    tmp_path, monkeypatch, keys
):
    whole = run(quick_config(tmp_path / "whole", **keys))
    with monkeypatch.context() as patched:
        patched.setattr(RunDir, "finish", killed)
        with pytest.raises(StorageError):
            run(quick_config(tmp_path / "cut", **keys))
    config, snapshot = went_on(quick_config(tmp_path / "cut", **keys))
    outcome = run(config, snapshot=snapshot)
    for key in ("rounds", "ended", "final_accuracy", "finished"):
        assert outcome.summary[key] == whole.summary[key]


def killed(*arguments, **more):
    raise StorageError("as a kill leaves it")


def test_there_is_a_checkpoint_before_round_one(tmp_path, monkeypatch):
    def begin(self):
        assert files.checkpoints(self.folder.path) == ["round-00000000"]
        raise StorageError("as a kill leaves it")

    with monkeypatch.context() as patched:
        patched.setattr(RunLoop, "_begin", begin)
        with pytest.raises(StorageError):
            run(quick_config(tmp_path / "cut"))
    whole = run(quick_config(tmp_path / "whole")).folder
    config, snapshot = resumed(tmp_path / "cut", {})
    cut = run(config, snapshot=snapshot).folder
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_interrupted_in_round_one_it_writes_round_zero_once(tmp_path):
    def watch(line):
        if line["round"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        run(quick_config(tmp_path / "run"), watch)
    config, snapshot = resumed(tmp_path / "run", {})
    run(config, snapshot=snapshot)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("present", [(), (".lock",), (".lock", ".config.yaml.part")])
def test_killed_right_after_its_folder_was_made_it_begins_anew(tmp_path, present):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in present:
        (folder / name).touch()
    assert went_on(quick_config(folder)) == (quick_config(folder), None)


def test_one_that_goes_on_is_not_finished_until_it_is_again(tmp_path):
    folder = run(quick_config(tmp_path / "run")).folder
    seen = []

    def watch(line):
        seen.append(json.loads((folder / "summary.json").read_text()))
        with pytest.raises(UsageError, match="no finished run"):
            load_all([folder])

    config, snapshot = resumed(folder, {"rounds": 6})
    run(config, watch, snapshot=snapshot)
    assert seen == 2 * [{"finished": False, "ended": "goes on after round 4"}]
    assert load_all([folder])[0].summary["rounds"] == 6


@pytest.mark.parametrize("name", ["a b", "-x", "it's", "a;b"])
def test_the_way_on_can_be_copied_into_a_shell(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    advice = Interrupted(folder=Path(name)).advice
    words = shlex.split(advice.partition("python -m fedsam.simulate ")[2])
    assert words[0] == "--resume"
    assert not words[1].startswith("-")
    assert os.path.samefile(words[1], Path(".") / name)


def test_of_a_folder_that_was_removed_no_checkpoint_is_promised(tmp_path):
    def watch(line):
        if line["round"] == 2:
            shutil.rmtree(tmp_path / "run")

    with pytest.raises(StorageError, match=r"was moved or removed while the run wrote there$"):
        run(quick_config(tmp_path / "run", checkpoint_every="1"), watch)
    with pytest.raises(StorageError) as said, files.storing(tmp_path / "nowhere"):
        raise OSError(28, "No space left on device")
    assert str(said.value) == f"{tmp_path / 'nowhere'}: No space left on device"
