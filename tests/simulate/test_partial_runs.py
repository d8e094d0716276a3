"""Runs that begin with a file of weights, and of whose network only a part trains."""

import json
import logging

import pytest
import torch
from conftest import quick_config
from safetensors.torch import load_file, save_file

import fedsam
from fedsam.base.errors import UsageError
from fedsam.config.schema import from_run_config, resolve
from fedsam.flatness.measures.cohort_spread import cohort_of_run
from fedsam.flatness.measures.hessian import hessian
from fedsam.flatness.subject import subject_of_run
from fedsam.models.vit import ViT
from fedsam.runs import checkpoint
from fedsam.simulate.build.trainer import new_trainer
from fedsam.simulate.joint import run_together
from fedsam.simulate.resume import resumed, went_on
from fedsam.simulate.run import run
from fedsam.sweep.grid import SweepPoint

OPTIONS = {"dim": 24, "depth": 1, "heads": 2}
VIT = {"model": "vit", "model_options": OPTIONS, "local_steps": 2, "rounds": 2, "lr": 0.3}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Weights of another vit, for 7 classes, under torchvision's names."""
    torch.manual_seed(11)
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(ViT((1, 8, 8), 7, **OPTIONS).net.state_dict(), path)
    return str(path)


def model_of(folder):
    return load_file(folder / "model.safetensors")


def state_of(folder):
    return checkpoint.load(folder).tensors["model"]


def test_a_run_begins_with_the_files_weights_and_notes_its_checksum(quick, file, caplog):
    with caplog.at_level(logging.INFO):
        folder = quick(weights=file, train="heads", **VIT).folder
    assert "vit, 250 parameters beside 7,824 frozen" in caplog.text
    tensors, begun = model_of(folder), load_file(file)
    for name, tensor in begun.items():
        assert torch.equal(tensors[f"net.{name}"], tensor) == (not name.startswith("heads"))
    assert "as initialised, of another shape: net.heads.head.weight, net.heads" in caplog.text
    assert state_of(folder).numel() == 24 * 10 + 10
    config = resolve({}, folder / "config.yaml")
    assert (config.weights, len(config.weights_sha256)) == (file, 64)
    module = fedsam.load(folder).model()
    assert torch.equal(module.net.heads.head.weight, tensors["net.heads.head.weight"])


@pytest.mark.parametrize("freeze", ["", "a"])
def test_a_run_with_products_leaves_their_weights_under_the_usual_names(quick, file, freeze):
    lora = {"lora": 2, "lora_options": {"alpha": 4.0, "freeze": freeze}}
    folder = quick(weights=file, train="heads", **lora, **VIT).folder
    tensors, begun = model_of(folder), load_file(file)
    assert tensors.keys() == ViT((1, 8, 8), 10, **OPTIONS).state_dict().keys()
    moved = {n for n, t in begun.items() if not torch.equal(tensors[f"net.{n}"], t)}
    block = "encoder.layers.encoder_layer_0."
    weights = ("self_attention.in_proj_weight", "self_attention.out_proj.weight")
    weights += ("mlp.0.weight", "mlp.3.weight")
    products = {f"{block}{weight}" for weight in weights}
    assert moved == products | {"heads.head.weight", "heads.head.bias"}
    for name in products:
        change = tensors[f"net.{name}"] - begun[name]
        assert torch.linalg.matrix_rank(change, rtol=1e-4) == 2
    sides = [(72, 24), (24, 24), (96, 24), (24, 96)]
    of_products = sum(2 * (m + n * (not freeze)) for m, n in sides)
    assert state_of(folder).numel() == of_products + 24 * 10 + 10
    subject = subject_of_run(folder)
    images = subject.test.rows(torch.arange(50)).images
    subject.network.load(subject.state)
    with subject.network.evaluating(), torch.no_grad():
        logits = subject.network.forward(images)
        torch.testing.assert_close(logits, fedsam.load(folder).model()(images))
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = subject.objective("test").metrics(subject.w)
    assert measured["accuracy"] == pytest.approx(metrics[-1]["accuracy"], abs=0.005)


def test_a_measure_looks_at_the_weights_that_products_moved(quick):
    folder = quick(train="heads", lora=2, **VIT).folder
    subject = subject_of_run(folder)
    weights = 72 * 24 + 24 * 24 + 2 * 96 * 24
    assert len(subject.w) == weights + 24 * 10 + 10
    found = hessian(subject, images=32)["scalars"]
    assert found["lambda_1"] > 0
    with pytest.raises(UsageError, match="trained with --lora: its model holds W"):
        cohort_of_run(folder)


