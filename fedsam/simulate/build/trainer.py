"""All that clients need, put together from the Config: Config -> Trainer."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedsam import tasks
from fedsam.base.errors import UsageError
from fedsam.base.randomness import torch_generator
from fedsam.base.vector import Layout, is_frozen
from fedsam.config import plugins
from fedsam.config.schema import Config
from fedsam.data import lifelong
from fedsam.data.datasets import Dataset
from fedsam.data.images import Batch, Images, images_of
from fedsam.data.partition import Partition
from fedsam.data.partitions.held_out import hold_out
from fedsam.data.plan import Work, make_plan
from fedsam.data.store import Store
from fedsam.messages import VectorRecord
from fedsam.models.pretrained.lora import Lora, LoraOptions, train_partly
from fedsam.models.pretrained.weights import checksum, load_weights
from fedsam.simulate.build.data import load_dataset, split
from fedsam.simulate.build.method import new_method
from fedsam.simulate.build.model import new_model
from fedsam.simulate.build.steps import with_compiled_steps
from fedsam.simulate.build.work import check_work, new_work
from fedsam.simulate.groups import beside_groups, test_groups
from fedsam.tasks import Task
from fedsam.training import batchnorm
from fedsam.training.client import Beside, Trainer
from fedsam.training.dry_pass import dry_pass
from fedsam.training.flat_module import FlatModule, replica


def new_trainer(
    config: Config, like: Trainer | None = None, *, saved: bool = False
) -> tuple[Trainer, VectorRecord]:
    """Return all that the clients need, and the model that training starts from.

    Parameters
    ----------
    config : Config
        What to run.
    like : Trainer, optional
        One with the same images, which are shared then.
    saved : bool
        Make the network for a model that the run has left: its file holds what --weights said, and
        LoRA's products in their weights, which count as trainable.
    """
    held = hold_out(load_dataset(config), config.leave_out, config.validation)
    dataset = held.dataset
    task = new_task(config, dataset)
    partition = split(config, dataset, held.places)
    device = choose_device(config)
    module = new_model(config, dataset)
    if config.weights and not saved:
        load_weights(module, config.weights, dataset.classes, config.weights_sha256)
    if config.train or config.lora:
        options = plugins.build("lora", LoraOptions, config.lora_options)
        lora = Lora(config.lora, config.lora_targets, options)
        train_partly(module, config.train, lora, torch_generator(config.seed, "lora"), saved=saved)
    _check_norms(config, module)
    initial = {
        name: tensor.detach().clone()
        for name, tensor in module.state_dict(keep_vars=True).items()
        if not is_frozen(tensor)
    }
    template = module.to(device)
    layout = Layout.of(template)
    method = new_method(config)
    if method.loss.one_answer and len(dataset.train_labels.shape) != 1:
        raise UsageError(
            f"--loss {config.loss}: needs one label an image; {dataset.name} has masks"
        )
    work = new_work(config, dataset, draws=method.loss.draws)
    check_work(config, work, partition)
    mean, std = _normalisation(config, dataset)
    sequence = _lifelong(config, dataset, partition)
    if sequence and sequence.heads == "multi":
        task = lifelong.Heads(task, sequence.task_of.to(device))

    def images(
        pixels: Tensor | Store, labels: Tensor | Store, classes: Tensor, padding: int = 0
    ) -> Images:
        return images_of(
            pixels,
            labels,
            mean,
            std,
            padding=padding,
            dtype=layout.dtype,
            device=device,
            classes=classes,
            outside=255 if dataset.ignore is None else dataset.ignore,
        )

    train, test = (
        (like.train, like.test)
        if like
        else (
            images(
                dataset.train_images, dataset.train_labels, dataset.classes_of_train, work.padding
            ),
            images(dataset.test_images, dataset.test_labels, dataset.classes_of_test),
        )
    )
    beside = like.beside if like else None
    if held.beside and not like:
        pixels, targets, classes, _ = held.beside
        beside = Beside(
            images(pixels, targets, targets if classes is None else classes),
            beside_groups(config, held),
        )
    needs = dry_pass(
        FlatModule(replica(template), bf16=config.precision == "bf16"),
        task,
        _as_trained_on(train, work, config.seed),
        test.rows(torch.arange(2, device=device) % len(test)),
        dataset.classes if task_of(config, dataset) == "classification" else 0,
        config.model,
    )
    _check_mini_batches(config, partition, needs.least, work.copies)
    trainer = Trainer(
        train,
        test,
        partition,
        lambda: replica(template),
        layout,
        replace(method, least=needs.least),
        task,
        replace(work, least=needs.least),
        config.seed,
        precision=config.precision,
        draws=needs.draws,
        changes=needs.changes,
        stragglers=config.stragglers,
        lifelong=sequence,
        groups=test_groups(config, dataset),
        beside=beside,
        local_statistics=config.bn == "local",
        debug=config.debug,
    )
    first = layout.write(initial)
    for name, entry in layout.read(first).items():
        if not torch.equal(entry.cpu(), initial[name]):
            raise UsageError(
                f"--model {config.model}: {name!r} holds {initial[name].dtype} numbers that "
                f"{layout.dtype}, the model's, cannot; register it with persistent=False"
            )
    return with_compiled_steps(config, trainer), VectorRecord(layout, first)


def pinned(config: Config) -> Config:
    """Return the config with the checksum that its file of weights has today."""
    if not config.weights or config.weights_sha256:
        return config
    return config.model_copy(update={"weights_sha256": checksum(config.weights)})


def choose_device(config: Config) -> torch.device:
    """Return the device to train on."""
    name: str = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {config.device}: must be auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {config.device}: must be auto, cpu, cuda or cuda:N")
    if config.precision == "tf32" and device.type != "cuda":
        raise UsageError("--precision tf32: only a GPU has it; give fp32 or bf16")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UsageError(f"--device {config.device}: PyTorch sees {count} CUDA devices; try cpu")
    return device


def task_of(config: Config, dataset: Dataset) -> str:
    """Return the name of the task, the data set's own unless the config names one."""
    return dataset.task if config.task == "auto" else config.task


