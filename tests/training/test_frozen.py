"""Parameters without requires_grad: held by the module, never trained, sent, averaged or kept."""

import copy

import pytest
import torch
from cohorts import ENGINES, PLAIN, Work, as_cohort, assert_same, one_by_one, start_of, trainer_of
from conftest import quick_config
from fedsam.clients.corrections.fedavg import FedAvg
from fedsam.clients.losses.plain import Plain
from fedsam.clients.minimizers.asam import ASAM
from flwr.app import ConfigRecord, RecordDict
from safetensors.torch import load_file, save_file
from torch import nn

import fedsam
from fedsam.base.errors import UsageError
from fedsam.base.vector import Layout, digest
from fedsam.engines.codec import job_of
from fedsam.flatness.subject import subject_of_run
from fedsam.messages import CONFIG, FROZEN, LEARNING_RATE, ROUND, VectorRecord, plain_record
from fedsam.runs import checkpoint
from fedsam.simulate.joint import run_together
from fedsam.simulate.resume import resumed
from fedsam.simulate.run import run
from fedsam.training.client import ClientJob
from fedsam.training.flat_module import FlatModule, replica
from fedsam.training.method import Method

HERE = "test_frozen"
NAMES = {"0.weight", "0.bias"}


def features():
    """A convolution that is frozen, another one and a linear layer that are not, in float64."""
    torch.manual_seed(2)
    layers = [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 2, padding=1), nn.Flatten()]
    module = nn.Sequential(*layers, nn.Linear(3 * 49, 3)).double()
    module[0].requires_grad_(False)
    return module


class Random(nn.Module):
    """Frozen random features of a run's digits, and a linear layer."""

    def __init__(self, shape, classes):
        super().__init__()
        self.features = nn.Linear(64, 24).requires_grad_(False)
        self.norm = nn.BatchNorm1d(24)
        self.head = nn.Linear(24, classes)

    def forward(self, images):
        return self.head(self.norm(torch.relu(self.features(images.flatten(1)))))


class Plainly(Random):
    """The same without a norm, which no cohort can be trained with."""

    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.norm = nn.Identity()


class Momentum(Random):
    """A copy of the features that its forward pass keeps up to date."""

    def forward(self, images):
        with torch.no_grad():
            self.features.weight.mul_(0.9)
        return super().forward(images)


def test_a_layout_holds_no_frozen_element_and_reads_all(tmp_path):
    module = features()
    layout = Layout.of(module)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert layout.trainable == layout.size == trained
    assert set(layout.frozen) == NAMES
    back = layout.whole(layout.write(module.state_dict()))
    assert back.keys() == module.state_dict().keys()
    for name, tensor in module.state_dict().items():
        assert torch.equal(back[name], tensor)
    record = VectorRecord(layout, layout.write(module.state_dict()))
    assert set(record) == set(module.state_dict()) - NAMES
    assert sum(array.numpy().size for array in plain_record(record).values()) == trained


def test_the_digest_is_of_names_and_values():
    a = {"one": torch.tensor(1.0), "two": torch.arange(3)}
    assert digest(a) == digest(dict(reversed(a.items()))) != digest({})
    assert digest({}) == ""
    others = ({"one": torch.tensor(1.5)}, {"two": torch.arange(3).double()}, {"two": a["one"]})
    assert len({digest(a), *(digest(a | other) for other in others)}) == 4
    assert Layout.of(features()).digest == Layout.of(features()).digest


def test_copies_share_what_is_frozen_and_nothing_else():
    module = features()
    copied = replica(module)
    for name, parameter in copied.named_parameters():
        shared = parameter.data_ptr() == module.get_parameter(name).data_ptr()
        assert shared == (name in NAMES)


@ENGINES
def test_a_step_leaves_it_as_it_is_one_by_one_and_as_a_cohort(gradients):
    method = Method(ASAM(0.5, 0.2), FedAvg(), momentum=0.9, weight_decay=0.01, loss=Plain())
    trainer = trainer_of(method, module=features, work=Work(4))
    start = start_of(trainer)
    jobs = [ClientJob(client, start, 1, 0.1) for client in range(5)]
    alone = one_by_one([trainer] * 5, jobs)
    assert_same(as_cohort([trainer] * 5, jobs, gradients), alone)
    assert all(not torch.equal(result.state, start) for result in alone)
    network = trainer.new_network()
    before = digest(network.layout.frozen)
    trainer.train_client(network, jobs[2])
    assert digest(network.layout.frozen) == before == Layout.of(features()).digest


