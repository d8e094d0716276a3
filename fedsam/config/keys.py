"""Every key of a run, in five groups, with its default, its bounds, and what is done with it."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

from fedsam.base.errors import UsageError
from fedsam.base.system import expanded
from fedsam.config import text


@dataclass(frozen=True)
class Key:
    """What is done with a key, beside its flag.

    Attributes
    ----------
    how : bool
        Says how and where a run is computed, not what: the numbers are the same up to rounding.
    shared : bool
        The same in runs that train as one program: the model, the images, a mini-batch's shape.
    free : bool
        A run that is resumed may go on with another value, as with those that say how.
    who : bool
        Who learns: a preset that says so (central) is a setting of its own, not one of a file's.
    cell : bool
        May differ between the runs of one cell of a report; all but the seed are in its name.
    engine : bool
        Chooses an engine of ours, or says how one works: nothing to Flower's runtime.
    noted : bool
        Is what a run finds, where it is not given: it writes it into its config.yaml.
    column : int
        Place of the key among the columns of a report's table, where runs differ in it (0: none).
    """

    how: bool = False
    shared: bool = False
    free: bool = False
    who: bool = False
    cell: bool = False
    engine: bool = False
    noted: bool = False
    column: int = 0


def _options(value: Any) -> Any:
    """Accept a mapping also as text, as flags and Flower's run config hold it."""
    if isinstance(value, str):
        try:
            value = text.parse(value or "{}")
        except UsageError as error:
            raise ValueError(
                f"must be a mapping in YAML or JSON, such as '{{k: 2}}': {error}"
            ) from error
        if not isinstance(value, dict):
            raise ValueError("must be a mapping in YAML or JSON, such as '{k: 2}'")
    for key, given in value.items() if isinstance(value, dict) else ():
        _check_option(key, given)
    return value


def _check_option(key: Any, given: Any) -> None:
    """Raise ValueError if an entry of options is no scalar, nor a list of them."""
    if given is None and ":" in str(key):
        raise ValueError(f"a space must follow the colon in {key}")
    for scalar in given if isinstance(given, list) else [given]:
        if not isinstance(scalar, Scalar):
            raise ValueError(f"{key} must be a number, a text, true, false or a list of them")
        if isinstance(scalar, text.Word):
            raise ValueError(f"{key}: {scalar} is true, false or a quoted text: write that")
        if isinstance(scalar, float) and not math.isfinite(scalar):
            raise ValueError(f"{key} must be a finite number")


def _angles(value: Any) -> str:
    """Accept angles as a text, a number or a list of numbers; return them between commas."""
    if value == "":
        return ""
    try:
        said = value if isinstance(value, list | tuple) else str(value).split(",")
        angles = [float(angle) for angle in said]
    except (TypeError, ValueError):
        angles = [math.nan]
    if not all(map(math.isfinite, angles)):
        raise ValueError("must be angles in degrees, between commas, such as 0,90,180,270")
    return ",".join(f"{angle:.10g}" for angle in angles)


def augmentations(text: str) -> dict[str, tuple[float, ...]]:
    """Return the augmentations of a text such as "crop+jitter(0.4)", each with its numbers.

    Raises
    ------
    ValueError
        If one is unknown, comes twice, or has other numbers than it takes.
    """
    made: dict[str, tuple[float, ...]] = {}
    for part in text.replace(" ", "").split("+"):
        name, bracket, inside = part.partition("(")
        try:
            if bool(bracket) != inside.endswith(")"):
                raise ValueError
            numbers = tuple(float(n) for n in inside[:-1].split(",")) if bracket else ()
        except ValueError:
            raise ValueError(f"{part!r} is no name with numbers, such as jitter(0.4)") from None
        if name not in NUMBERS or name in made:
            raise ValueError(f"{name!r} must be one of {', '.join(NUMBERS)}, and come once")
        wanted, fits = NUMBERS[name]
        if not fits(*numbers):
            raise ValueError(f"{part}: must be {wanted}")
        made[name] = numbers
    for one, other in (("flip", "mirror"), ("double", "mirror"), ("scale", "resized_crop")):
        if one in made and other in made:
            raise ValueError(f"{one} and {other}: give one of them")
    return made


