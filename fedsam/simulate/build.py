"""The composition root: Config -> data, split, model, method, strategy, actors.

Nothing else in the framework knows them all.
"""

import inspect
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAvg, Strategy
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedsam import tasks
from fedsam.base.errors import UsageError, flag, nearest
from fedsam.base.randomness import global_streams, numpy_generator, torch_generator
from fedsam.base.strategy import Average, ServerMethod
from fedsam.base.system import cores, expanded
from fedsam.base.vector import Layout, is_frozen
from fedsam.config import keys, plugins
from fedsam.config.schema import Config
from fedsam.data import lifelong
from fedsam.data.augment import (
    Augmentation,
    Crop,
    Cutout,
    Double,
    Flip,
    Jitter,
    Keys,
    Mirror,
    Mixup,
    Noise,
    ResizedCrop,
    Rotation,
    Scale,
)
from fedsam.data.datasets import Dataset
from fedsam.data.images import Batch, Images, images_of
from fedsam.data.partition import Partition, check
from fedsam.data.partitions.flower_partitioner import Partitioner, partitioned
from fedsam.data.partitions.held_out import hold_out
from fedsam.data.partitions.saved import saved
from fedsam.data.partitions.splits import METHODS
from fedsam.data.plan import Work, make_plan
from fedsam.data.sources.load import load
from fedsam.data.store import Store
from fedsam.messages import LOSS, VectorRecord
from fedsam.models.pretrained.lora import Lora, LoraOptions, train_partly
from fedsam.models.pretrained.weights import checksum, load_weights
from fedsam.runs import files
from fedsam.server.adapter import MethodStrategy
from fedsam.server.wrapped import Averaged, Statistics
from fedsam.simulate.groups import beside_groups, test_groups
from fedsam.tasks import Task
from fedsam.training import batchnorm
from fedsam.training.batched_gradient import Slots, Vmapped
from fedsam.training.client import Beside, Trainer
from fedsam.training.dry_pass import dry_pass, initialise_lazy_layers
from fedsam.training.flat_module import FlatModule, replica
from fedsam.training.method import Correction, Loss, Method, Minimizer

if TYPE_CHECKING:
    from fedsam.engines.ray import RayExecutor

MODELS = {  # else the paper's cnn
    "digits": "digits-cnn",
    "rotated-digits": "digits-cnn",
    "digit-scenes": "scenes-cnn",
    "camvid": "lraspp",
    "mnist": "mlp",
    "fashion-mnist": "mlp",
}
AUGMENTATIONS = {"cifar10": "crop+flip", "cifar100": "crop+flip", "svhn": "crop"}  # else none
MINIMIZERS = "fedsam.clients.minimizers"
# those of Flower that choose or trim clients' values, or add noise to what they send: a mean beside
# them would let in what they keep out
OWN_STATISTICS = (
    flower.FedMedian
    | flower.FedTrimmedAvg
    | flower.Krum
    | flower.MultiKrum
    | flower.Bulyan
    | flower.DifferentialPrivacyServerSideAdaptiveClipping
    | flower.DifferentialPrivacyServerSideFixedClipping
)
# and those whose clients must do something that ours do not, each with what to do instead
OF_OTHER_CLIENTS: dict[Any, str] = {
    flower.FedProx: "needs clients with a proximal term; give --client fedprox and "
    "--client-options '{mu: 0.01}', with any strategy",
    flower.FedXgbBagging | flower.FedXgbCyclic: "needs clients that grow trees with XGBoost",
    flower.DifferentialPrivacyClientSideAdaptiveClipping
    | flower.DifferentialPrivacyClientSideFixedClipping: "needs clients that clip their updates "
    "themselves; give the server-side one of that name",
}
MOST_IMAGES = 50_000_000  # of a client in a round: its plan has then 0.4 GB
CROP_PADDING = 4  # pixels, as in the paper
WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # PyTorch then unpickles nothing else


@runtime_checkable
class FormerStrategy(Protocol):
    """A strategy of Flower's former API."""

    def configure_fit(self, *arguments: Any, **keywords: Any) -> Any:
        """Return which clients train."""
        ...


def load_dataset(config: Config) -> Dataset:
    """Return the data set, one of ours or the user's."""
    return load(config.dataset, Path(config.data_root), config.dataset_options)