def test_the_gradient_is_that_of_autograd():
    module = features()
    untouched, network = copy.deepcopy(module), FlatModule(module)
    x = torch.randn(5, 2, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    _, g = network.gradient(network.w.clone(), lambda model: model.forward(x).square().mean())
    untouched(x).square().mean().backward()
    for entry in network.layout.parameters:
        grad = untouched.get_parameter(entry.name).grad
        torch.testing.assert_close(entry.view(g), grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    "settings", [{}, {"average": "swa", "swa_start": 1, "swa_cycle": 1, "strategy": "fedadam"}]
)
def test_a_run_trains_the_rest_and_leaves_the_whole_model(quick, settings):
    out = quick(model=f"{HERE}:Random", save_every=2, **settings).folder
    tensors = load_file(out / "model.safetensors")
    assert tensors["features.weight"].shape == (24, 64)
    by_round = load_file(out / "models/000002.safetensors")
    assert torch.equal(by_round["features.weight"], tensors["features.weight"])
    assert not torch.equal(by_round["head.weight"], tensors["head.weight"])
    kept = checkpoint.load(out)
    assert kept.tensors["model"].numel() == 24 * 10 + 10 + 2 * 24 + 2 * 24 + 1
    left = fedsam.load(out)
    assert left.summary["parameters"] == 24 * 10 + 10 + 2 * 24
    module = left.model()
    assert torch.equal(module.features.weight, tensors["features.weight"])
    subject = subject_of_run(out)
    images = subject.test.rows(torch.arange(40)).images
    subject.network.load(subject.state)
    with subject.network.evaluating():
        torch.testing.assert_close(subject.network.forward(images), module(images))


def test_a_measure_takes_the_frozen_values_of_the_file(quick):
    out = quick(model=f"{HERE}:Random").folder
    tensors = load_file(out / "model.safetensors")

    save_file(
        tensors | {"features.bias": tensors["features.bias"] + 1}, out / "models-x.safetensors"
    )
    subject = subject_of_run(out, "models-x")
    assert torch.equal(subject.network.module.features.bias, tensors["features.bias"] + 1)


def test_a_run_that_is_resumed_ends_as_if_it_had_never_stopped(quick):
    whole = quick(model=f"{HERE}:Random", rounds=6).folder
    half = quick(model=f"{HERE}:Random", rounds=3).folder
    config, snapshot = resumed(half, {"rounds": 6})
    run(config, snapshot=snapshot)
    assert (half / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_cohort_as_one_program_trains_the_same(quick):
    models = [
        load_file(quick(model=f"{HERE}:Plainly", cohort=cohort).folder / "model.safetensors")
        for cohort in ("off", "slots", "vmap")
    ]
    for other in models[1:]:
        torch.testing.assert_close(other, models[0])


def test_a_forward_pass_that_writes_into_it_is_refused(quick):
    with pytest.raises(UsageError, match="writes into parameters without requires_grad"):
        quick(model=f"{HERE}:Momentum")


def test_a_node_with_other_frozen_parameters_says_so():
    layout = Layout.of(features())
    arrays = plain_record(VectorRecord(layout, layout.write(features().state_dict())))

    def content(**more):
        config = ConfigRecord({ROUND: 1, LEARNING_RATE: 0.1, **more})
        return RecordDict({"arrays": arrays, CONFIG: config})

    assert job_of(content(), layout, 0, None).round == 1
    assert job_of(content(**{FROZEN: layout.digest}), layout, 0, None).round == 1
    with pytest.raises(UsageError, match="the frozen parameters are not the server's"):
        job_of(content(**{FROZEN: "0" * 64}), layout, 0, None)


def test_runs_of_other_frozen_parameters_share_no_program(tmp_path):
    configs = [
        quick_config(tmp_path / str(seed), model=f"{HERE}:Plainly", seed=seed, cohort="slots")
        for seed in (0, 1)
    ]
    with pytest.raises(UsageError, match="--seed 1: the frozen parameters of run 1 are not those"):
        run_together(configs)
    assert not list(tmp_path.iterdir())


def test_plain_methods_have_no_digest():
    assert Layout.of(trainer_of(PLAIN).new_module()).digest == ""
