"""The loss as a function of w: against autograd's dense Hessian in float64."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian

from fedsam.base.errors import UsageError
from fedsam.data.images import Images
from fedsam.flatness.objective import Objective
from fedsam.flatness.subject import subject_of_network
from fedsam.tasks.classification import Classification
from fedsam.training.flat_module import FlatModule


class Net(nn.Module):
    """A convolution with BatchNorm, smooth, 56 parameters."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.fc = nn.Linear(8, 3)

    def forward(self, images):
        return self.fc(torch.tanh(self.norm(self.conv(images))).flatten(1))


@pytest.fixture
def objective():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (23, 1, 4, 4), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 3, (23,), generator=generator)
    images = Images(pixels, labels, (0.4,), (0.3,), dtype=torch.float64)
    network = FlatModule(Net().double())
    state = torch.rand(network.layout.size, generator=generator, dtype=torch.float64)
    return Objective(network, state, Classification(), images, chunk=7)


def dense(objective):
    """Loss, gradient and Hessian of the same by torch.func, all images at once."""
    layout, batch = objective.layout, objective.images.rows(objective.rows)
    module, buffers = Net().double().eval(), objective._state.clone()

    def loss(w):
        state = torch.cat([w, buffers[layout.trainable :]])
        tensors = layout.read(buffers) | {e.name: e.view(state) for e in layout.parameters}
        output = functional_call(module, tensors, (batch.images,))
        return nn.functional.cross_entropy(output, batch.targets)

    return loss, torch.func.grad(loss)(objective.w), hessian(loss)(objective.w)


def test_loss_gradient_and_curvature_are_those_of_autograd(objective):
    loss, g, H = dense(objective)
    w, v = objective.w, torch.linspace(-1, 1, len(objective.w), dtype=torch.float64)
    torch.testing.assert_close(objective.loss(w), loss(w), rtol=1e-12, atol=0)
    torch.testing.assert_close(objective.gradient(w), g, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(objective.curvature(w, v), H @ v, rtol=1e-9, atol=1e-12)
    there = w + 0.1 * v
    torch.testing.assert_close(objective.loss(there), loss(there), rtol=1e-12, atol=0)


def test_chunks_and_what_was_looked_at_before_do_not_matter(objective):
    w = objective.w.clone()
    first, g = objective.loss(w), objective.gradient(w)
    objective.gradient(w + 1)
    objective.chunk = 5
    torch.testing.assert_close(objective.loss(w), first, rtol=1e-14, atol=0)
    torch.testing.assert_close(objective.gradient(w), g, rtol=1e-12, atol=1e-14)
    assert torch.equal(objective.w, w)


def test_metrics_are_of_the_rows_that_count(objective):
    rows = torch.tensor([3, 8, 9, 20])
    some = Objective(
        objective.network, objective._state, objective.task, objective.images, rows, chunk=3
    )
    batch = objective.images.rows(rows)
    objective.network.load(objective._state)
    objective.network.module.eval()
    output = objective.network.forward(batch.images)
    expected = (output.argmax(-1) == batch.targets).double().mean().item()
    assert some.metrics(some.w)["accuracy"] == expected
    assert some.metrics(some.w)["loss"] == pytest.approx(some.loss(some.w).item(), rel=1e-12)
    assert len(some) == 4


def test_a_client_without_images_is_refused():
    pixels, labels = torch.zeros(4, 1, 4, 4, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    clients = [torch.arange(4), torch.arange(0)]
    with pytest.raises(UsageError, match="clients: client 1 holds no images"):
        subject_of_network(Net(), (pixels, labels), mean=(0.4,), std=(0.3,), clients=clients)