def _scales(low: float = 0, high: float = 0, *size: float) -> bool:
    whole = len(size) in (0, 2) and all(side >= 1 and side == int(side) for side in size)
    return 0 < low <= high < math.inf and whole


NUMBERS: dict[str, tuple[str, Callable[..., bool]]] = {
    "crop": ("crop, without numbers", lambda *numbers: not numbers),
    "flip": ("flip, without numbers", lambda *numbers: not numbers),
    "mirror": ("mirror, without numbers", lambda *numbers: not numbers),
    "double": ("double, without numbers", lambda *numbers: not numbers),
    "scale": ("scale(low,high) or scale(low,high,height,width)", _scales),
    "resized_crop": (
        "resized_crop(low,high,height,width)",
        lambda *numbers: len(numbers) == 4 and _scales(*numbers),
    ),
    "jitter": (
        "jitter(strength), in [0, 1]",
        lambda strength=-1, *more: 0 <= strength <= 1 > len(more),
    ),
}


def _augment(value: Any) -> Any:
    """Accept augmentations also as a list; return them between plus signs."""
    text = "+".join(map(str, value)) if isinstance(value, list | tuple) else value
    if not isinstance(text, str) or text in ("auto", "none"):
        return text
    parts = augmentations(text).items()
    said = [(name, ",".join(f"{number:.10g}" for number in numbers)) for name, numbers in parts]
    return "+".join(f"{name}({numbers})" if numbers else name for name, numbers in said)


def _path(value: Any) -> Any:
    return expanded(value) if isinstance(value, str) else value


