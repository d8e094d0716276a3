"""Segmentation from the command's config to the summary, the picture and the report."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from fedsam.base.errors import UsageError
from fedsam.config.schema import resolve
from fedsam.data.sources.load import load as load_dataset
from fedsam.models.scenes_cnn import ScenesCnn
from fedsam.report.page import html
from fedsam.report.table import ResultTable
from fedsam.runs.run import load
from fedsam.simulate.run import run
from fedsam.tasks.segmentation import Segmentation

SHORT = {"task": "segmentation", "rounds": 2, "eval_every": 2, "checkpoint_every": 0}


def test_the_task_alone_chooses_data_network_and_rates():
    config = resolve({"task": "segmentation"})
    assert (config.dataset, config.lr, config.momentum) == ("digit-scenes", 0.5, 0.9)
    assert (config.batch_size, config.task_options) == (5, {"hard": 0.25})
    assert resolve({"dataset": "digit-scenes"}) == config
    assert resolve({"task": "segmentation", "lr": 0.1}).lr == 0.1
    assert resolve({}).task_options == {}
    # and no layer below the whole config of a run
    assert resolve(config.model_copy(update={"momentum": 0.0}).model_dump()).momentum == 0


def test_twenty_rounds_know_more_than_the_background(tmp_path):
    config = resolve({**SHORT, "rounds": 20, "eval_every": 20, "out": tmp_path / "run"})
    summary = run(config).summary
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert summary["headline"] == last["headline"] == "miou"
    assert summary["last_miou"] == last["miou"] == pytest.approx(
        sum(last["iou"]) / 11, rel=1e-12
    )  # fmt: skip
    # all pixels background would be an mIoU of 0.073 and an accuracy of 0.81
    assert last["miou"] > 0.12
    assert last["accuracy"] > 0.81
    with Image.open(tmp_path / "run" / "answers.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 10
    page = html(ResultTable([load(tmp_path / "run")]))
    assert "run: answers" in page
    assert "MIoU" not in page
    assert "mIoU in percent" in page


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"model": "digits-cnn"},
            r"--model digits-cnn: returns the shape \(2, 11\) for targets of",
        ),
        ({"model": f"{__name__}:Half"}, r"Half: returns the shape \(2, 11, 8, 16\) for targets of"),
        ({"model": f"{__name__}:Named"}, "Named: in training mode forward returns a dict"),
        ({"dataset": "digits"}, "--task segmentation: digits has labels, not masks"),
        ({"task": "classification"}, "--task classification: digit-scenes has masks"),
        ({"lifelong": 2}, "--lifelong 2: needs one label an image; digit-scenes has masks"),
        ({"loss": "trades"}, "--loss trades: needs one label an image; digit-scenes has masks"),
        ({"model": "bisenet-v2", "batch_size": 1}, "--batch-size 1: the BatchNorm of --model bise"),
        ({"task_options": {"hard": 2}}, "--task-options: Segmentation: hard: must be a share"),
        (
            {"dataset": f"{__name__}:larger", "model": f"{__name__}:OfOneSize", "clients": 20},
            "OfOneSize: cannot take images of 1 x 20 x 24 in eval mode",
        ),
        ({"partition": "natural"}, "--partition natural: this data set does not say whose"),
    ],
)
def test_what_does_not_fit_is_one_line_before_anything_is_written(tmp_path, given, said):
    keys = {**SHORT, "dataset": "digit-scenes", **given, "out": tmp_path / "run"}
    with pytest.raises(UsageError, match=said) as caught:
        run(resolve(keys))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


class OfOneSize(ScenesCnn):
    """A network that has a number for each pixel."""

    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.place = torch.nn.Parameter(torch.zeros(classes, *shape[1:]))

    def forward(self, images):
        return super().forward(images) + self.place


def larger():
    """Scenes of 16 x 16 pixels for training, of 20 x 24 for testing, padded by what is ignored."""
    scenes = load_dataset("digit-scenes", Path())
    few, margin = slice(0, 40), (3, 5, 1, 3)
    return replace(
        scenes,
        name="larger",
        train_images=scenes.train_images[few],
        train_labels=scenes.train_labels[few],
        train_classes=scenes.train_classes[few],
        test_images=F.pad(scenes.test_images[few], margin),
        test_labels=F.pad(scenes.test_labels[few], margin, value=255),
        test_classes=scenes.test_classes[few],
    )


def test_test_images_may_be_larger_than_those_for_training(tmp_path):
    keys = {**SHORT, "dataset": f"{__name__}:larger", "model": "scenes-cnn", "clients": 4,
            "clients_per_round": 2, "client_tests": True, "out": tmp_path / "run"}  # fmt: skip
    config = resolve(keys)
    summary = run(config).summary
    state = load_file(tmp_path / "run" / "model.safetensors")
    network = ScenesCnn((1, 20, 24), 11)
    network.load_state_dict(state)
    scenes = larger()
    images = (scenes.test_images / 255 - scenes.mean[0]) / scenes.std[0]
    task = Segmentation(11)
    with torch.no_grad():
        expected = task.metrics(task.statistics(network(images), scenes.test_labels))
    assert summary["last_miou"] == pytest.approx(expected["miou"], rel=1e-5)
    with Image.open(tmp_path / "run" / "answers.png") as picture:
        assert picture.size[0] > 0


class Half(ScenesCnn):
    """A network whose answer is for half the rows."""

    def forward(self, images):
        return super().forward(images)[:, :, ::2]


class Named(ScenesCnn):
    """A network that returns a dict, as torchvision's do."""

    def forward(self, images):
        return {"out": super().forward(images)}


def model_of(tmp_path, name, **changes):
    config = resolve({**SHORT, **changes, "out": tmp_path / name})
    run(config)
    return torch.cat(
        [t.flatten() for t in load_file(tmp_path / name / "model.safetensors").values()]
    )


def test_threads_change_no_byte_and_cohorts_only_the_rounding(tmp_path):
    changes = {"algorithm": "fedasam", "augment": "crop+flip"}
    one = model_of(tmp_path, "one", threads=1, **changes)
    assert torch.equal(model_of(tmp_path, "two", threads=2, **changes), one)
    for cohort in ("slots", "vmap"):
        together = model_of(tmp_path, cohort, cohort=cohort, **changes)
        torch.testing.assert_close(together, one, rtol=1e-3, atol=1e-5)
