"""What trackers are told, read back with each service's own reader."""

import json
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import command, quick_config

from fedsam.base.errors import TrainingError, UsageError
from fedsam.base.system import Interrupted
from fedsam.simulate.__main__ import main
from fedsam.simulate.joint import run_together
from fedsam.simulate.resume import resumed
from fedsam.simulate.run import run
from fedsam.simulate.trackers.wandb import WandB
from fedsam.simulate.tracking import hyperparameters, keep_run_id, run_id

DIVERGES = {"lr": 1e30, "rounds": 3}
calls: list[tuple] = []  # what the recorders below were told
starts: list[list] = []  # the lines that they were started with


@pytest.fixture(autouse=True)
def _at_home(monkeypatch, tmp_path):
    """Nothing of the user's environment, nothing over the network."""
    calls.clear()
    starts.clear()
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_DIR", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def mlflow_files(monkeypatch, tmp_path):
    """Let MLflow keep its runs in plain files; return its client."""
    uri = (tmp_path / "mlruns").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curves_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what trackers should hold of a run: each metric's rounds and values."""
    lines = lines_of(folder)
    names = {k for line in lines for k, v in line.items() if isinstance(v, int | float)} - {"round"}
    curves = {n: [(line["round"], line[n]) for line in lines if n in line] for n in names}
    assert {"accuracy", "loss", "train_loss", "seconds"} <= set(curves)
    assert len(curves["train_loss"]) == max(line["round"] for line in lines)
    summary = json.loads((folder / "summary.json").read_text())
    for name in ("final_accuracy", "last_accuracy", "best_accuracy"):
        if summary[name] is not None:
            curves[name] = [(summary["rounds"], summary[name])]
    return curves


