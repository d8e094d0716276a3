"""The clients' side of the algorithm that a Config means."""

import inspect
from collections.abc import Mapping
from typing import Any

from fedsam.base.errors import UsageError
from fedsam.config import plugins
from fedsam.config.schema import Config
from fedsam.training.method import Correction, Loss, Method, Minimizer

MINIMIZERS = "fedsam.clients.minimizers"


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