def split(config: Config, dataset: Dataset, places: Tensor | None = None) -> Partition:
    """Return which training images are whose.

    ``places`` (N,) says where the rows of the whole training set are, if some are held out.
    """
    options, labels, clients = config.partition_options, dataset.classes_of_train, config.clients
    method: Any
    if config.partition in METHODS:
        method = METHODS[config.partition]
    elif file := _file_of(config.partition):
        if options:
            raise UsageError(f"--partition-options: {config.partition} is a file and takes none")
        return saved(labels, clients, file, places)
    elif ":" in config.partition:
        method = plugins.imported("partition", config.partition, Partition | Partitioner)
    else:
        raise UsageError(
            f"--partition: no {config.partition!r}{nearest(config.partition, METHODS)}; have "
            f"{', '.join(METHODS)}, a run's folder, a JSON file, or package.module:function"
        )
    seed = config.seed if config.split_seed is None else config.split_seed
    generator = numpy_generator(seed, "partition")
    if inspect.isclass(method) and issubclass(method, Partitioner):
        made = partitioned(method, options, labels, clients, generator, alpha=config.alpha)
    else:
        made = plugins.build(
            "partition",
            method,
            options,
            {
                "labels": labels,
                "clients": clients,
                "generator": generator,
                "owners": dataset.owners,
                "domains": dataset.train_domains,
                "places": places,
            },
            alpha=config.alpha,
        )
    if ":" in config.partition:
        check(made, len(labels), clients, f"--partition {config.partition}")
    return made


def _file_of(partition: str) -> Path | None:
    """Return the file that holds a split, if it is given by a path: a run's folder, or the file."""
    try:
        path = Path(expanded(partition))
    except UsageError as error:
        raise UsageError(f"--partition {partition}: {error}") from error
    if path.is_dir():
        return path / files.PARTITION
    return path if path.is_file() or path.suffix in (".npz", ".json") else None


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


