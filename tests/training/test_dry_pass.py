"""Before a run is begun: what a model cannot do is one line, what it needs is found out."""

import json
import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedsam.base.errors import UsageError
from fedsam.config.schema import resolve
from fedsam.data.datasets import Dataset
from fedsam.simulate.build.trainer import new_trainer
from fedsam.tasks.classification import Classification

HERE = "tests.training.test_dry_pass"


class Base(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(math.prod(shape), 8), nn.Linear(8, classes)

    def hidden(self, x):
        return F.relu(self.fc1(x.flatten(1)))

    def forward(self, x):
        return self.fc2(self.hidden(x))


class Dropout(Base):
    def forward(self, x):
        return self.fc2(F.dropout(self.hidden(x), 0.5, self.training))


class OfPython(Base):
    def forward(self, x):
        return super().forward(x) * (random.random() if self.training else 1)


class OfNumPy(Base):
    def forward(self, x):
        return super().forward(x) * (np.random.rand() if self.training else 1)


class MonteCarlo(Base):
    def forward(self, x):
        return self.fc2(F.dropout(self.hidden(x), 0.5, not self.training))


class BatchNorm(Base):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.bn = nn.BatchNorm1d(8)

    def hidden(self, x):
        return self.bn(super().hidden(x))


class OverPixels(Base):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.bn = nn.BatchNorm2d(shape[0])

    def hidden(self, x):
        return super().hidden(self.bn(x))


class Pair(Base):
    def forward(self, x):
        return super().forward(x), self.hidden(x)


class Named(Base):
    def forward(self, x):
        return {"logits": super().forward(x)}


class PairInTraining(Base):
    def forward(self, x):
        return (super().forward(x),) if self.training else super().forward(x)


class Few(Base):
    def __init__(self, shape, classes):
        super().__init__(shape, classes - 5)


class Map(Base):
    def forward(self, x):
        return super().forward(x)[:, :, None]


class OfAnySize(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.fc = nn.Linear(1, classes)

    def forward(self, x):
        return self.fc(x.mean((1, 2, 3))[:, None])


class Larger(Base):
    def __init__(self, shape, classes):
        super().__init__((shape[0], 9, 9), classes)


class Frozen(Base):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.requires_grad_(False)


class Cut(Base):
    def forward(self, x):
        return super().forward(x).detach()


class Lazy(nn.Sequential):
    def __init__(self, classes):
        super().__init__(
            nn.Flatten(), nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.Linear(8, classes)
        )


class Buggy(Base):
    def forward(self, x):
        return self.no_such_layer(x)


class Reassigning(Base):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.register_buffer("seen", torch.tensor(1.0))

    def forward(self, x):
        if self.training:
            self.seen = 0.9 * self.seen + 0.1 * x.abs().mean()
        return super().forward(x / self.seen)


class InPlace(Reassigning):
    def forward(self, x):
        if self.training:
            self.seen.mul_(0.9).add_(0.1 * x.abs().mean())
        return Base.forward(self, x / self.seen.clone())


class TwoTypes(Base):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.fc2.double()


class Complex(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.fc = nn.Linear(math.prod(shape), classes, dtype=torch.complex64)


class Sparse(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.table = nn.Embedding(2, 8, sparse=True)
        self.fc = nn.Linear(8 * math.prod(shape), classes)

    def forward(self, x):
        return self.fc(self.table((x.flatten(1) > 0).long()).flatten(1))


class Counting(Base):
    def __init__(self, shape, classes, count=2**24):
        super().__init__(shape, classes)
        self.register_buffer("count", torch.tensor(count))


def no_module(shape, classes):
    return classes


class PerBatch(Classification):
    """A task whose loss is one number a mini-batch."""

    def loss(self, output, targets):
        return F.cross_entropy(output, targets)


def made(model, **keys):
    named = ":" in model or model == "scenes-cnn"
    given = {"model": model if named else f"{HERE}:{model}", "clients": 8}
    return new_trainer(resolve(given | {"clients_per_round": 4} | keys))


def trainer_with(model, **keys):
    return made(model, **keys)[0]


@pytest.mark.parametrize(
    ("model", "draws", "least", "changes"),
    [
        ("Base", False, 1, False),
        ("Dropout", True, 1, False),
        ("OfPython", True, 1, False),
        ("OfNumPy", True, 1, False),
        ("MonteCarlo", True, 1, False),
        ("BatchNorm", False, 2, True),
        ("OverPixels", False, 1, True),
        ("Lazy", False, 2, True),
        ("Reassigning", False, 1, True),
        ("InPlace", False, 1, True),
        ("Counting", False, 1, False),
    ],
)
def test_what_a_model_needs_is_found_out(model, draws, least, changes):
    before = torch.get_rng_state(), random.getstate()
    trainer = trainer_with(model)
    assert (trainer.draws, trainer.work.least, trainer.changes) == (draws, least, changes)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_a_dry_pass_leaves_no_trace_in_the_first_model():
    config = resolve({"model": f"{HERE}:BatchNorm", "clients": 8, "clients_per_round": 4})
    _, first = new_trainer(config)
    tensors = first.layout.read(first.state)
    assert tensors["bn.running_mean"].tolist() == [0.0] * 8
    assert tensors["bn.running_var"].tolist() == [1.0] * 8
    assert tensors["bn.num_batches_tracked"] == 0


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("Pair", "in training mode forward returns a tuple, not the logits, a tensor (2, 10)"),
        ("Named", "in training mode forward returns a dict, not the logits"),
        ("PairInTraining", "in training mode forward returns a tuple"),
        ("Few", "returns the shape (2, 5) for 2 images of 10 classes, not the logits"),
        ("Map", "returns the shape (2, 10, 1) for 2 images of 10 classes"),
        ("Larger", "cannot take images of 1 x 8 x 8 in training mode: mat1 and mat2 shapes"),
        ("Frozen", "it has no trainable parameter"),
        ("Cut", "its output depends on no trainable parameter"),
        ("TwoTypes", "its parameters are float32, float64; they must all be of one floating"),
        ("Complex", "its parameters are complex64"),
        ("Sparse", "its gradient cannot be taken: reshape is not implemented for sparse tensors"),
        ("no_module", "returns a int, no Module"),
    ],
)
def test_what_a_model_cannot_do_is_one_line(model, said):
    with pytest.raises(UsageError) as refused:
        trainer_with(model)
    assert f"--model {HERE}:{model}: " in str(refused.value)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_shape_that_does_not_fit_names_the_line_of_the_model():
    with pytest.raises(UsageError, match=r"\(test_dry_pass.py:\d+\)$"):
        trainer_with("Larger")


def test_a_bug_of_a_model_is_its_own_traceback():
    with pytest.raises(AttributeError, match="no_such_layer"):
        trainer_with("Buggy")


def test_a_task_that_returns_one_number_a_mini_batch_is_one_line():
    with pytest.raises(UsageError, match=r"--task: loss returns the shape \(\) for 2 images"):
        trainer_with("Base", task=f"{HERE}:PerBatch")


def test_a_batch_norm_that_cannot_train_on_one_image_says_how_many_clients_hold_one():
    with pytest.raises(UsageError, match="--batch-size 1: the BatchNorm of --model"):
        trainer_with("BatchNorm", batch_size=1)
    with pytest.raises(UsageError, match="one image, and 1432 of 1437 clients hold fewer than 2"):
        trainer_with("BatchNorm", clients=1437, partition="iid")


def test_sub_batches_of_one_image_join_the_one_before_or_are_one_line(quick):
    keys = {"model": f"{HERE}:BatchNorm", "minimizer": "m-sam", "local_steps": 1}
    sevens = {"batch_size": 7, "minimizer_options": {"m": 3}}  # 3 and 4, not 3, 3 and 1
    lines = quick(**keys, **sevens, rounds=1).folder / "metrics.jsonl"
    assert "left_out" not in json.loads(lines.read_text().splitlines()[-1])
    with pytest.raises(UsageError, match="sub-batches of 1: the BatchNorm of --model needs 2"):
        quick(**keys, minimizer_options={"m": 1})


def test_grey_images_for_a_network_of_three_channels_are_told_so():
    with pytest.raises(UsageError, match="takes images of 3 channels, those of digits have 1"):
        trainer_with("torchvision.models:resnet18")


def test_whole_numbers_are_kept_or_refused():
    _, first = made("Counting")
    assert first.layout.read(first.state)["count"] == 2**24
    with pytest.raises(UsageError, match=r"'count' holds torch.int64 numbers that torch.float32"):
        made("Counting", model_options={"count": 2**24 + 1})


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"augment": "scale(1,1,6,8)"},
            "--model {}:Base: cannot take images of 1 x 8 x 8 in eval mode: mat1 and mat2",
        ),
        (
            {"augment": "scale(1,1,6,8)", "client_rotations": "0,90"},
            "--client-rotations 0,90: images of 6 x 8 pixels cannot be turned on their side",
        ),
        ({"augment": "scale(1,1,4,8)", "cutout": 5}, "--cutout 5: the images' side is 4 pixels"),
        (
            {"dataset": "digit-scenes", "model": "scenes-cnn", "augment": "scale(0.5,1,7,8)"},
            "images of 7 x 8: sides must be divisible by 2",
        ),
    ],
)
def test_a_window_that_does_not_fit_is_one_line(keys, said):
    with pytest.raises(UsageError) as refused:
        trainer_with(**{"model": "Base"} | keys)
    assert said.format(HERE) in str(refused.value)
    assert "\n" not in str(refused.value)


def wide():
    """Images of 6 x 8 pixels."""
    images = torch.arange(20 * 48, dtype=torch.int64).remainder(255).view(20, 1, 6, 8).byte()
    labels = torch.arange(20) % 10
    return Dataset("wide", images, labels, images, labels, 10, (0.5,), (0.5,))


def test_a_square_window_of_wide_images_may_be_turned():
    keys = {"dataset": f"{HERE}:wide", "clients": 4, "partition": "iid", "client_rotations": "0,90"}
    with pytest.raises(UsageError, match="images of 6 x 8 pixels cannot be turned"):
        trainer_with("OfAnySize", **keys)
    trainer = trainer_with("OfAnySize", augment="scale(1,1,6,6)", **keys)
    assert trainer.train.batch(trainer.plan(1, 1), 0).images.shape[-2:] == (6, 6)
