"""What a resume, a report and load read of a run is as the run wrote it, or one line says so."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import quick_config

import fedsam
from fedsam.base.errors import UsageError
from fedsam.report.formats import comma_separated, markdown
from fedsam.report.table import ResultTable
from fedsam.runs import checkpoint
from fedsam.runs.folder import RunDir
from fedsam.runs.run import load_all
from fedsam.simulate.build.trainer import new_trainer
from fedsam.simulate.resume import resumed
from fedsam.simulate.run import run

DAMAGES = 80
READ_BY_RESUME = ("config.yaml", "metrics.jsonl", "partition.npz")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run, and what another process would make of its config."""
    folder = run(quick_config(tmp_path_factory.mktemp("sealed") / "run")).folder
    return folder, new_trainer(resumed(folder, {})[0])[0]


@pytest.fixture
def folder(tmp_path, whole):
    return shutil.copytree(whole[0], tmp_path / "run")


def damaged(content, generator):
    """The content with a flipped bit, cut short, or with some bytes zeroed."""
    place = int(generator.integers(len(content)))
    match generator.integers(3):
        case 0:
            flipped = bytes([content[place] ^ (1 << int(generator.integers(8)))])
            return content[:place] + flipped + content[place + 1 :]
        case 1:
            return content[:place]
    return content[:place] + bytes(len(content[place : place + 8])) + content[place + 8 :]


def damages(content):
    """Eighty of them, none of which is the content itself."""
    generator = np.random.default_rng(len(content))
    found = []
    while len(found) < DAMAGES:
        other = damaged(content, generator)
        found += [other] * (other != content)
    return found


def go_on(folder, trainer):
    config, snapshot = resumed(folder, {})
    RunDir.reopen(config, trainer.partition, trainer.train.targets, snapshot).close()


@pytest.mark.parametrize("name", READ_BY_RESUME)
def test_a_resume_notices_eighty_of_eighty_damages_of_each_file(folder, whole, name):
    file = folder / name
    content = file.read_bytes()
    for other in damages(content):
        file.write_bytes(other)
        with pytest.raises(UsageError, match="or start the run anew") as refused:
            go_on(folder, whole[1])
        assert str(file) in str(refused.value)
    file.unlink()
    with pytest.raises(UsageError, match=f"{name}: cannot be read .*put it back"):
        go_on(folder, whole[1])
    file.write_bytes(content)
    go_on(folder, whole[1])


def test_what_stands_behind_the_checkpoints_metrics_is_cut_off(folder, whole):
    file = folder / "metrics.jsonl"
    content = file.read_bytes()
    file.write_bytes(content + b'{"round": 5, half a li')
    go_on(folder, whole[1])
    assert file.read_bytes() == content


def test_an_edited_key_is_named_by_its_file(folder):
    file = folder / "config.yaml"
    file.write_text(file.read_text().replace("\nlr: 0.1", "\nlr: 0.9"))
    with pytest.raises(UsageError, match=r"config\.yaml: was changed or damaged after the run"):
        resumed(folder, {"rounds": 9})


@pytest.mark.parametrize("at", ["before", "after"])
def test_a_kill_while_the_config_of_a_longer_run_is_written_costs_nothing(
    folder, whole, monkeypatch, at
):
    """Each checkpoint goes with the old config.yaml and the new one."""
    config, snapshot = resumed(folder, {"rounds": 9})
    accept = checkpoint.accept

    def killed(*arguments):
        if at == "after":
            accept(*arguments)
        raise KeyboardInterrupt

    parts = config, whole[1].partition, whole[1].train.targets, snapshot
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "accept", killed)
        with pytest.raises(KeyboardInterrupt):
            RunDir.reopen(*parts)
    assert resumed(folder, {})[0].rounds == 4
    RunDir.reopen(*parts).close()
    assert resumed(folder, {})[0].rounds == 9


def table_of(folder):
    table = ResultTable(load_all([folder]))
    counts = [one.partition_counts() for one in table.runs]
    return markdown(table), comma_separated(table, 0.5), [one.metrics for one in table.runs], counts


def attempt(folder):
    try:
        return table_of(folder), ""
    except UsageError as error:
        return None, str(error)


@pytest.mark.parametrize("name", [*READ_BY_RESUME, "summary.json"])
def test_a_table_of_a_damaged_run_is_right_or_one_line(folder, name):
    right = table_of(folder)
    file = folder / name
    for other in damages(file.read_bytes()):
        file.write_bytes(other)
        table, said = attempt(folder)
        if table is None:
            assert name in said
            assert "\n" not in said
        else:
            assert table[:3] == right[:3]
            assert torch.equal(table[3][0], right[3][0])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("summary.json", "[]"),
        ("summary.json", '{"finished": true}'),
        ("summary.json", '{"finished": true, "final_accuracy": "much"}'),
        ("summary.json", '{"finished": true, "final_accuracy": [1]}'),
        ("summary.json", '{"finished": true, "final_accuracy": 0.5, "seals": 3}'),
        ("summary.json", "[" * 100_000),
        ("metrics.jsonl", "[]\n"),
        ("metrics.jsonl", '{"round": "one"}\n'),
        ("metrics.jsonl", '{"round": 1, "accuracy": "much"}\n'),
        ("metrics.jsonl", "\udcff\n"),
        ("config.yaml", "lr: abc"),
        ("config.yaml", "- 3"),
        ("config.yaml", "lr: ["),
        ("partition.npz", "PK"),
    ],
)
def test_files_written_by_hand_are_refused_in_one_line(folder, name, text):
    """Without seals, as other versions and other people write them."""
    summary = json.loads((folder / "summary.json").read_text())
    del summary["seals"], summary["seal"]
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UsageError, match=name) as refused:
        table_of(folder)
    assert "\n" not in str(refused.value)


def test_a_damaged_model_is_one_line(folder):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    for other in damages(content)[:20]:
        file.write_bytes(other)
        with pytest.raises(UsageError, match=r"model\.safetensors"):
            fedsam.load(folder).model()
    file.write_bytes(content)
    assert fedsam.load(folder).model() is not None