def new_model(config: Config, dataset: Dataset) -> nn.Module:
    """Return the network with the run's first weights, on the CPU."""
    name = model_name(config)
    make = plugins.find("model", name, "fedsam.models", nn.Module)
    augmented = _shape_after(_augmentations(config, dataset), dataset)
    shape, classes = (dataset.shape[0], *augmented), dataset.classes
    facts = {"shape": shape, "classes": classes, "num_classes": classes, "in_chans": shape[0]}
    options, channels = config.model_options, {}
    if _says_nothing(make, facts):  # then it hands on what torchvision's and timm's models take
        channels = {} if shape[0] == 3 else {"in_chans": shape[0]}
        options = {"num_classes": classes, **channels, **options}
    with global_streams(config.seed, "initialisation"), _unpickling_nothing(make):
        try:
            model = plugins.build("model", make, options, facts)
        except UsageError as error:
            if channels and "in_chans" not in config.model_options and "in_chans" in str(error):
                raise UsageError(
                    f"--model {config.model}: takes images of 3 channels, those of "
                    f"{config.dataset} have {shape[0]}; give a function of your own that changes "
                    "its first layer"
                ) from error
            raise
        if not isinstance(model, nn.Module):
            raise UsageError(f"--model {config.model}: returns a {type(model).__name__}, no Module")
        initialise_lazy_layers(model, shape, config.model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(f"--model {config.model}: it has no trainable parameter")
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    if len(dtypes) > 1 or not next(model.parameters()).is_floating_point():
        raise UsageError(
            f"--model {config.model}: its parameters are {', '.join(sorted(dtypes))}; they must "
            "all be of one floating dtype (--precision bf16 computes in bfloat16)"
        )
    return model


@contextmanager
def _unpickling_nothing(make: Any) -> Iterator[None]:
    """Let a package's model read weights alone, whatever file its options name."""
    before = os.environ.get(WEIGHTS_ONLY)
    if not plugins.own(make):
        os.environ[WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        os.environ.pop(WEIGHTS_ONLY, None)
        if before is not None:
            os.environ[WEIGHTS_ONLY] = before


def model_name(config: Config) -> str:
    """Return the name of the model, the data set's usual one unless the config names one."""
    return MODELS.get(config.dataset, "cnn") if config.model == "auto" else config.model


def new_network(config: Config) -> nn.Module:
    """Return the network of a run, whose data set says its shape, on the CPU."""
    return new_model(config, load_dataset(config))


def task_of(config: Config, dataset: Dataset) -> str:
    """Return the name of the task, the data set's own unless the config names one."""
    return dataset.task if config.task == "auto" else config.task


def new_method(config: Config) -> Method:
    """Return the clients' side of the algorithm."""
    values = {"rho": config.rho, "eta": config.eta, "rounds": config.rounds}
    correction = _derived("client", config.client, "fedsam.clients.corrections", Correction)
    loss = _derived("loss", config.loss, "fedsam.clients.losses", Loss)
    return Method(
        new_minimizer(config.minimizer, config.minimizer_options, values),
        plugins.build("client", correction, config.client_options, **values),
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        optimizer=config.optimizer,
        decay_in_loss=config.decay_in_loss,
        first_pass_statistics=config.bn_first_pass,
        clip_gradient=config.clip_gradient,
        loss=plugins.build("loss", loss, config.loss_options, **values),
    )


def new_minimizer(name: str, options: Mapping[str, Any], values: Mapping[str, Any]) -> Minimizer:
    """Return a minimizer, and those that it is made of, each with the options that it takes.

    Parameters
    ----------
    name : str
        Its name, or an import path.
    options : mapping
        Its options, the names of the minimizers that it is made of, and their options.
    values : mapping
        The run's values that minimizers may need.
    """
    cls = _derived("minimizer", name, MINIMIZERS, Minimizer)
    if not cls.minimizers:
        return plugins.build("minimizer", cls, options, **values)
    own = inspect.signature(cls).parameters
    chosen = {argument: options.get(argument, usual) for argument, usual in cls.minimizers.items()}
    others = {option: value for option, value in options.items() if option not in own}
    taken = {argument: _options_of(part, others) for argument, part in chosen.items()}
    if unknown := sorted(set(others).difference(*taken.values())):
        names = " nor ".join(chosen.values())
        raise UsageError(
            f"--minimizer-options: neither {name} nor {names} has an option {unknown[0]!r}"
        )
    made = {
        argument: new_minimizer(
            part, {o: others[o] for o in others if o in taken[argument]}, values
        )
        for argument, part in chosen.items()
    }
    return plugins.build(
        "minimizer", cls, {o: options[o] for o in options if o in own} | made, **values
    )


def _options_of(name: str, options: Mapping[str, Any]) -> set[str]:
    """Return the options that a minimizer takes, and those of the minimizers it is made of."""
    if not isinstance(name, str):
        raise UsageError(f"--minimizer-options: {name!r} is not the name of a minimizer")
    cls = _derived("minimizer", name, MINIMIZERS, Minimizer)
    names = set(inspect.signature(cls).parameters)
    others = {option: value for option, value in options.items() if option not in names}
    parts = [options.get(argument, usual) for argument, usual in cls.minimizers.items()]
    return names.union(*(_options_of(part, others) for part in parts))


def _derived(key: str, name: str, package: str, base: type) -> Any:
    """Return the class that a name means; it keeps the contract."""
    return plugins.find(key, name, package, base, functions=False)


def new_strategy(config: Config) -> Strategy:
    """Return the server's side: a strategy that trains every node it is shown, maybe averaged.

    A method of ours is put into its adapter, a Flower Strategy is taken as it is.
    """
    make = plugins.find(
        "strategy", config.strategy, "fedsam.strategies", ServerMethod | Strategy | FormerStrategy
    )
    if inspect.isclass(make) and issubclass(make, FormerStrategy):
        raise UsageError(
            f"--strategy {config.strategy}: is of Flower's former API (configure_fit); give a "
            "Strategy of flwr.serverapp.strategy"
        )
    # not all hold a task's images, or stay
    fewest = 1 if config.lifelong or config.dropout_rate else config.clients_per_round
    # a strategy is shown a round's clients alone, and must take them all
    sampling: dict[str, Any] = {
        "fraction_train": 1.0,
        "fraction_evaluate": 0.0,
        "min_train_nodes": fewest,
        "min_available_nodes": fewest,
    }
    run = {"clients": config.clients, "momentum": config.momentum}
    if inspect.isclass(make) and issubclass(make, ServerMethod):
        options = dict(config.strategy_options)
        of_flower = options.keys() & inspect.signature(FedAvg).parameters.keys()
        sampling |= {name: options.pop(name) for name in of_flower}
        method = plugins.build("strategy", make, options, **run)
        strategy: Strategy = MethodStrategy(method, **sampling)
    else:
        facts = sampling | {"train_loss_key": LOSS}  # as QFedAvg calls what it reads of the replies
        strategy = plugins.build("strategy", make, config.strategy_options, facts, **run)
    if not isinstance(strategy, Strategy):
        raise UsageError(
            f"--strategy {config.strategy}: returns a {type(strategy).__name__}, no Flower Strategy"
        )
    _check_strategy(config, strategy)
    pooled = config.bn == "pooled"
    if pooled or not isinstance(strategy, MethodStrategy | OWN_STATISTICS):
        strategy = Statistics(strategy, pooled=pooled)
    if config.averaging == "none":
        return strategy
    rule = _derived("average", config.averaging, "fedsam.strategies.averages", Average)
    values = {"start": config.averages_from, "cycle": config.swa_cycle, "lr": config.swa_lr}
    return Averaged(strategy, plugins.build("average", rule, config.average_options, **values))


def _check_strategy(config: Config, strategy: Strategy) -> None:
    """Raise UsageError if a Flower strategy wants other clients than there are, or more of them."""
    for kind, instead in OF_OTHER_CLIENTS.items():
        if isinstance(strategy, kind):
            raise UsageError(f"--strategy {config.strategy}: {instead}")
    if inside := getattr(strategy, "strategy", None):
        _check_strategy(config, inside)
    for name in ("min_train_nodes", "min_available_nodes"):
        if (least := getattr(strategy, name, 0)) > config.clients_per_round:
            raise UsageError(
                f"--strategy-options: {name} {least}: a strategy sees a round's clients alone, "
                f"--clients-per-round {config.clients_per_round}; leave it out"
            )


def new_task(config: Config, dataset: Dataset) -> Task:
    """Return what the model's output means, for a data set whose targets fit."""
    facts = {"classes": dataset.classes}
    facts |= {} if dataset.ignore is None else {"ignore": dataset.ignore}
    make = plugins.find("task", task_of(config, dataset), "fedsam.tasks", Task)
    task: Task = plugins.build("task", make, config.task_options, facts)
    tasks.check(task, dataset)
    return task


def pinned(config: Config) -> Config:
    """Return the config with the checksum that its file of weights has today."""
    if not config.weights or config.weights_sha256:
        return config
    return config.model_copy(update={"weights_sha256": checksum(config.weights)})


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
    work = _work(config, dataset, draws=method.loss.draws)
    _check_work(config, work, partition)
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
    return trainer, VectorRecord(layout, first)


def new_gradients(config: Config, trainer: Trainer) -> type[Slots | Vmapped] | None:
    """Return how a cohort's gradients are computed; None where clients train each by itself."""
    if config.cohort == "auto":
        return Slots if trainer.layout.device.type == "cuda" else None
    return {"off": None, "slots": Slots, "vmap": Vmapped}[config.cohort]


def new_ray_executor(config: Config, trainer: Trainer) -> "RayExecutor":
    """Return Ray actors that train the clients."""
    try:
        from fedsam.engines.ray import RayExecutor
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise UsageError("--engine ray: Ray is not installed; pip install 'fedsam[ray]'") from error

    digest = trainer.layout.digest

    def make() -> Trainer:
        """Make the trainer in the actor, from the config alone."""
        made = new_trainer(config)[0]
        if made.layout.digest != digest:
            raise UsageError(
                "--engine ray: the frozen parameters of an actor are not the driver's; every node "
                "needs the same --weights file"
            )
        return made

    workers = config.workers or cores()
    address, gpus = config.ray_address, config.gpus_per_worker
    return RayExecutor(trainer, make, workers, address, gpus, config.client_timeout or math.inf)


def _normalisation(config: Config, dataset: Dataset) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel, as --normalize says."""
    channels = len(dataset.mean)
    if config.normalize == "dataset":
        return dataset.mean, dataset.std
    if config.normalize == "half":
        return (0.5,) * channels, (0.5,) * channels
    return (0.0,) * channels, (1.0,) * channels


def _work(config: Config, dataset: Dataset, *, draws: bool) -> Work:
    augmentations = _augmentations(config, dataset)
    augmentations += [Keys()] if draws else []  # last: the rest of a plan is the same without them
    return Work(
        config.batch_size,
        config.local_epochs,
        config.local_steps,
        tuple(augmentations),
        drop_last=config.drop_last,
    )


def _augmentations(config: Config, dataset: Dataset) -> list[Augmentation]:
    augment: str = config.augment
    if augment == "auto":
        augment = AUGMENTATIONS.get(config.dataset, "none")
    of_text = {} if augment == "none" else keys.augmentations(augment)
    augmentations: list[Augmentation] = []
    augmentations += [Crop(CROP_PADDING)] if "crop" in of_text else []
    if "scale" in of_text:
        low, high, *size = of_text["scale"]
        augmentations += [Scale(low, high, (int(size[0]), int(size[1])) if size else None)]
    if "resized_crop" in of_text:
        low, high, height, width = of_text["resized_crop"]
        augmentations += [ResizedCrop(low, high, (int(height), int(width)))]
    shape = _shape_after(augmentations, dataset)
    if config.cutout > min(shape):
        raise UsageError(f"--cutout {config.cutout}: the images' side is {min(shape)} pixels")
    augmentations += [_rotation(config, *shape)] if config.client_rotations else []
    augmentations += [Flip()] if "flip" in of_text else []
    augmentations += [Mirror()] if "mirror" in of_text else []
    augmentations += [Double()] if "double" in of_text else []
    augmentations += [Jitter(*of_text["jitter"])] if "jitter" in of_text else []
    noise = config.client_noise
    augmentations += [Noise(noise, config.clients)] if noise else []
    augmentations += [Cutout(config.cutout)] if config.cutout else []
    augmentations += [Mixup(config.mixup)] if config.mixup else []
    return augmentations


def _shape_after(augmentations: Sequence[Augmentation], dataset: Dataset) -> tuple[int, int]:
    """Return height and width of training images once they are augmented."""
    _, height, width = dataset.shape
    for augmentation in augmentations:
        height, width = augmentation.shape((height, width))
    return height, width


def _as_trained_on(train: Images, work: Work, seed: int) -> Batch:
    """Return a mini-batch of two images (of one, twice) as clients see them."""
    rows = torch.arange(2) % len(train)
    two = Work(len(rows), augmentations=work.augmentations).of(0)
    plan = make_plan(rows, two, (train.height, train.width), torch_generator(seed, "dry pass"))
    return train.batch(plan.to(train.padded.device), 0)


def _check_work(config: Config, work: Work, partition: Partition) -> None:
    """Raise UsageError where a client's plan of a round, drawn up front, would fill the memory."""
    most = int(partition.sizes.max())
    key = "local_steps" if config.local_steps else "local_epochs"
    if not math.isfinite(config.local_epochs * most):
        images = math.inf
    else:
        images = work.steps(most) * max(work.cut(most), default=0)
    if images > MOST_IMAGES:
        raise UsageError(
            f"{flag(key)} {getattr(config, key):g}: a client would take {images:.3g} images "
            f"a round; {MOST_IMAGES:,} at most, as each is planned before"
        )


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


def _rotation(config: Config, height: int, width: int) -> Rotation:
    rotation = Rotation(tuple(map(float, config.client_rotations.split(","))))
    if height != width and any(round(angle / 90) % 2 for angle in rotation.angles):
        raise UsageError(
            f"--client-rotations {config.client_rotations}: images of {height} x {width} pixels "
            "cannot be turned on their side; give angles within 45 degrees of 0 or 180"
        )
    return rotation


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


def _says_nothing(make: Any, given: Collection[str]) -> bool:
    """Return whether it is a function that takes any keyword and names none of these."""
    parameters = inspect.signature(make).parameters
    any_keyword = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return any_keyword and not inspect.isclass(make) and not set(given) & set(parameters)
