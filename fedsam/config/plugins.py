"""A name or an import path -> the class it means: the only dynamic import.

``asam`` is the class ``ASAM`` of ``clients/minimizers/asam.py``: a file holds one method, the
class whose lower-case name is the file's without underscores. ``package.module:Class`` is yours.

A config that was received names import paths, too, and gives them arguments. So nothing is called
that is not known beforehand to make what is asked for: see ``imported``.
"""

import importlib
import inspect
import sys
import sysconfig
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from types import FunctionType, MappingProxyType, UnionType
from typing import Any, get_args

from fedsam.base.errors import UsageError, flag, nearest, one_line

Kind = type | UnionType
NONE: Mapping[str, Any] = MappingProxyType({})
EXTRAS = {"flwr_datasets": "flwr-datasets"}  # modules that an extra of ours installs


def names(package: str) -> list[str]:
    """Return the methods that a package's folder holds, e.g. of ``"fedsam.clients.minimizers"``."""
    folders = importlib.import_module(package).__path__
    files = [path for folder in folders for path in Path(folder).glob("*.py")]
    return sorted(path.stem for path in files if path.stem != "__init__")


def find(key: str, value: str, package: str, kind: Kind, *, functions: bool = True) -> Any:
    """Return the class or function that ``value`` means.

    Parameters
    ----------
    key : str
        The config key it came from, for the error message.
    value : str
        A name out of ``package``, or ``package.module:Name``.
    package : str
        Where names are looked up.
    kind, functions
        As ``imported`` takes them.

    Raises
    ------
    UsageError
        If there is no such method, module or class, or it is of another kind.
    """
    if ":" in value:
        return imported(key, value, kind, functions=functions)
    value = value.replace("-", "_")
    if value not in names(package):
        raise UsageError(
            f"{flag(key)}: no {value!r}{nearest(value, names(package))}; "
            f"have {', '.join(names(package))}, or package.module:Class"
        )
    module = importlib.import_module(f"{package}.{value}")
    wanted = value.replace("_", "")
    return next(c for n, c in inspect.getmembers(module, inspect.isclass) if n.lower() == wanted)


def imported(
    key: str, path: str, kind: Kind, *, classes: bool = True, functions: bool = True
) -> Any:
    """Return the class or function that ``package.module:Name`` means, which makes a ``kind``.

    The working folder is searched, too. Importing a module runs it; beyond that, nothing is called
    but a subclass of ``kind``, a function of the user's own, or an installed package's function
    whose annotation says that it returns a ``kind``. Python's own modules hold no plug-ins and are
    not imported.

    Parameters
    ----------
    key : str
        The config key it came from, for the error message.
    path : str
        ``package.module:Name``.
    kind : type or union of types
        What must be made; of a protocol, all methods must be there.
    classes, functions : bool
        Whether a class, a function may make it.

    Raises
    ------
    UsageError
        If the module or the name does not exist, or means something else.
    """
    here = f"{flag(key)} {path}"
    must = _must(kind, classes=classes, functions=functions)
    module, _, name = path.partition(":")
    parts = module.split(".")
    if not all(map(str.isidentifier, [*parts, name])):
        raise UsageError(f"{here}: must be package.module:Name")
    if parts[0] in sys.stdlib_module_names or "__main__" in parts:
        raise UsageError(f"{here}: {module} is Python's own, or a program; {must}")
    found = _member(here, module, name)
    if inspect.isclass(found):
        if not classes:
            raise UsageError(f"{here}: is a class; {must}")
        if not issubclass(found, kind):
            raise UsageError(f"{here}: {must}")
        return found
    function = _function(found)
    if function is None or not functions:
        raise UsageError(f"{here}: {must}")
    if _installed(function) and not _returns(function, kind):
        raise UsageError(f"{here}: {must}; a package's function must say so, by its annotation")
    return found


def _member(here: str, module: str, name: str) -> Any:
    """Import a module; return what it calls so."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise UsageError(
                f"{here}: {module} imports {error.name!r}, which is not installed"
            ) from error
        extra = f"; pip install 'fedsam[{EXTRAS[error.name]}]'" if error.name in EXTRAS else ""
        raise UsageError(f"{here}: there is no module {error.name!r}{extra}") from error
    except SystemExit as error:
        raise UsageError(f"{here}: {module} is a program, which ended when imported") from error
    if not hasattr(found, name):
        raise UsageError(f"{here}: {module} has no {name!r}{nearest(name, vars(found))}")
    return getattr(found, name)


def own(found: Any) -> bool:
    """Return whether a class or function lies in no installed package: it is the user's."""
    function = _function(found)
    return not _installed(function if function is not None else found)


def _function(found: Any) -> FunctionType | None:
    """Return the function written in Python that is behind ``found`` and its decorators."""
    function = inspect.unwrap(found) if callable(found) else None
    return function if isinstance(function, FunctionType) else None


def _installed(found: Any) -> bool:
    """Return whether a class or function comes with Python, with fedsam or another package."""
    if (found.__module__ or "").partition(".")[0] == "fedsam":
        return True
    if isinstance(found, FunctionType):
        file = Path(found.__code__.co_filename).resolve()
    else:
        file = Path(getattr(sys.modules.get(found.__module__), "__file__", None) or "")
    library = Path(sysconfig.get_path("stdlib")).resolve()
    return bool({"site-packages", "dist-packages"} & set(file.parts)) or library in file.parents


def _returns(function: FunctionType, kind: Kind) -> bool:
    """Return whether its annotation says that a function returns a ``kind``."""
    said = function.__annotations__.get("return")
    if isinstance(said, str):
        first, *rest = said.split(".")
        first_held = function.__globals__.get(first)
        said = reduce(lambda held, name: getattr(held, name, None), rest, first_held)
    return inspect.isclass(said) and issubclass(said, kind)


def _must(kind: Kind, *, classes: bool, functions: bool) -> str:
    """Return what a class or function must be."""
    kinds = get_args(kind) or (kind,)
    named = [cls for cls in kinds if not getattr(cls, "_is_protocol", False)]
    names = " or ".join(f"{cls.__module__}.{cls.__name__}" for cls in named)
    if not classes:
        return f"must be a function that returns a {names}"
    if not named:
        methods = [n for n, v in vars(kind).items() if isinstance(v, FunctionType) and n[0] != "_"]
        return f"needs the methods {', '.join(methods[:-1])} and {methods[-1]}"
    return f"must derive from {names}{', or be a function that returns one' if functions else ''}"


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
