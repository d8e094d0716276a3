"""Federated learning with sharpness-aware clients and weight averaging on the server.

Importing this package imports nothing heavy; ``python -m fedsam.simulate --help`` is a start.
"""

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy

    from fedsam.base.errors import TrainingError, UsageError
    from fedsam.base.strategy import ServerMethod
    from fedsam.config.schema import Config
    from fedsam.runs.run import Run

# in a checkout and in Flower's app bundle clients, strategies and configs lie beside this folder
if not (_HERE := Path(__file__).resolve().parent).joinpath("clients").is_dir():
    __path__.append(str(_HERE.parent))

__version__: str  # of the package that is installed, or "checkout"
__all__ = ["Config", "TrainingError", "UsageError", "as_strategy", "load", "run"]


def run(config: "str | PathLike[str]" = "", **keys: Any) -> "Run":
    """Run an experiment, and return what it left.

    Parameters
    ----------
    config : str or path
        A YAML file, or the name of a shipped one.
    **keys
        Config keys: what the flags are called, with underscores.

    Raises
    ------
    UsageError
        If a key is wrong, or asks for what there is not.
    TrainingError
        If no client's update can be used any more.
    """
    from fedsam.config.schema import resolve
    from fedsam.simulate.progress import Progress
    from fedsam.simulate.run import run

    resolved = resolve(keys, config)
    with Progress([resolved]) as progress:
        return load(run(resolved, progress.update).folder)


def load(folder: "str | PathLike[str]") -> "Run":
    """Read the folder of a finished run.

    Raises
    ------
    UsageError
        If it is no folder of a finished run.
    """
    from fedsam.runs.run import load
    from fedsam.simulate.build.model import new_network

    return load(Path(folder), new_network)


def as_strategy(method: "ServerMethod", **flower: Any) -> "Strategy":
    """Return a Flower Strategy that updates as a method of ours says, for any ServerApp.

    Parameters
    ----------
    method : ServerMethod
        Such as ``fedsam.strategies.fedadam.FedAdam()``.
    **flower
        Arguments of Flower's FedAvg: ``fraction_train``, ``weighted_by_key``, ...

    Raises
    ------
    UsageError
        If it is no server method.
    """
    from fedsam.server.adapter import MethodStrategy

    return MethodStrategy(method, **flower)


def __getattr__(name: str) -> object:
    """Import classes when they are asked for: ``import fedsam`` alone is instant."""
    if name == "Config":
        from fedsam.config.schema import Config

        return Config
    if name == "__version__":
        from fedsam.base.system import version

        return version("fedsam")
    if name in ("TrainingError", "UsageError"):
        from fedsam.base import errors

        return getattr(errors, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
