"""The network that a Config means, with its first weights."""

import inspect
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fedsam.base.errors import UsageError
from fedsam.base.randomness import global_streams
from fedsam.config import plugins
from fedsam.config.schema import Config
from fedsam.data.datasets import Dataset
from fedsam.simulate.build.data import load_dataset
from fedsam.simulate.build.work import augmentations_of, shape_after
from fedsam.training.dry_pass import initialise_lazy_layers

MODELS = {  # else the paper's cnn
    "digits": "digits-cnn",
    "rotated-digits": "digits-cnn",
    "digit-scenes": "scenes-cnn",
    "camvid": "lraspp",
    "mnist": "mlp",
    "fashion-mnist": "mlp",
}
WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # PyTorch then unpickles nothing else


def new_model(config: Config, dataset: Dataset) -> nn.Module:
    """Return the network with the run's first weights, on the CPU."""
    name = model_name(config)
    make = plugins.find("model", name, "fedsam.models", nn.Module)
    augmented = shape_after(augmentations_of(config, dataset), dataset)
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


def model_name(config: Config) -> str:
    """Return the name of the model, the data set's usual one unless the config names one."""
    return MODELS.get(config.dataset, "cnn") if config.model == "auto" else config.model


def new_network(config: Config) -> nn.Module:
    """Return the network of a run, whose data set says its shape, on the CPU."""
    return new_model(config, load_dataset(config))


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


def _says_nothing(make: Any, given: Collection[str]) -> bool:
    """Return whether it is a function that takes any keyword and names none of these."""
    parameters = inspect.signature(make).parameters
    any_keyword = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return any_keyword and not inspect.isclass(make) and not set(given) & set(parameters)
