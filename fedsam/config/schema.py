"""The one frozen, typed description of a run; flags, YAML keys and defaults are its fields."""

import math
from collections.abc import Mapping
from os import PathLike
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from fedsam.base.errors import UsageError, flag, nearest
from fedsam.config import text
from fedsam.config.presets import located, preset, read

# what runs that train as one program share: the model, the images, the shape of a mini-batch
SHARED = (
    *("dataset", "data_root", "model", "model_options", "task", "minimizer", "client"),
    *("normalize", "loss", "loss_options"),
    *("optimizer", "decay_in_loss", "bn_first_pass", "lifelong", "lifelong_options"),
    *("batch_size", "augment", "cutout", "mixup", "device", "precision", "cohort", "engine"),
)
# who learns: a preset that says so (central) is a setting of its own, not one of a file's
WHO = ("clients", "clients_per_round", "partition")
TRACED = range(3, 6)  # rounds that --trace shows
# how and where a run is computed, not what: its numbers are the same up to rounding
HOW = frozenset(
    [
        *("out", "quiet", "data_root", "device", "engine", "cohort", "threads", "workers"),
        *("ray_address", "gpus_per_worker", "profile", "trace", "track", "checkpoint_every"),
        "save_every",
    ]
)


def _options(value: Any) -> Any:
    """Accept a mapping also as text, as flags and Flower's run config hold it."""
    if isinstance(value, str):
        try:
            value = text.parse(value or "{}")
        except yaml.YAMLError as error:
            raise ValueError("must be a mapping in YAML or JSON, such as '{k: 2}'") from error
    if isinstance(value, dict):
        for key, given in value.items():
            for scalar in given if isinstance(given, list) else [given]:
                if not isinstance(scalar, Scalar):
                    raise ValueError(
                        f"{key} must be a number, a text, true, false or a list of them"
                    )
                if isinstance(scalar, float) and not math.isfinite(scalar):
                    raise ValueError(f"{key} must be a finite number")
    return value


Scalar = bool | int | float | str
Options = Annotated[dict[str, Scalar | list[Scalar]], BeforeValidator(_options)]