def _name(value: Any) -> Any:
    """Accept a name that is a number, as YAML and Flower's run config have it."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _pattern(value: Any) -> Any:
    """Refuse what is no regular expression."""
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"must be a regular expression: {error}") from error
    return value


Scalar = bool | int | float | str
Pattern = Annotated[str, AfterValidator(_pattern)]
Options = Annotated[dict[str, Scalar | list[Scalar]], BeforeValidator(_options)]
PathText = Annotated[str, BeforeValidator(_path)]


class _Group(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        defer_build=True,  # the groups' own schemas serve nobody, Config's none that asks for help
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, bool) and field.annotation is not bool:
            raise ValueError("must be a number or a text, not true or false")
        return value


class Data(_Group):
    """What is learnt."""

    dataset: Annotated[str, Key(shared=True, column=1)] = "digits"
    """Data set: digits, digit-scenes (segmentation), rotated-digits (six domains), mnist,
    fashion-mnist, camvid (segmentation), cifar10, cifar100, svhn, pictures of your own
    (folder:PATH, csv:PATH, hf:PATH, landmarks:PATH), FedDrive's splits (cityscapes:PATH,
    idda:PATH), a folder that python -m fedsam.pack made, or the import path of a function that
    returns one."""
    dataset_options: Annotated[Options, Key(shared=True)] = {}
    """Further arguments of the data set, as YAML or JSON: '{side: 64}' for pictures of your own."""
    data_root: Annotated[PathText, Key(how=True, shared=True)] = "data"
    """Folder that holds the data sets; what is missing is downloaded into it where that is
    possible."""
    leave_out: Annotated[str, BeforeValidator(_name), Key(shared=True, column=4)] = ""
    """A domain of the data set that no client trains on and that is the test set then, with what is
    seen and unseen told of one by one (empty: none)."""
    validation: Annotated[float, Key(shared=True)] = Field(0.0, ge=0, lt=1)
    """Share of the training images (of each domain's) that is held out to choose a round by, and
    to stop early by; the summary tells the test result of the best such round (0: off)."""
    normalize: Annotated[Literal["dataset", "half", "none"], Key(shared=True)] = "dataset"
    """What is taken off the pixels in [0, 1], and by what they are divided: dataset (mean and
    standard deviation of each channel), half (0.5 and 0.5) or none."""
    model: Annotated[str, Key(shared=True)] = "auto"
    """Network: auto (digits-cnn for digits, turned or not, scenes-cnn for digit-scenes, mlp for
    MNIST and Fashion-MNIST, lraspp for CamVid, else cnn), bisenet-v2 and lraspp (segmentation),
    cnn, digits-cnn, mlp, mobilenet-v2, resnet18, resnet20, scenes-cnn, vit, wrn16-4, or an import
    path such as torchvision.models:resnet18."""
    model_options: Annotated[Options, Key(shared=True)] = {}
    """Further arguments of the model, as YAML or JSON: '{hidden: 100}', '{norm: batch}'."""
    weights: Annotated[PathText, Key(shared=True, free=True)] = ""
    """File of the first weights, .safetensors with the names of the state_dict; a head for other
    classes and what the file lacks stay as initialised and are named (empty: none)."""
    weights_sha256: Annotated[
        str, Field(pattern="^([0-9a-f]{64})?$"), Key(shared=True, noted=True)
    ] = ""
    """SHA-256 that the file of --weights must have, in hex (empty: any; a run notes its file's)."""
    train: Annotated[Pattern, Key(shared=True)] = ""
    """Regular expression that finds the names of the parameters that train; the others are frozen,
    neither sent nor averaged (empty: all train)."""
    lora: Annotated[int, Key(shared=True)] = Field(0, ge=0)
    """Rank of products that are trained beside frozen weights, LoRA; beside them only --train's
    parameters train (0: off)."""
    lora_targets: Annotated[Pattern, Key(shared=True)] = ""
    """Regular expression that finds the names of the weights that get products (empty: those of
    linear layers and of attention, but for those that --train finds)."""
    lora_options: Annotated[Options, Key(shared=True)] = {}
    """Further arguments of LoRA: '{alpha: 16}' (the product counts alpha / rank, 1 by default),
    '{freeze: a}' (FFA-LoRA: A stays as it began)."""
    task: Annotated[str, Key(shared=True)] = "auto"
    """What the model's output means: auto (what the data set is made for), classification,
    segmentation (each pixel's class), or an import path."""
    task_options: Annotated[Options, Key(shared=True)] = {}
    """Further arguments of the task: '{hard: 0.25}'."""


class Federation(_Group):
    """Who learns it, and how long."""

    clients: Annotated[int, Key(who=True)] = Field(100, ge=1)
    """Clients in the population."""
    clients_per_round: Annotated[int, Key(who=True, column=3)] = Field(10, ge=1)
    """Clients sampled each round, without replacement."""
    partition: Annotated[str, Key(who=True)] = "dirichlet"
    """How images are split over clients: dirichlet (the paper's: balanced, alpha is the TOTAL
    concentration of priors around the classes' shares), iid, dirichlet-per-class, shards, quantity,
    csv, natural (by the data's own owners), domains (each client holds one domain), an import path,
    or a split that is there: a run's folder, its partition.npz, or a JSON file of each client's
    rows."""
    alpha: Annotated[float, Key(column=2)] = Field(0.05, ge=0)
    """Concentration of the split: 0 is one class a client, large is IID."""
    partition_options: Options = {}
    """Further arguments of the partition: '{shards: 2}', '{path: split.csv}'."""
    split_seed: int | None = Field(None, ge=0)
    """Seed of the split alone, so that runs of several --seed share it (none: --seed)."""
    client_noise: Annotated[float, Key(shared=True)] = Field(0.0, ge=0)
    """Gaussian noise on clients' training images: the standard deviation of the last client's, for
    pixels in [0, 1]; client i of N has i / (N - 1) of it (0: off)."""
    client_rotations: Annotated[str, BeforeValidator(_angles), Key(shared=True)] = ""
    """Angles in degrees, between commas (0,90,180,270), by which clients' training images are
    turned: client i's by that of place i, counted round (empty: off)."""
    lifelong: Annotated[int, Key(shared=True)] = Field(0, ge=0)
    """Tasks that the classes are cut into and that are learnt one after the other, each over an
    equal part of the rounds (0: off)."""
    lifelong_options: Annotated[Options, Key(shared=True)] = {}
    """How: '{order: 3}' shuffles the classes by this seed, '{heads: multi}' lets only a task's own
    classes compete, '{memory: 20}' lets clients replay as many images of each earlier class."""
    rounds: Annotated[int, Key(free=True)] = Field(1000, ge=1)
    """Communication rounds."""
    local_epochs: float = Field(1.0, ge=0)
    """Passes over its images that a client makes a round; fractions are rounded to whole steps."""
    local_steps: int = Field(0, ge=0)
    """Mini-batches a client takes a round, in place of --local-epochs (0: by epochs)."""
    dropout_rate: float = Field(0.0, ge=0, lt=1)
    """Chance that a client drops out of a round for which it was sampled (0: off); one stays."""
    stragglers: float = Field(0.0, ge=0, le=1)
    """Chance that a client does only a part of its work in a round, one to all of its mini-batches
    with the same chance (0: off)."""
    target_accuracy: Annotated[float, Key(free=True)] = Field(0.0, ge=0, le=1)
    """Stop once an evaluation reaches this accuracy, in [0, 1] (0: off); of a task with another
    headline, such as mIoU, that one."""
    patience: Annotated[int, Key(free=True)] = Field(0, ge=0)
    """Stop after so many evaluations without a better accuracy, or headline (0: off)."""


class Client(_Group):
    """How a client learns."""

    algorithm: Annotated[str, Key(cell=True)] = "fedavg"
    """A preset of the axes below by its paper's name, out of configs/algorithms, with the values
    published for CIFAR-10, or CIFAR-100 where that is the data set; flags given beside it win."""
    minimizer: Annotated[str, Key(shared=True)] = "sgd"
    """How a client descends: a name out of clients/minimizers, or an import path."""
    minimizer_options: Options = {}
    """Further arguments of the minimizer: '{k: 2, slow: 0.5}'."""
    client: Annotated[str, Key(shared=True)] = "fedavg"
    """What a client corrects: a name out of clients, or an import path."""
    client_options: Options = {}
    """Further arguments of the client: '{mu: 0.01}'."""
    loss: Annotated[str, Key(shared=True)] = "plain"
    """What a client minimises: plain (the task's loss), pgd_at or trades (at adversarial images), a
    name out of clients/losses, or an import path."""
    loss_options: Annotated[Options, Key(shared=True)] = {}
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
    optimizer: Annotated[Literal["sgd", "nesterov", "adamw"], Key(shared=True)] = "sgd"
    """Clients' base optimiser: sgd, nesterov (with --momentum) or adamw (PyTorch's betas), whose
    state is zero at the start of each round."""
    weight_decay: float = Field(4e-4, ge=0)
    """Clients' l2 coefficient, added to the gradient (adamw: decoupled from it)."""
    decay_in_loss: Annotated[bool, Key(shared=True)] = False
    """Weight decay as part of the loss, so that SAM and its kin also ascend along it (Google's
    SAM); else it acts at the unperturbed weights only, as in FedSAM's and ASAM's code."""
    clip_gradient: float = Field(0.0, ge=0)
    """l2 norm that a corrected gradient is scaled down to in each step, before weight decay (0:
    off)."""
    bn_first_pass: Annotated[bool, Key(shared=True)] = False
    """BatchNorm statistics are updated in the first pass of a step only (Google's SAM); else in
    each, as in FedSAM's and ASAM's code."""
    bn: Literal["values", "pooled", "local"] = "values"
    """BatchNorm statistics: values (averaged as they are), pooled (mean and variance of all the
    cohort's images together) or local (SiloBN: each client keeps its own; needs --update-bn)."""
    batch_size: Annotated[int, Key(shared=True)] = Field(64, ge=1)
    """Images a mini-batch; a smaller last one is kept, but for --drop-last."""
    drop_last: Annotated[bool, Key(shared=True)] = False
    """Leave out the last mini-batch of an epoch where it is smaller, unless it is the only one."""
    augment: Annotated[str, BeforeValidator(_augment), Key(shared=True)] = "auto"
    """What happens to training images, between plus signs: crop (at random, after padding by 4),
    flip (mirror one in two), mirror (an epoch has each image twice, once mirrored), double (twice
    as it is), scale(0.5,1.5) (by a random factor, and a window at random of the image's size, or of
    that of scale(0.5,1.5,512,1024)), resized_crop(0.5,2,512,928) (a box with that share of the
    area, stretched to a window), jitter(0.4) (brightness, contrast and saturation); auto (crop+flip
    for CIFAR, crop for SVHN, else none) or none."""
    cutout: Annotated[int, Key(shared=True)] = Field(0, ge=0)
    """Side of the square cut out of each image, in pixels (0: off)."""
    mixup: Annotated[float, Key(shared=True)] = Field(0.0, ge=0)
    """A of mixup's lambda ~ Beta(a, a) (0: off)."""


class Server(_Group):
    """What the server does."""

    strategy: str = "fedavg"
    """How replies are aggregated: a name out of strategies, or an import path such as
    flwr.serverapp.strategy:FedAdam."""
    strategy_options: Options = {}
    """Further arguments of the strategy: '{server_momentum: 0.9}'."""
    swa: Annotated[bool, Key(cell=True)] = False
    """Short for --average swa."""
    average: Annotated[str, Key(cell=True)] = "none"
    """Average of the global model that is evaluated: none, swa, ema, wima (a name out of
    strategies/averages), or an import path."""
    average_options: Options = {}
    """Further arguments of the average: '{phase: official}', '{decay: 0.99}'."""
    swa_start: Annotated[float, Key(free=True)] = Field(0.75, ge=0)
    """When averaging starts: a fraction of the rounds below 1, else a round."""
    swa_cycle: int = Field(10, ge=1)
    """Rounds of SWA's learning-rate cycle."""
    swa_lr: float = Field(1e-4, ge=0)
    """Learning rate at the end of SWA's cycle."""
    update_bn: int = Field(0, ge=0)
    """Training images on which the server computes the BatchNorm statistics of the evaluated model
    anew, the same at each evaluation (0: off)."""
    weighting: Literal["examples", "equal"] = "examples"
    """What a client's update counts by: its examples, or the same for each (equal)."""
    min_clients: int = Field(1, ge=1)
    """Usable updates that a round needs; with fewer it is tried again with other clients, three
    times in all."""
    client_timeout: float = Field(0.0, ge=0)
    """Seconds after which a client that has not answered is left out (0: never); with Ray and on
    Flower's runtime, as a thread of the local engine cannot be stopped."""
    node_keys: Annotated[PathText, Key(how=True)] = ""
    """File with a line for each partition: its number and the public key of the SuperNode that may
    train it; on Flower's runtime with node authentication (empty: who says so first holds it)."""
    max_norm: float = Field(0.0, ge=0)
    """Leave out updates that are longer, l2 (0: off): of parameters and BatchNorm's statistics
    together. Vectors beside the model are scaled down in proportion."""
    clip_norm: float = Field(0.0, ge=0)
    """Scale updates that are longer down to this l2 norm (0: off), as --max-norm measures them."""


class Run(_Group):
    """How it is computed and what it leaves."""

    seed: Annotated[int, Key(cell=True)] = Field(0, ge=0)
    """Everything random follows from it: model, split, cohorts, batches."""
    device: Annotated[str, Key(how=True, shared=True)] = "auto"
    """Auto (cuda where there is one), cpu, cuda, cuda:1, ...."""
    precision: Annotated[Literal["fp32", "tf32", "bf16"], Key(shared=True)] = "fp32"
    """Of the forward pass: fp32, tf32 (matrix products of a GPU) or bf16; weights stay fp32."""
    compile: Annotated[bool, Key(shared=True)] = False
    """Compile the local step (PyTorch's inductor; on a CPU it needs a C++ compiler), once for all
    clients and later runs, where the run is long enough to gain by it; other rounding."""
    cohort: Annotated[
        Literal["auto", "off", "slots", "vmap"], Key(how=True, shared=True, engine=True)
    ] = "auto"
    """How the local engine trains a round's clients: off (each by itself), slots or vmap (as one
    batched program, which a GPU replays as a CUDA graph), auto (slots on a GPU, off on a CPU)."""
    threads: Annotated[int, Key(how=True)] = Field(0, ge=0, le=512)
    """Clients trained at a time on a CPU, each on one core, 512 at most (0: one a core); the result
    does not depend on it."""
    processes: Annotated[int | None, Key(how=True, engine=True)] = Field(None, ge=0, le=512)
    """Processes that train the local engine's clients on a CPU, a core each, in place of threads:
    2, ..., or 0 for threads (none: as many processes as --threads once the first rounds have shown
    steps of less than 10 ms, where that is safe, else threads). The result is the same."""
    engine: Annotated[Literal["local", "ray"], Key(how=True, shared=True, engine=True)] = "local"
    """Where clients run: local (threads or processes here) or ray (actors, on one machine or a
    cluster); on Flower's runtime: flwr run ."""
    workers: Annotated[int, Key(how=True, engine=True)] = Field(0, ge=0)
    """Ray actors, each on one core (0: one a core of this machine); the result does not depend on
    it."""
    ray_address: Annotated[str, Key(how=True, engine=True)] = ""
    """Address of a running Ray cluster; auto for the one on this machine (empty: start Ray
    here)."""
    gpus_per_worker: Annotated[float, Key(how=True, engine=True)] = Field(0.0, ge=0)
    """GPUs of each Ray actor; fractions share one."""
    eval_every: int = Field(10, ge=1)
    """Rounds between evaluations; runs of 1000 rounds or more evaluate each of the last 100 too."""
    client_tests: bool = False
    """Also evaluate the global model on each client's own share of the test set, which has the
    classes that the client trains on: mean, standard deviation and the mean of the worst tenth."""
    test_groups: Literal["auto", "classes"] = "auto"
    """Groups of test images that are also told of one by one, with the worst group and the gap to
    the best: auto (those that the data set names, if any) or classes."""
    out: Annotated[PathText, Key(how=True)] = ""
    """Folder for the results, which must not exist (empty: a new one under runs/)."""
    checkpoint_every: Annotated[
        str, BeforeValidator(str), Field(pattern=r"^\d+s?$"), Key(how=True)
    ] = "60s"
    """Rounds (100) or seconds (60s) after which what --resume needs is saved anew, and when
    the run ends or is interrupted (0: never)."""
    save_every: Annotated[int, Key(how=True)] = Field(0, ge=0)
    """Rounds between models that are kept, models/000100.safetensors in the run's folder (0: none);
    each is the one that is evaluated: the average, once there is one."""
    profile: Annotated[bool, Key(how=True)] = False
    """Also print and save a table of the time by phase (profile.json)."""
    trace: Annotated[bool, Key(how=True)] = False
    """Also save a PyTorch profiler trace of rounds 3 to 5 (trace.json.gz)."""
    debug: Annotated[bool, Key(how=True)] = False
    """One thread, and the first client that raises ends the run with its traceback: for python -m
    pdb -m fedsam.simulate, and breakpoint() in code of yours."""
    track: Annotated[str, Key(how=True)] = ""
    """Follow the run live: tensorboard, wandb, mlflow (each an extra of that name) or import paths,
    between commas."""
    quiet: Annotated[bool, Key(how=True)] = False
    """Say nothing but what goes wrong."""