def only_run(client, experiment="fedsam"):
    (found,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return found


def mlflow_curves(client, run) -> dict[str, list[tuple[int, float]]]:
    return {
        name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }


@pytest.mark.usefixtures("pictures")
def test_tensorboard_reads_every_value_step_and_hyperparameter(quick):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.metadata import (
        SESSION_START_INFO_TAG,
        parse_session_start_info_plugin_data,
    )

    folder = quick(track="tensorboard", alpha=0.3).folder
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    curves = curves_of(folder)
    assert set(events.Tags()["scalars"]) == set(curves)
    for name, points in curves.items():
        assert [(e.step, e.value) for e in events.Scalars(name)] == [
            (step, float(np.float32(value))) for step, value in points
        ]
    content = events.SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content
    values = parse_session_start_info_plugin_data(content).hparams
    assert values["alpha"].number_value == 0.3
    assert values["minimizer"].string_value == "sgd"
    assert values["swa"].bool_value is False
    assert values["model_options"].string_value == "{}"
    (curve,) = events.Images("curves")
    assert (
        struct.pack(">II", curve.width, curve.height) == (folder / "curves.png").read_bytes()[16:24]
    )
    assert events.Images("partition")[0].step == 4


def test_a_tracker_changes_no_result(quick):
    plain, tracked = quick().folder, quick(track="tensorboard").folder
    for name in ("model.safetensors", "partition.npz"):
        assert (plain / name).read_bytes() == (tracked / name).read_bytes()


def test_tensorboards_file_of_a_failed_run_is_whole(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(TrainingError, match="no client returned a usable update"):
        run(quick_config(tmp_path / "run", track="tensorboard", **DIVERGES))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    (first,) = events.Scalars("loss")
    loss = lines_of(tmp_path / "run")[0]["loss"]
    assert (first.step, first.value) == (0, float(np.float32(loss)))
    (ended,) = events.Tensors("ended/text_summary")
    assert b"no client returned a usable update" in ended.tensor_proto.string_val[0]


@pytest.mark.usefixtures("pictures")
def test_mlflow_reads_back_a_run_from_its_files(quick, mlflow_files):
    folder = quick(track="mlflow", alpha=0.3, partition_options="{}").folder
    found = only_run(mlflow_files)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == folder.name
    config = quick_config(folder, track="mlflow", alpha=0.3)
    assert found.data.params == {k: str(v) for k, v in hyperparameters(config).items()}
    assert mlflow_curves(mlflow_files, found) == curves_of(folder)
    names = [a.path for a in mlflow_files.list_artifacts(found.info.run_id)]
    assert names == ["curves.png", "partition.png"]


def test_mlflow_marks_a_failed_run(tmp_path, mlflow_files):
    with pytest.raises(TrainingError, match="no client returned a usable update"):
        run(quick_config(tmp_path / "run", track="mlflow", **DIVERGES))
    found = only_run(mlflow_files)
    assert found.info.status == "FAILED"
    assert found.data.metrics["loss"] == lines_of(tmp_path / "run")[0]["loss"]


@pytest.mark.slow  # a process of its own that trains until it is stopped
def test_an_interrupted_run_is_marked_and_written_to_its_last_round(tmp_path, mlflow_files):
    out = tmp_path / "run"
    call = [sys.executable, "-m", "fedsam.simulate", "--rounds", "100000", "--clients", "20"]
    call += ["--track", "mlflow", "--quiet", "--out", str(out)]
    process = subprocess.Popen(call, stderr=subprocess.PIPE, text=True)
    try:
        begin = time.monotonic()
        while not (out / "metrics.jsonl").exists() or len(lines_of_so_far(out)) < 5:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < begin + 60
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.stderr.close()
    found = only_run(mlflow_files)
    assert found.info.status == "KILLED"
    assert mlflow_curves(mlflow_files, found) == curves_of(out)


def test_a_resumed_run_is_one_run_in_mlflow(tmp_path, mlflow_files):
    out = tmp_path / "run"
    killed_in_round(5, out, track="mlflow")
    before = only_run(mlflow_files)
    assert before.info.status == "RUNNING"
    gone_on(out, threads=1)
    after = only_run(mlflow_files)
    assert (after.info.run_id, after.info.status) == (before.info.run_id, "FINISHED")
    assert after.data.tags["resumed.threads"] == "1"
    assert after.data.params == before.data.params
    ours, theirs = curves_of(out), mlflow_curves(mlflow_files, after)
    assert ours.keys() == theirs.keys()
    for name, points in ours.items():
        assert [step for step, _ in theirs[name]] == [step for step, _ in points]
        if name != "seconds":  # those that were logged first stay
            assert theirs[name] == points


def test_a_run_that_mlflow_does_not_know_any_more_is_a_whole_new_one(tmp_path, mlflow_files):
    out = tmp_path / "run"
    killed_in_round(5, out, track="mlflow")
    first = only_run(mlflow_files).info.run_id
    mlflow_files.delete_run(first)
    gone_on(out)
    after = only_run(mlflow_files)
    assert after.info.run_id != first
    assert mlflow_curves(mlflow_files, after) == curves_of(out)


def lines_of_so_far(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


@pytest.mark.slow  # MLflow takes three seconds to make its database
def test_runs_side_by_side_share_a_database_that_they_create_at_the_same_time(tmp_path):
    from mlflow import MlflowClient

    configs = [
        quick_config(tmp_path / f"run{seed}", seed=seed, track="mlflow") for seed in range(3)
    ]
    run_together(configs)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fedsam")
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(r.info.run_name for r in runs) == ["run0", "run1", "run2"]
    for found in runs:
        folder = tmp_path / found.info.run_name
        assert found.info.status == "FINISHED"
        assert found.data.params["seed"] == folder.name[-1]
        assert mlflow_curves(client, found) == curves_of(folder)
        stored = tmp_path / "mlflow-artifacts" / found.info.run_id / "artifacts" / "curves.png"
        assert stored.read_bytes() == (folder / "curves.png").read_bytes()
    assert not (tmp_path / "mlruns").exists()


def wandb_records(file: Path) -> list:
    """Return the records of a .wandb file: LevelDB's log format behind seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, records, parts = file.read_bytes(), 7, [], b""
    while at < len(data):
        room = 32768 - at % 32768
        if room < 7:  # the rest of a block that no header fits into
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            records.append(Record.FromString(parts))
            parts = b""
    return records


@pytest.mark.usefixtures("pictures")
def test_wandb_offline_writes_everything_and_connects_to_nobody(quick, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        for name in ("WANDB_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
            monkeypatch.setenv(name, address)
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_SILENT", "true")
        folder = quick(track="wandb", alpha=0.3).folder
        server.settimeout(0.5)
        with pytest.raises(TimeoutError):
            server.accept()
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    records = wandb_records(file)
    assert next(r.run for r in records if r.HasField("run")).display_name == folder.name
    configs = [u for r in records if r.HasField("run") for u in r.run.config.update]
    assert {u.key: u.value_json for u in configs}["alpha"] == "0.3"
    curves: dict[str, list] = {}
    for record in records:
        items = {i.key or i.nested_key[0]: i.value_json for i in record.history.item}
        for name, value in items.items():
            if not name.startswith("_") and name not in ("curves", "partition"):
                curves.setdefault(name, []).append((int(items["_step"]), json.loads(value)))
    expected = curves_of(folder)
    finals = {name: expected.pop(name)[0][1] for name in list(expected) if "_accuracy" in name}
    assert curves == expected
    summary = {u.key or u.nested_key[0]: u.value_json for r in records for u in r.summary.update}
    assert {name: json.loads(summary[name]) for name in finals} == finals
    assert [r.exit.exit_code for r in records if r.HasField("exit")] == [0]
    assert len(list(folder.glob("wandb/offline-run-*/files/media/images/*.png"))) == 2


class Service:
    """W&B online, as far as we ask it: runs by id, steps that only grow."""

    Error = OSError

    def __init__(self):
        self.runs: dict[str, list] = {}

    def Settings(self, **given):  # noqa: N802
        return given

    def Image(self, path):  # noqa: N802
        return path

    def init(self, id, resume, **given):
        id = id or "first"
        assert resume == ("allow" if id in self.runs else None)
        history = self.runs.setdefault(id, [])

        def log(values, step):
            assert step >= (history[-1][0] if history else 0)
            history.append((step, values))

        return SimpleNamespace(
            id=id,
            step=history[-1][0] + 1 if history else 0,
            log=log,
            summary={},
            finish=lambda exit_code: None,
        )


def test_a_resumed_run_is_one_run_in_wandb(tmp_path, monkeypatch):
    service, out = Service(), tmp_path / "run"
    monkeypatch.setattr(WandB, "__init__", lambda self: setattr(self, "wandb", service))
    killed_in_round(5, out, track="wandb")
    gone_on(out)
    assert list(service.runs) == ["first"]
    rows = [(step, values) for step, values in service.runs["first"] if "curves" not in values]
    assert [step for step, _ in rows] == [0, 1, 2, 3, 4, 5, 6]
    for (_, values), line in zip(rows, lines_of(out), strict=True):
        assert values["accuracy"] == line["accuracy"]


def test_a_resumed_run_keeps_its_id_in_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(quick_config(out, track="wandb"), stops_after(3))
    gone_on(out)
    files = sorted(out.glob("wandb/offline-run-*/*.wandb"), key=lambda f: f.stat().st_mtime_ns)
    ids = [r.run.run_id for f in files for r in wandb_records(f) if r.HasField("run")]
    assert len(files) == 2
    assert set(ids) == {json.loads((out / "tracking.json").read_text())["wandb"]}
    steps = {
        int(i.value_json)
        for record in wandb_records(files[-1])
        for i in record.history.item
        if (i.key or i.nested_key[0]) == "_step"
    }
    assert steps == {0, 1, 2, 3, 4}  # the last file is the whole run


@pytest.mark.parametrize(
    ("extra", "module"),
    [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow")],
)
def test_a_missing_extra_is_one_line_before_anything_is_written(
    tmp_path, monkeypatch, extra, module
):
    for name in list(sys.modules):
        if re.match(rf"(torch\.utils\.tensorboard|{module})(\.|$)", name):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError) as caught:
        run(quick_config(tmp_path / "run", track=extra))
    says = f"--track {extra}: there is no module '{module}'; pip install 'fedsam[{extra}]'"
    assert str(caught.value) == says
    assert not (tmp_path / "run").exists()


class Recorder:
    """Keeps what it is told."""

    def start(self, config, folder, lines):
        calls.append(("start", config.seed, (folder / "config.yaml").exists()))
        starts.append([dict(line) for line in lines])

    def log(self, line):
        calls.append(("log", line["round"], sorted(line)))

    def finish(self, summary, error):
        calls.append(("finish", summary.get("ended"), summary.get("rounds"), type(error)))


class BadStart(Recorder):
    def start(self, config, folder, lines):
        raise TrainingError("nobody listens")


class BadEnd(Recorder):
    def finish(self, summary, error):
        calls.append(("bad end",))
        raise OSError("the disk is full")


class Stopper(Recorder):
    def log(self, line):
        super().log(line)
        if line["round"] == 2:
            raise TrainingError("that is enough")


class Demanding(Recorder):
    def __init__(self, address):
        self.address = address


class Mute:
    def start(self, config, folder, lines):
        pass


class Former(Recorder):
    def start(self, config, folder):
        pass


MINE = __name__


def test_a_tracker_of_ones_own_gets_the_calls_in_order(quick):
    folder = quick(track=f"{MINE}:Recorder", seed=3, rounds=2).folder
    first, second, third = (("log", line["round"], sorted(line)) for line in lines_of(folder))
    assert "accuracy" in third[2]
    assert calls == [
        ("start", 3, True),
        first,
        second,
        third,
        ("finish", "all rounds done", 2, type(None)),
    ]


def test_a_tracker_is_finished_also_when_the_run_fails(tmp_path):
    with pytest.raises(TrainingError) as caught:
        run(quick_config(tmp_path / "run", track=f"{MINE}:Recorder", **DIVERGES))
    assert [call[:2] for call in calls] == [
        ("start", 0),
        ("log", 0),
        ("finish", str(caught.value)),
    ]
    assert calls[-1][-1] is TrainingError


def test_a_tracker_can_end_the_run_whose_folder_is_then_written(tmp_path):
    with pytest.raises(TrainingError, match="that is enough"):
        run(quick_config(tmp_path / "run", track=f"{MINE}:Stopper, {MINE}:Recorder"))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["rounds"] == 2
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert calls[-2:] == [("finish", "that is enough", 2, TrainingError)] * 2


def killed_in_round(number, out, **given):
    """Begin a run, and leave it as a kill does: checkpoint and trackers where they were."""
    more = {"rounds": 6, "eval_every": 1, "checkpoint_every": "2"} | given
    config = quick_config(out, **more)

    def watch(line):
        if line["round"] == number:
            raise KilledError

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("fedsam.simulate.tracking._finish", lambda *arguments: None)
        with pytest.raises(KilledError):
            run(config, watch)


class KilledError(Exception):
    pass


def stops_after(number):
    def watch(line):
        if line["round"] == number:
            raise KeyboardInterrupt

    return watch


def gone_on(folder, interrupted=None, **given):
    config, snapshot = resumed(folder, given)
    return run(config, stops_after(interrupted), snapshot=snapshot).folder


def test_a_tracker_is_told_where_a_run_goes_on(tmp_path):
    out = tmp_path / "run"
    killed_in_round(5, out, track=f"{MINE}:Recorder")
    assert starts == [[]]
    gone_on(out)
    assert [line["round"] for line in starts[1]] == [0, 1, 2, 3, 4]
    assert starts[1][1]["train_loss"] == lines_of(out)[1]["train_loss"]
    assert [call[1] for call in calls if call[0] == "log"] == [0, 1, 2, 3, 4, 5, 5, 6]


def test_a_resumed_run_is_one_run_in_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    killed_in_round(5, out, track="tensorboard")
    with pytest.raises(Interrupted):  # which writes final accuracies, too
        gone_on(out, interrupted=5)
    gone_on(out)
    assert len(list((out / "tensorboard").glob("events*"))) == 3
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    for name, points in curves_of(out).items():
        assert [(e.step, e.value) for e in events.Scalars(name)] == [
            (step, float(np.float32(value))) for step, value in points
        ]
    assert [e.step for e in events.Images("curves")] == [6]


@pytest.mark.parametrize("content", ["{", "[]", '{"mlflow": 3}', "[" * 100_000, "\xff"])
def test_a_damaged_file_of_ids_is_named_in_one_line(tmp_path, content):
    (tmp_path / "tracking.json").write_text(content, encoding="latin-1")
    with pytest.raises(UsageError, match=r"tracking\.json: damaged: .*; remove it"):
        run_id(tmp_path, "mlflow")
    with pytest.raises(UsageError, match=r"tracking\.json: damaged: .*; remove it"):
        keep_run_id(tmp_path, "mlflow", "7")
    (tmp_path / "tracking.json").unlink()
    keep_run_id(tmp_path, "mlflow", "7")
    assert (run_id(tmp_path, "mlflow"), run_id(tmp_path, "wandb")) == ("7", "")


def test_trackers_before_one_that_cannot_start_are_finished(tmp_path):
    with pytest.raises(TrainingError, match="nobody listens"):
        run(quick_config(tmp_path / "run", track=f"{MINE}:Recorder,{MINE}:BadStart"))
    assert calls == [("start", 0, True), ("finish", None, None, TrainingError)]
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_down_at_the_start_blocks_no_later_try(tmp_path, capsys):
    words = ["--rounds", "2", "--clients", "20", "--clients-per-round", "5", "--device", "cpu"]
    words += ["--alpha", "1", "--eval-every", "1", "--out", str(tmp_path / "run")]
    for more in ([], ["--go-on"]):
        assert main([*words, *more, "--track", f"{MINE}:BadStart"]) == 1
        assert capsys.readouterr().err == "fedsam: training stopped: nobody listens\n"
        assert not (tmp_path / "run").exists()
    assert main(words) == 0
    model = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert main(["--resume", str(tmp_path / "run"), "--track", f"{MINE}:BadStart"]) == 1
    assert main(["--resume", str(tmp_path / "run"), "--rounds", "2", "--track", ""]) == 0
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == model


def test_a_mistake_at_the_end_keeps_no_other_tracker_from_it(tmp_path):
    with pytest.raises(OSError, match="the disk is full"):
        run(quick_config(tmp_path / "run", track=f"{MINE}:BadEnd,{MINE}:Recorder", rounds=1))
    assert [call[0] for call in calls[-2:]] == ["bad end", "finish"]
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_mistake_at_the_end_does_not_hide_what_ended_the_run(tmp_path, caplog):
    with pytest.raises(TrainingError, match="no client returned a usable update"):
        run(quick_config(tmp_path / "run", track=f"{MINE}:BadEnd,{MINE}:Recorder", **DIVERGES))
    assert [call[0] for call in calls[-2:]] == ["bad end", "finish"]
    assert "--track: BadEnd could not finish" in caplog.text
    assert "the disk is full" in caplog.text


WRONG = {
    "tensorbord": "--track: no 'tensorbord' (did you mean 'tensorboard'?); have mlflow, "
    "tensorboard, wandb, or package.module:Class",
    "tensorboard,": "--track: no ''",
    f"{MINE}:Recoder": "did you mean 'Recorder'?",
    f"{MINE}:Mute": f"--track {MINE}:Mute: needs the methods start, log and finish",
    f"{MINE}:Former": f"--track {MINE}:Former: must be start(config, folder, lines)",
    "tensorboard, tensorboard": "names tensorboard twice; leave out one",
    "mlflow,fedsam.simulate.trackers.mlflow:MLflow": "names fedsam.simulate.trackers.mlflow:MLflow "
    "twice; leave out one",
    f"{MINE}:Demanding": f"--track {MINE}:Demanding: must be made without arguments: missing a "
    "required argument: 'address'",
}


@pytest.mark.parametrize("track", WRONG)
def test_a_wrong_tracker_is_one_line_before_anything_is_written(tmp_path, track):
    with pytest.raises(UsageError) as caught:
        run(quick_config(tmp_path / "run", track=track))
    assert WRONG[track] in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_wandb_without_a_login_is_one_line_that_says_what_to_do(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    done = command("--rounds", "1", "--track", "wandb")
    assert done.returncode == 1
    assert re.fullmatch(
        r"fedsam: training stopped: --track wandb: .*WANDB_MODE=offline\)\n", done.stderr
    )
