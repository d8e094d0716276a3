"""Five clients of a small network in float64, trained one by one and as a cohort."""

import itertools

import pytest
import torch
from fedsam.clients.corrections.fedavg import FedAvg
from fedsam.clients.losses.plain import Plain
from fedsam.clients.minimizers.sgd import SGD
from torch import nn

from fedsam.base.vector import Layout
from fedsam.data.augment import Crop, Cutout, Flip, Mixup
from fedsam.data.images import Images
from fedsam.data.partition import Partition
from fedsam.data.plan import Work
from fedsam.tasks.classification import Classification
from fedsam.training.batched import Program
from fedsam.training.batched_gradient import Slots, Vmapped
from fedsam.training.client import Trainer
from fedsam.training.method import Method

ENGINES = pytest.mark.parametrize("gradients", [Slots, Vmapped], ids=["slots", "vmap"])
DEVICES = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], ids=str
)
PLAIN = Method(SGD(), FedAvg(), loss=Plain())
EVERYTHING = Work(4, local_epochs=2.0, augmentations=(Crop(1), Flip(), Cutout(2), Mixup(1.0)))
PIXELS = torch.randint(
    0, 256, (60, 2, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)
)
LABELS = torch.arange(60) % 3
SIZES = (9, 1, 16, 4, 30)  # two epochs in mini-batches of 4: 6, 2, 8, 2 and 16 steps


def convolutions(*more):
    torch.manual_seed(2)
    layers = [nn.Conv2d(2, 4, 3), *more, nn.ReLU(), nn.Conv2d(4, 3, 2, padding=1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(3 * 49, 3)).double()


def trainer_of(method=PLAIN, *, module=convolutions, work=EVERYTHING, device="cpu", seed=1):
    """A run over five clients of very different sizes, in float64."""
    template = module().to(device)
    offsets = torch.tensor([0, *itertools.accumulate(SIZES)])
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    images = Images(
        PIXELS,
        LABELS,
        (0.4, 0.5),
        (0.2, 0.3),
        padding=work.padding,
        dtype=torch.float64,
        device=device,
    )
    return Trainer(
        images,
        images,
        Partition(order, offsets),
        lambda: module().to(device),
        Layout.of(template),
        method,
        Classification(),
        work,
        seed,
    )


def start_of(trainer, seed=5):
    """A state off the initial one, so that anchors and weights differ from the module's own."""
    state = trainer.new_network().state.cpu()
    noise = torch.randn(
        len(state), dtype=state.dtype, generator=torch.Generator().manual_seed(seed)
    )
    return (state + 0.05 * noise).to(trainer.layout.device)


def vectors_of(trainer, seed):
    """Something for a client to remember, and something sent; seed 0: nothing yet."""
    generator = torch.Generator().manual_seed(seed)
    vectors = [
        {
            name: 0.1 * torch.randn(trainer.layout.trainable, generator=generator).double()
            for name in names
        }
        for names in (trainer.method.memory, trainer.method.exchanged)
    ]
    device = trainer.layout.device
    return [{n: v.to(device) for n, v in named.items()} if seed else None for named in vectors]


def one_by_one(trainers, jobs):
    return [t.train_client(t.new_network(), job) for t, job in zip(trainers, jobs, strict=True)]


def as_cohort(trainers, jobs, gradients, program=None):
    capture = trainers[0].layout.device.type == "cuda"
    program = program or Program(trainers, gradients, capture=capture)
    plans = [t.plan(job.client, job.round) for t, job in zip(trainers, jobs, strict=True)]
    program.begin(jobs, plans)
    return program.end()


def assert_same(together, alone):
    for a, b in zip(together, alone, strict=True):
        assert (a.examples, a.steps) == (b.examples, b.steps)
        assert a.loss == pytest.approx(b.loss, rel=1e-10)
        torch.testing.assert_close(a.state, b.state, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close((a.memory, a.reply), (b.memory, b.reply), rtol=1e-8, atol=1e-10)