def test_a_run_that_is_resumed_ends_as_if_it_had_never_stopped(quick, file):
    keys = {**VIT, "weights": file, "train": "heads", "lora": 2, "lora_options": {"freeze": "a"}}
    whole = quick(**keys | {"rounds": 4}).folder
    half = quick(**keys).folder
    config, snapshot = resumed(half, {"rounds": 4})
    run(config, snapshot=snapshot)
    assert (half / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_run_goes_on_with_its_file_alone_wherever_that_lies(quick, file, tmp_path):
    folder = quick(weights=file, train="heads", **VIT).folder
    again = quick_config(folder, **VIT | {"rounds": 3}, weights=file, train="heads")
    config, snapshot = went_on(again)
    assert (snapshot.round, len(config.weights_sha256)) == (2, 64)
    tensors = load_file(file)
    tensors["class_token"] += 1
    other = tmp_path / "other.safetensors"
    save_file(tensors, other)
    config, snapshot = resumed(folder, {"rounds": 3, "weights": str(other)})
    with pytest.raises(UsageError, match="is another file than --weights-sha256 says"):
        run(config, snapshot=snapshot)
    save_file(load_file(file), other)
    config, snapshot = resumed(folder, {"rounds": 3, "weights": str(other)})
    assert run(config, snapshot=snapshot).summary["rounds"] == 3
    cell = SweepPoint("cell", folder, quick_config(folder, **VIT, weights=str(other)))
    with pytest.raises(UsageError, match="was run with"):
        cell.done()


def test_a_finished_cell_of_a_sweep_is_done_though_its_run_noted_a_checksum(quick, file):
    folder = quick(weights=file, train="heads", **VIT).folder
    assert SweepPoint(
        "cell", folder, quick_config(folder, **VIT, weights=file, train="heads")
    ).done()


def test_runs_that_begin_with_one_file_share_a_program(tmp_path, file):
    def config(seed, **more):
        keys = {"weights": file, "train": "heads", "seed": seed, "cohort": "vmap", **VIT, **more}
        return quick_config(tmp_path / f"{seed}{len(more)}", **keys)

    together = run_together([config(0), config(1)])
    alone = run(config(1, quiet=True))
    for name, tensor in model_of(alone.folder).items():
        torch.testing.assert_close(model_of(together[1].folder)[name], tensor)


@pytest.mark.parametrize("strategy", ["fedavg", "flwr.serverapp.strategy:FedAdam", "fedadam"])
def test_only_what_trains_is_in_a_message(monkeypatch, quick, strategy):
    from fedsam.engines.local import LocalGrid

    sent, send = [], LocalGrid.send_and_receive

    def watched(grid, messages, **more):
        messages = list(messages)
        replies = send(grid, messages, **more)
        records = [m.content.array_records["arrays"] for m in [*messages, *replies]]
        sent.extend(set(record) for record in records)
        return replies

    monkeypatch.setattr(LocalGrid, "send_and_receive", watched)
    quick(train=r"heads|ln\.", strategy=strategy, **VIT)
    names = {"heads.head.weight", "heads.head.bias", "encoder.ln.weight", "encoder.ln.bias"}
    assert len(sent) == 2 * 2 * 5
    assert all(one == {f"net.{name}" for name in names} for one in sent)


def test_frozen_batchnorm_is_neither_sent_nor_changed(quick):
    keys = {"model": "resnet20", "model_options": {"norm": "batch"}, "local_steps": 1, "rounds": 1}
    folder = quick(train="fc|linear|head", **keys).folder
    trainer, _ = new_trainer(resolve({}, folder / "config.yaml"))
    assert trainer.layout.size == trainer.layout.trainable == state_of(folder).numel()
    tensors = model_of(folder)
    statistics = [t for n, t in tensors.items() if n.endswith("running_var")]
    assert len(statistics) > 10
    assert all((t == 1).all() for t in statistics)
    with pytest.raises(UsageError, match="--update-bn 100: the model has no BatchNorm that trains"):
        quick(train="fc|linear|head", update_bn=100, **keys)


BAD = {
    "--train: must be a regular": {"train": "head("},
    "--train nothing: no parameter is called so; the model has net.class_token, ": {
        "train": "nothing"
    },
    "--lora-targets: needs --lora": {"lora_targets": "mlp"},
    "--lora-options: needs --lora": {"lora_options": {"alpha": 2.0}},
    "--weights-sha256: needs --weights": {"weights_sha256": "0" * 64},
    "--lora -1: ": {"lora": -1},
    "--lora 25: net.encoder.layers.encoder_layer_0.self_attention.in_proj_weight has rank 24": {
        "lora": 25
    },
    "--lora 11: net.heads.head.weight has rank 10 at most; train it as a whole (--train)": {
        "lora": 11
    },
    "--lora-options: LoraOptions has no option 'beta'": {"lora": 2, "lora_options": {"beta": 1}},
    "--lora-options: LoraOptions: freeze: must be a, or left out": {
        "lora": 2,
        "lora_options": {"freeze": "b"},
    },
    "--lora-targets bias: no weight of two dimensions": {"lora": 2, "lora_targets": "bias"},
    "--weights nowhere.safetensors: cannot be read: No such file": {
        "weights": "nowhere.safetensors"
    },
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_wrong_is_one_line_before_a_folder_is_made(tmp_path, message):
    with pytest.raises(UsageError) as raised:
        run(quick_config(tmp_path / "run", **VIT | BAD[message]))
    if message == "--train: must be a regular":
        assert str(raised.value).startswith("--train head(: must be a regular expression: missing")
    else:
        assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_flowers_runtime_needs_the_absolute_path_of_a_file():
    with pytest.raises(UsageError, match=r"--weights vit\.safetensors: Flower runs an app"):
        from_run_config({"weights": "vit.safetensors"})
    assert from_run_config({"weights": "/w.safetensors", "train": "head"}).train == "head"