def new_task(config: Config, dataset: Dataset) -> Task:
    """Return what the model's output means, for a data set whose targets fit."""
    facts = {"classes": dataset.classes}
    facts |= {} if dataset.ignore is None else {"ignore": dataset.ignore}
    make = plugins.find("task", task_of(config, dataset), "fedsam.tasks", Task)
    task: Task = plugins.build("task", make, config.task_options, facts)
    tasks.check(task, dataset)
    return task


def _lifelong(config: Config, dataset: Dataset, partition: Partition) -> lifelong.Lifelong | None:
    """Return which classes are learnt when, where that is asked for."""
    if not config.lifelong:
        return None
    if len(dataset.train_labels.shape) != 1:
        raise UsageError(
            f"--lifelong {config.lifelong}: needs one label an image; {dataset.name} has masks"
        )
    made: lifelong.Lifelong = plugins.build(
        "lifelong",
        lifelong.lifelong,
        config.lifelong_options,
        {"ends": config.task_ends, "labels": dataset.train_labels, "classes": dataset.classes},
    )
    lifelong.check(made, partition, dataset.test_labels, config.min_clients)
    return made


def _normalisation(config: Config, dataset: Dataset) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel, as --normalize says."""
    channels = len(dataset.mean)
    if config.normalize == "dataset":
        return dataset.mean, dataset.std
    if config.normalize == "half":
        return (0.5,) * channels, (0.5,) * channels
    return (0.0,) * channels, (1.0,) * channels


def _as_trained_on(train: Images, work: Work, seed: int) -> Batch:
    """Return a mini-batch of two images (of one, twice) as clients see them."""
    rows = torch.arange(2) % len(train)
    two = Work(len(rows), augmentations=work.augmentations).of(0)
    plan = make_plan(rows, two, (train.height, train.width), torch_generator(seed, "dry pass"))
    return train.batch(plan.to(train.padded.device), 0)


def _check_norms(config: Config, module: nn.Module) -> None:
    """Raise UsageError where statistics are asked for that the model has not, or frozen."""
    if batchnorm.layers(module):
        return
    frozen = any(isinstance(layer, _BatchNorm) for layer in module.modules())
    why = "no BatchNorm that trains: --train leaves all frozen" if frozen else "no BatchNorm"
    if config.bn != "values":
        raise UsageError(f"--bn {config.bn}: the model has {why}")
    if config.update_bn:
        raise UsageError(f"--update-bn {config.update_bn}: the model has {why}")


def _check_mini_batches(config: Config, partition: Partition, least: int, copies: int) -> None:
    """Raise UsageError where a client has too few images for the model's BatchNorm."""
    if least == 1:
        return
    if config.batch_size < least:
        raise UsageError(f"--batch-size 1: the BatchNorm of --model {config.model} needs 2")
    if few := int((partition.sizes * copies < least).sum()):
        raise UsageError(
            f"--model {config.model}: its BatchNorm cannot train on one image, and {few} of "
            f"{config.clients} clients hold fewer than {least}; give fewer --clients or another "
            "norm"
        )