class Config(BaseModel):
    """A run of federated training.

    Every field is a flag (``clients_per_round`` is ``--clients-per-round``) and a YAML key; the
    descriptions below are what ``--help`` prints. "A name or import path" is a file's name in the
    folder that is named, or ``package.module:Class``.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    # what is learnt
    dataset: str = "digits"
    """Data set: digits, mnist, fashion-mnist, cifar10, cifar100, svhn, or the import path of a
    function that returns one."""
    data_root: str = "data"
    """Folder that holds the data sets; what is missing is downloaded into it where that is
    possible."""
    normalize: Literal["dataset", "half", "none"] = "dataset"
    """What is taken off the pixels in [0, 1], and by what they are divided: dataset (mean and
    standard deviation of each channel), half (0.5 and 0.5) or none."""
    model: str = "auto"
    """Network: auto (digits-cnn for digits, mlp for MNIST and Fashion-MNIST, else cnn), cnn,
    digits-cnn, mlp, mobilenet-v2, resnet18, resnet20, vit, wrn16-4, or an import path such as
    torchvision.models:resnet18."""
    model_options: Options = {}
    """Further arguments of the model, as YAML or JSON: '{hidden: 100}', '{norm: batch}'."""
    task: str = "classification"
    """What the model's output means: classification, or an import path."""
    # who learns it
    clients: int = Field(100, ge=1)
    """Clients in the population."""
    clients_per_round: int = Field(10, ge=1)
    """Clients sampled each round, without replacement."""
    partition: str = "dirichlet"
    """How images are split over clients: dirichlet (the paper's: balanced, alpha is the TOTAL
    concentration), iid, dirichlet-per-class, shards, quantity, csv, or an import path."""
    alpha: float = Field(0.05, ge=0)
    """Concentration of the split: 0 is one class a client, large is IID."""
    partition_options: Options = {}
    """Further arguments of the partition: '{shards: 2}', '{path: split.csv}'."""
    lifelong: int = Field(0, ge=0)
    """Tasks that the classes are cut into and that are learnt one after the other, each over an
    equal part of the rounds (0: off)."""
    lifelong_options: Options = {}
    """How: '{order: 3}' shuffles the classes by this seed, '{heads: multi}' lets only a task's own
    classes compete, '{memory: 20}' lets clients replay as many images of each earlier class."""
    # how long
    rounds: int = Field(1000, ge=1)
    """Communication rounds."""
    local_epochs: float = Field(1.0, ge=0)
    """Passes over its images that a client makes a round; fractions are rounded to whole steps."""
    local_steps: int = Field(0, ge=0)
    """Mini-batches a client takes a round, in place of --local-epochs (0: by epochs)."""
    target_accuracy: float = Field(0.0, ge=0, le=1)
    """Stop once an evaluation reaches this accuracy, in [0, 1] (0: off)."""
    patience: int = Field(0, ge=0)
    """Stop after so many evaluations without a better accuracy (0: off)."""
    # how a client learns
    algorithm: str = "fedavg"
    """A preset of the axes below by its paper's name, out of configs/algorithms, with the values
    published for CIFAR-10, or CIFAR-100 where that is the data set; flags given beside it win."""
    minimizer: str = "sgd"
    """How a client descends: a name out of clients/minimizers, or an import path."""
    minimizer_options: Options = {}
    """Further arguments of the minimiser: '{k: 2, slow: 0.5}'."""
    client: str = "fedavg"
    """What a client corrects: a name out of clients, or an import path."""
    client_options: Options = {}
    """Further arguments of the client: '{mu: 0.01}'."""
    loss: str = "plain"
    """What a client minimises: plain (the task's loss), pgd_at or trades (at adversarial images), a
    name out of clients/losses, or an import path."""
    loss_options: Options = {}
    """Further arguments of the loss: '{eps: 8, step: 2, steps: 10, start: 0.9}'."""
    rho: float = Field(0.05, ge=0)
    """Radius of SAM, ASAM and their kin."""
    eta: float = Field(0.2, ge=0)
    """Eta of ASAM: added to |w|."""
    lr: float = Field(0.1, gt=0)
    """Clients' learning rate."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """How it goes on from round to round: constant, or cosine (from --lr towards 0)."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """Clients' SGD momentum, from zero in each round."""
    optimizer: Literal["sgd", "nesterov", "adamw"] = "sgd"
    """Clients' base optimiser: sgd, nesterov (with --momentum) or adamw (PyTorch's betas), whose
    state is zero at the start of each round."""
    weight_decay: float = Field(4e-4, ge=0)
    """Clients' l2 coefficient, added to the gradient (adamw: decoupled from it)."""
    decay_in_loss: bool = False
    """Weight decay as part of the loss, so that SAM and its kin also ascend along it (Google's
    SAM); else it acts at the unperturbed weights only, as in FedSAM's and ASAM's code."""
    bn_first_pass: bool = False
    """BatchNorm statistics are updated in the first pass of a step only (Google's SAM); else in
    each, as in FedSAM's and ASAM's code."""
    bn: Literal["values", "pooled", "local"] = "values"
    """BatchNorm statistics: values (averaged as they are), pooled (mean and variance of all the
    cohort's images together) or local (SiloBN: each client keeps its own; needs --update-bn)."""
    batch_size: int = Field(64, ge=1)
    """Images a mini-batch; a smaller last one is kept."""
    augment: Literal["auto", "none", "crop", "flip", "crop+flip"] = "auto"
    """Random crop after padding by 4 and mirroring (auto: crop+flip for CIFAR, crop for SVHN, else
    none)."""
    cutout: int = Field(0, ge=0)
    """Side of the square cut out of each image, in pixels (0: off)."""
    mixup: float = Field(0.0, ge=0)
    """A of mixup's lambda ~ Beta(a, a) (0: off)."""
    # what the server does
    strategy: str = "fedavg"
    """How replies are aggregated: a name out of strategies, or an import path such as
    flwr.serverapp.strategy:FedAdam."""
    strategy_options: Options = {}
    """Further arguments of the strategy: '{server_momentum: 0.9}'."""
    swa: bool = False
    """Short for --average swa."""
    average: str = "none"
    """Average of the global model that is evaluated: none, swa, ema, wima (a name out of
    strategies/averages), or an import path."""
    average_options: Options = {}
    """Further arguments of the average: '{phase: official}', '{decay: 0.99}'."""
    swa_start: float = Field(0.75, ge=0)
    """When averaging starts: a fraction of the rounds below 1, else a round."""
    swa_cycle: int = Field(10, ge=1)
    """Rounds of SWA's learning-rate cycle."""
    swa_lr: float = Field(1e-4, ge=0)
    """Learning rate at the end of SWA's cycle."""
    update_bn: int = Field(0, ge=0)
    """Training images on which the server computes the BatchNorm statistics of the evaluated model
    anew, the same at each evaluation (0: off)."""
    min_clients: int = Field(1, ge=1)
    """Usable updates that a round needs; with fewer it is tried again with other clients, three
    times in all."""
    client_timeout: float = Field(0.0, ge=0)
    """Seconds after which a client that has not answered is left out (0: never); with Ray and on
    Flower's runtime, as a thread of the local engine cannot be stopped."""
    max_norm: float = Field(0.0, ge=0)
    """Leave out updates that are longer, l2 (0: off)."""
    clip_norm: float = Field(0.0, ge=0)
    """Scale updates that are longer down to this l2 norm (0: off)."""
    # how it is computed and what it leaves
    seed: int = Field(0, ge=0)
    """Everything random follows from it: model, split, cohorts, batches."""
    device: str = "auto"
    """Auto (cuda where there is one), cpu, cuda, cuda:1, ...."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Of the forward pass: fp32, tf32 (matrix products of a GPU) or bf16; weights stay fp32."""
    cohort: Literal["auto", "off", "slots", "vmap"] = "auto"
    """How the local engine trains a round's clients: off (each by itself), slots or vmap (as one
    batched program, which a GPU replays as a CUDA graph), auto (slots on a GPU, off on a CPU)."""
    threads: int = Field(0, ge=0)
    """Clients trained at a time on a CPU, each on one core (0: one a core); the result does not
    depend on it."""
    engine: Literal["local", "ray"] = "local"
    """Where clients run: local (threads of this process) or ray (actors, on one machine or a
    cluster); on Flower's runtime: flwr run ."""
    workers: int = Field(0, ge=0)
    """Ray actors, each on one core (0: one a core of this machine); the result does not depend on
    it."""
    ray_address: str = ""
    """Address of a running Ray cluster; auto for the one on this machine (empty: start Ray
    here)."""
    gpus_per_worker: float = Field(0.0, ge=0)
    """GPUs of each Ray actor; fractions share one."""
    eval_every: int = Field(10, ge=1)
    """Rounds between evaluations; runs of 1000 rounds or more evaluate each of the last 100 too."""
    out: str = ""
    """Folder for the results, which must not exist (empty: a new one under runs/)."""
    checkpoint_every: Annotated[str, BeforeValidator(str), Field(pattern=r"^\d+s?$")] = "60s"
    """Rounds (100) or seconds (60s) after which what --resume needs is saved anew, and when
    the run ends or is interrupted (0: never)."""
    save_every: int = Field(0, ge=0)
    """Rounds between models that are kept, models/000100.safetensors in the run's folder (0: none);
    each is the one that is evaluated: the average, once there is one."""
    profile: bool = False
    """Also print and save a table of the time by phase (profile.json)."""
    trace: bool = False
    """Also save a PyTorch profiler trace of rounds 3 to 5 (trace.json.gz)."""
    track: str = ""
    """Follow the run live: tensorboard, wandb, mlflow (each an extra of that name) or import paths,
    between commas."""
    quiet: bool = False
    """No progress line."""

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        if self.clients_per_round > self.clients:
            raise ValueError(
                f"--clients-per-round {self.clients_per_round}: at most --clients {self.clients}"
            )
        if self.min_clients > self.clients_per_round:
            raise ValueError(
                f"--min-clients {self.min_clients}: at most --clients-per-round "
                f"{self.clients_per_round}"
            )
        if self.swa and self.average not in ("none", "swa"):
            raise ValueError(f"--swa is --average swa: leave out one of it and {self.average!r}")
        if self.optimizer == "nesterov" and not self.momentum:
            raise ValueError("--optimizer nesterov: needs a --momentum above 0")
        if self.optimizer == "adamw" and (self.momentum or self.decay_in_loss):
            raise ValueError("--optimizer adamw: goes without --momentum and --decay-in-loss")
        if self.update_bn == 1:
            raise ValueError("--update-bn 1: one image has no variance; give 2 or more, or 0")
        if self.bn == "local" and not self.update_bn:
            raise ValueError(
                "--bn local: the global model has no statistics to be evaluated with; give "
                "--update-bn, such as 1000"
            )
        if self.trace and self.rounds < TRACED[-1]:
            raise ValueError(f"--trace: shows rounds {TRACED[0]} to {TRACED[-1]}: more --rounds")
        if self.averaging != "none" and self.averages_from >= self.rounds:
            raise ValueError(
                f"--swa-start {self.swa_start:g}: must lie before the end of --rounds {self.rounds}"
            )
        return self

    @model_validator(mode="after")
    def _lifelong_fits(self) -> "Config":
        if self.lifelong == 1 or self.lifelong > self.rounds:
            raise ValueError(
                f"--lifelong {self.lifelong}: needs two tasks at least, and a round for each"
            )
        if self.lifelong and (self.target_accuracy or self.patience):
            raise ValueError("--lifelong: goes without --target-accuracy and --patience")
        if self.lifelong and self.update_bn:
            raise ValueError("--update-bn: goes without --lifelong: it would see later tasks")
        if self.lifelong_options and not self.lifelong:
            raise ValueError("--lifelong-options: needs --lifelong")
        return self

    @property
    def averaging(self) -> str:
        """The average that is used: ``average``, or swa by its short flag."""
        return "swa" if self.swa else self.average

    @property
    def averages_from(self) -> int:
        """Rounds before the averaging starts."""
        start = self.swa_start * self.rounds if self.swa_start < 1 else self.swa_start
        return int(start)

    def rate(self, round: int) -> float:
        """Return the clients' learning rate in ``round``, from 1, before any average's cycle.

        Cosine annealing without restarts (Loshchilov and Hutter, ICLR 2017), by rounds::

            lr (1 + cos(pi (round - 1) / rounds)) / 2
        """
        if self.lr_schedule == "constant":
            return self.lr
        return self.lr * (1 + math.cos(math.pi * (round - 1) / self.rounds)) / 2

    @property
    def task_ends(self) -> tuple[int, ...]:
        """The last round of each task of ``lifelong``."""
        return tuple(k * self.rounds // self.lifelong for k in range(1, self.lifelong + 1))

    def evaluates(self, round: int) -> bool:
        """Return whether the model after ``round`` is evaluated.

        Every ``eval_every`` rounds and after the last; runs of 1000 rounds or more also after
        each of the last 100, over which the paper takes its mean. And at the end of each task.
        """
        last = self.rounds - round < 100 and self.rounds >= 1000
        return (
            last or round % self.eval_every == 0 or round == self.rounds or round in self.task_ends
        )


def resolve(given: Mapping[str, Any], file: str | PathLike[str] = "") -> Config:
    """Return the config of these values over a file's, over its algorithm's preset, over defaults.

    Of a preset that is among these values, ``clients``, ``clients_per_round`` and ``partition``
    stand over the file's, too: a central run of a federated file's setting.

    Parameters
    ----------
    given : mapping
        Config keys, from flags, keyword arguments or Flower's run config.
    file : str or Path
        A YAML file, or the name of one in ``configs/`` ("paper/cifar10"); "" for none.

    Raises
    ------
    UsageError
        One line that names the flag and says what would be right.
    """
    of_file = read(located(file)) if file else {}
    values = of_file | dict(given)
    algorithm = values.get("algorithm", Config.model_fields["algorithm"].default)
    method = preset(algorithm, str(values.get("dataset")))
    chosen = {key: method[key] for key in WHO if key in method and "algorithm" in given}
    values = method | of_file | chosen | dict(given)
    unknown = [key for key in values if key not in Config.model_fields]
    if unknown:
        raise UsageError(
            f"{flag(unknown[0])}: no such key{nearest(unknown[0], Config.model_fields)}"
        )
    try:
        return Config(**values)
    except ValidationError as error:
        raise UsageError(_one_line(error)) from error


def from_run_config(run_config: Mapping[str, bool | int | float | str]) -> Config:
    """Return the config of a Flower run, whose keys are the flags' names without dashes in front.

    Flower knows no missing keys: its table in pyproject.toml holds every default, so a key that
    equals its default leaves the algorithm's preset in force.
    """
    values = {key.replace("-", "_"): value for key, value in run_config.items()}
    return resolve({k: v for k, v in values.items() if v != run_config_defaults().get(k)})


def run_config_defaults() -> dict[str, bool | int | float | str]:
    """Return the defaults as Flower's run config holds them: scalars, mappings as JSON."""
    fields = Config.model_fields.items()
    return {k: "{}" if f.default == {} else f.default for k, f in fields}


def dump(config: Config) -> str:
    """Return the YAML from which ``resolve`` makes the same config."""
    return text.write(config.model_dump())


def _one_line(error: ValidationError) -> str:
    """Return the first thing that is wrong, as "--flag value: what would be right"."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return message
    return f"{flag(str(first['loc'][0]))} {first['input']}: {message[0].lower()}{message[1:]}"
