"""A name or an import path -> the class it means: the only dynamic import.

``asam`` is the class ``ASAM`` of ``clients/minimizers/asam.py``: a file holds one method, the
class whose lower-case name is the file's without underscores. ``package.module:Class`` is yours.
"""

import importlib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedsam.base.errors import UsageError, flag, nearest, one_line

NONE: Mapping[str, Any] = MappingProxyType({})
EXTRAS = {"flwr_datasets": "flwr-datasets"}  # modules that an extra of ours installs


def names(package: str) -> list[str]:
    """Return the methods that a package's folder holds, e.g. of ``"fedsam.clients.minimizers"``."""
    folders = importlib.import_module(package).__path__
    files = [path for folder in folders for path in Path(folder).glob("*.py")]
    return sorted(path.stem for path in files if path.stem != "__init__")


def find(key: str, value: str, package: str) -> type:
    """Return the class that ``value`` means.

    Parameters
    ----------
    key : str
        The config key it came from, for the error message.
    value : str
        A name out of ``package``, or ``package.module:Class``.
    package : str
        Where names are looked up.

    Raises
    ------
    UsageError
        If there is no such method, module or class.
    """
    if ":" in value:
        return imported(key, value)
    value = value.replace("-", "_")
    if value not in names(package):
        raise UsageError(
            f"{flag(key)}: no {value!r}{nearest(value, names(package))}; "
            f"have {', '.join(names(package))}, or package.module:Class"
        )
    module = importlib.import_module(f"{package}.{value}")
    wanted = value.replace("_", "")
    return next(c for n, c in inspect.getmembers(module, inspect.isclass) if n.lower() == wanted)


def imported(key: str, path: str) -> Any:
    """Return the object that ``package.module:Name`` means; the working folder is searched too.

    Raises
    ------
    UsageError
        If the module or the name does not exist.
    """
    module, _, name = path.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise UsageError(
                f"{flag(key)} {path}: {module} imports {error.name!r}, which is not installed"
            ) from error
        extra = f"; pip install 'fedsam[{EXTRAS[error.name]}]'" if error.name in EXTRAS else ""
        raise UsageError(f"{flag(key)} {path}: there is no module {error.name!r}{extra}") from error
    if not hasattr(found, name):
        raise UsageError(
            f"{flag(key)} {path}: {module} has no {name!r}{nearest(name, vars(found))}"
        )
    return getattr(found, name)


def build(
    key: str, cls: Any, options: Mapping[str, Any], facts: Mapping[str, Any] = NONE, /, **run: Any
) -> Any:
    """Construct ``cls`` from its options, from facts, and from what it asks of the run.

    Nothing that a class does not ask for is set over its own default.

    Parameters
    ----------
    key : str
        The config key, whose options are ``key_options``.
    cls : callable
        A class or function.
    options : mapping
        What the user set for it; stands before all else.
    facts : mapping
        What cannot be otherwise, such as the number of classes of the data: set wherever the
        signature names it, over a default, too.
    **run
        Values of the run (rho, eta, momentum, ...): fill parameters of these names that have no
        default, and those that the class names in ``needs``, a tuple of names.

    Raises
    ------
    UsageError
        If an option is unknown, a parameter is missing, or the class refuses a value.
    """
    where = flag(f"{key}_options")
    own = inspect.signature(cls).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in own.values())
    for name in options:
        if name not in own and not open_ended:
            known = ", ".join(own) or "none"
            raise UsageError(
                f"{where}: {cls.__name__} has no option {name!r}{nearest(name, own)}; "
                f"it takes: {known}"
            )
    # a class that takes any keyword hands it on to its parents
    lineage = getattr(cls, "__mro__", ()) if open_ended else ()
    taken = dict(own)
    for parent in lineage:
        taken = {**inspect.signature(parent).parameters, **taken}
    needs = tuple(getattr(cls, "needs", ()))
    asked = {*needs, *(name for name, p in taken.items() if p.default is p.empty)}
    values = {name: value for name, value in run.items() if name in asked}
    values |= {name: value for name, value in facts.items() if name in taken}
    values |= options
    missing = [
        p.name
        for p in own.values()
        if p.default is p.empty
        and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        and p.name not in values
    ]
    if missing:
        raise UsageError(f"{where}: {cls.__name__} needs {', '.join(missing)}")
    if unknown := [name for name in needs if name not in values]:
        have = ", ".join(sorted(run)) or "nothing"
        raise UsageError(f"{where}: {cls.__name__} needs {unknown[0]}: of a run it gets {have}")
    try:
        return cls(**values)
    except UsageError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:  # timm's of an unknown name is the last
        raise UsageError(
            f"{where if options else flag(key)}: {cls.__name__}: {one_line(error)}"
        ) from error
