"""Compiled steps: the numbers of the plain ones for every method, one program for all clients."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from cohorts import (
    EVERYTHING,
    assert_same,
    convolutions,
    one_by_one,
    start_of,
    trainer_of,
    vectors_of,
)
from conftest import combined
from fedsam.clients.corrections.fedavg import FedAvg
from fedsam.clients.corrections.fedprox import FedProx
from fedsam.clients.losses.pgd_at import PGDAT
from fedsam.clients.losses.plain import Plain
from fedsam.clients.losses.trades import TRADES
from fedsam.clients.minimizers.asam import ASAM
from fedsam.clients.minimizers.late import Late
from fedsam.clients.minimizers.lookbehind import Lookbehind
from fedsam.clients.minimizers.m_sam import MSAM
from fedsam.clients.minimizers.sam import SAM
from fedsam.clients.minimizers.sgd import SGD
from torch import nn

from fedsam.base.errors import UsageError
from fedsam.compiled.convolution import convolution, convolution_backward
from fedsam.compiled.steps import FOLDER, CompiledSteps, prepare_compiler
from fedsam.config import plugins
from fedsam.config.schema import resolve
from fedsam.data.augment import Keys
from fedsam.data.plan import Work
from fedsam.simulate.build import steps as building
from fedsam.simulate.build.method import new_method
from fedsam.simulate.build.trainer import new_trainer
from fedsam.training.client import ClientJob
from fedsam.training.method import Method, Minimizer

MINIMIZERS = plugins.names("fedsam.clients.minimizers")
CLIENTS = plugins.names("fedsam.clients.corrections")
SOME = combined(MINIMIZERS, CLIENTS, plain=("sgd", "fedavg"), more=0)
WORK = replace(EVERYTHING, batch_size=9)  # of 16 images: 9 and 7, so one program
OPTIONS = {"late": {"then": "vasso", "start": 1}, "looksam": {"k": 3}, "m_sam": {"m": 3}}


def as_traced(graph, inputs):
    """Compute a step by the operations that were written down: what the compiler is given."""
    return graph


def with_steps(trainer, backend=as_traced):
    width = max(trainer.work.cut(int(trainer.partition.sizes.max())))
    steps = CompiledSteps(
        trainer.new_module(), trainer.task, width, bf16=trainer.bf16, backend=backend
    )
    return replace(trainer, compiled=steps)


def assert_compiled_is_plain(trainer, rounds=(1,), clients=(2, 0), backend=as_traced):
    """Assert that ragged clients end where they end without compiled steps."""
    compiled, state = with_steps(trainer, backend), start_of(trainer)
    before = state.clone()
    for round in rounds:
        jobs = [
            ClientJob(client, state, round, 0.02 / round, *vectors_of(trainer, round * client))
            for client in clients
        ]
        ours, plain = (one_by_one([t] * len(jobs), jobs) for t in (compiled, trainer))
        assert_same(ours, plain)
    assert compiled.compiled.refused == ""
    assert torch.equal(state, before)
    return compiled.compiled


@pytest.mark.parametrize(("minimizer", "client"), SOME)
def test_every_method_ends_where_its_plain_steps_end(minimizer, client):
    """Momentum, decay, every augmentation, ragged clients, both sides of a switch; float64."""
    keys = {"minimizer": minimizer, "minimizer_options": OPTIONS.get(minimizer, {}), "rounds": 2}
    base = {"client": client, "rho": 0.1, "eta": 0.2, "momentum": 0.9, "weight_decay": 0.01}
    trainer = trainer_of(new_method(resolve(keys | base)), work=WORK)
    steps = assert_compiled_is_plain(trainer, rounds=(1, 2) if minimizer == "late" else (2,))
    assert len(steps._programs) == (2 if minimizer == "late" else 1)


@pytest.mark.parametrize(
    "method",
    [
        Method(ASAM(0.2, 0.1, filterwise=True), FedProx(0.1), 0.9, 0.01, "nesterov", loss=Plain()),
        Method(Lookbehind(SAM(0.1), slow=-1), FedAvg(), 0, 0.01, "adamw", loss=Plain()),
        Method(MSAM(0.1, 3), FedAvg(), 0.9, 0.1, decay_in_loss=True, loss=Plain()),
        Method(SAM(0.1), FedAvg(), clip_gradient=0.1, loss=Plain()),
    ],
    ids=["nesterov", "adamw", "decay in the loss", "clipped"],
)
def test_base_optimisers_and_options(method):
    assert_compiled_is_plain(trainer_of(method, work=WORK))


@pytest.mark.parametrize("loss", [PGDAT(9, steps=2), TRADES(9, steps=2)], ids=["pgd_at", "trades"])
def test_adversarial_losses(loss):
    assert_compiled_is_plain(
        trainer_of(Method(SGD(), FedAvg(), loss=loss), work=Work(9, augmentations=(Keys(),)))
    )


def test_a_models_buffers_are_those_that_the_client_began_with():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = convolutions()
            self.register_buffer("scale", torch.tensor([2.0], dtype=torch.float64))
            self.register_buffer("table", torch.tensor([1, 2]))

        def forward(self, images):
            return self.inner(images) * self.scale * self.table[1]

    trainer = trainer_of(module=Scaled)
    compiled, other = with_steps(trainer), start_of(trainer).clone()
    other[trainer.layout.trainable] = 0.25  # the scale, of another round
    for state in (start_of(trainer), other):
        jobs = [ClientJob(client, state, 1, 0.02) for client in range(5)]
        assert_same(one_by_one([compiled] * 5, jobs), one_by_one([trainer] * 5, jobs))
    assert compiled.compiled.refused == ""


def test_mini_batches_have_few_lengths_and_methods_one_program_each():
    """Of 16 images, and halves of it; nothing is traced again for rate, round or step."""
    seen = []

    def backend(graph, inputs):
        seen.append([len(t) for t in inputs if t.dtype == torch.bool])
        return graph

    method = Method(Late(SGD(), SAM(0.1), 4, start=2), FedAvg(), loss=Plain())
    trainer = trainer_of(method, work=Work(16))  # mini-batches of 1, 4, 9, 14 and 16
    assert_compiled_is_plain(trainer, rounds=(1, 2, 3, 4), clients=(4, 1, 0, 3, 2), backend=backend)
    lengths = [max(lengths) for lengths in seen]
    assert sorted(lengths) == [1, 1, 4, 4, 16, 16]  # SGD's, then SAM's


def test_threads_compile_each_program_once():
    made, trainer = [], trainer_of(Method(SAM(0.1), FedAvg(), loss=Plain()), work=WORK)

    def backend(graph, inputs):
        made.append(threading.get_ident())
        return graph

    compiled = with_steps(trainer, backend)
    jobs = [ClientJob(client, start_of(trainer), 1, 0.1) for client in (2, 0, 2, 0)]

    def train(job):
        return compiled.train_client(compiled.new_network(), job)

    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(train, jobs))
    assert_same(done, [trainer.train_client(trainer.new_network(), job) for job in jobs])
    assert len(made) == len(compiled.compiled._programs)


class Counting(Minimizer):
    """Walks further with each step that it takes: it keeps in Python what no step returns."""

    def __init__(self):
        self.steps = 0

    def step(self, w, grad, descend, local):
        self.steps += 1
        return descend(w, self.steps * grad(w)), {}


class Looking(Minimizer):
    """Looks at a number, which a tracer has not."""

    def step(self, w, grad, descend, local):
        g = grad(w)
        return (descend(w, g) if float(g.sum()) > 0 else w), {}


class Fresh(Minimizer):
    """Is another one in each round."""

    def at(self, round):
        return Fresh()

    def step(self, w, grad, descend, local):
        return descend(w, grad(w)), {}


class Mixing(nn.Module):
    """Looks at all images of a mini-batch together."""

    def __init__(self):
        super().__init__()
        self.inner = convolutions()

    def forward(self, images):
        return self.inner(images - images.mean(0))


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"method": Method(Looking(), FedAvg(), loss=Plain())}, "data"),
        ({"method": Method(Counting(), FedAvg(), loss=Plain())}, "memory of its own"),
        ({"module": Mixing}, "mixes images"),
    ],
    ids=["looks", "counts", "mixes"],
)
def test_what_cannot_be_compiled_is_trained_plainly_and_said_once(caplog, more, why):
    trainer = trainer_of(**more, work=WORK)
    compiled = with_steps(trainer)
    jobs = [ClientJob(client, start_of(trainer), 1, 0.1) for client in (2, 0)]
    with caplog.at_level(logging.WARNING, "fedsam"):
        for job in jobs:
            compiled.train_client(compiled.new_network(), job)
    (line,) = [record.message for record in caplog.records]
    assert line.startswith("compile: steps stay as they are: ")
    assert why in compiled.compiled.refused.lower()
    if why != "memory of its own":  # that one counts on
        assert_same(one_by_one([compiled] * 2, jobs), one_by_one([trainer] * 2, jobs))


def test_a_method_that_is_new_in_every_round_is_not_compiled_for_ever(monkeypatch):
    monkeypatch.setattr("fedsam.compiled.steps.PROGRAMS", 2)
    trainer = trainer_of(Method(Fresh(), FedAvg(), loss=Plain()), work=Work(64))
    compiled = with_steps(trainer)
    for round in range(1, 5):
        job = ClientJob(0, start_of(trainer), round, 0.1)
        compiled.train_client(compiled.new_network(), job)
    assert "each round has its own" in compiled.compiled.refused
    assert len(compiled.compiled._programs) == 2


@pytest.mark.parametrize("padding", [(0, 0), (1, 2), (2, 0)])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 2), (2, 5)])
def test_convolutions_as_matrix_products(kernel, padding):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 4, 6, 7).double(), torch.randn(5, 4, *kernel).double()
    rest = ((1, 1), padding, (1, 1), False, (0, 0), 1)
    ours = convolution(x, weight, torch.arange(5.0).double(), *rest)
    wanted = nn.functional.conv2d(x, weight, torch.arange(5.0).double(), padding=padding)
    torch.testing.assert_close(ours, wanted)
    g = torch.randn_like(wanted)
    back = convolution_backward(g, x, weight, (5,), *rest, (True, True, True))
    theirs = torch.ops.aten.convolution_backward(g, x, weight, (5,), *rest, (True, True, True))
    for one, other in zip(back, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "rest",
    [
        ((2, 2), (0, 0), (1, 1), False, (0, 0), 1),
        ((1, 1), (0, 0), (2, 2), False, (0, 0), 1),
        ((1, 1), (0, 0), (1, 1), True, (0, 0), 1),
        ((1, 1), (0, 0), (1, 1), False, (0, 0), 2),
    ],
    ids=["stride", "dilation", "transposed", "groups"],
)
def test_other_convolutions_stay_the_librarys(rest):
    x, weight = torch.zeros(1, 4, 6, 6), torch.zeros(4, 4, 3, 3)
    assert convolution(x, weight, None, *rest) is NotImplemented
    large = torch.zeros(64, 64, 14, 14, device="meta"), torch.zeros(64, 64, 5, 5, device="meta")
    plain = ((1, 1), (0, 0), (1, 1), False, (0, 0), 1)
    assert convolution(*large, None, *plain) is NotImplemented


def test_short_runs_and_what_is_random_say_why_not(monkeypatch):
    config = resolve({"compile": True, "rounds": 3, "out": ""})
    trainer, _ = new_trainer(config)
    assert trainer.compiled is None
    assert building.why_not_compiled(config, trainer) == (
        "a run of 30 steps ends before it pays, from 50,000"
    )
    monkeypatch.setattr(building, "PAYS_FROM", 30)
    assert building.why_not_compiled(config, trainer) == ""
    drawing = replace(trainer, draws=True)
    assert "dropout" in building.why_not_compiled(config, drawing)
    cohort = config.model_copy(update={"cohort": "slots"})
    assert "--cohort" in building.why_not_compiled(cohort, trainer)


def test_a_folder_that_cannot_be_written_and_no_compiler_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv(FOLDER, str(tmp_path / "file" / "below"))
    with pytest.raises(UsageError, match=f"--compile: cannot write to .*below; let {FOLDER} name"):
        prepare_compiler(torch.device("cpu"))
    monkeypatch.delenv(FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, "no-such-compiler"))
    with pytest.raises(UsageError, match="--compile: there is no C\\+\\+ compiler; install g"):
        prepare_compiler(torch.device("cpu"))
    assert (tmp_path / "cache" / "fedsam" / "compiled").is_dir()
