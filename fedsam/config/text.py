"""YAML as text: the one way in which configs, options and sweeps are read and written.

Scalars are those of YAML 1.2, and numbers as Python writes them: ``1e-3`` is a number, ``010`` is
ten, ``1:30``, ``2026-11-27`` and ``no`` are texts. Nothing is made but numbers, texts, lists and
mappings, in time and memory that are bounded.
"""

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from fedsam.base.errors import UsageError, one_line

try:
    from yaml import CSafeLoader as _SafeLoader
except ImportError:  # PyYAML without libyaml: the same, ten times slower
    from yaml import SafeLoader as _SafeLoader

MOST_DIGITS = 300  # as many as a float can have
MOST_BYTES, MOST_NODES, MOST_LEVELS = 2**20, 50_000, 50
# what PyYAML raises at texts that are none, beside its own errors: of !!int x, of !!bool x, ...
WRONG = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
TAG = "tag:yaml.org,2002:"
PLAIN = {  # by the name of its tag: the pattern of an unquoted scalar, and how it may begin
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(?:0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+|[0-9][0-9_]*)", list("-+0123456789")),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)"
        r"|[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
    "word": (r"(?:yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF)", list("yYnNoO")),
}
BASES = {"0x": 16, "0o": 8, "0b": 2}


class Word(str):
    """An unquoted yes, no, on or off: a text, which was true or false in YAML 1.1.

    A key that is true or false takes it so; an option, whose type is not known, cannot.
    """


class _Loader(_SafeLoader):
    """PyYAML's safe loader with the scalars above, which refuses a key that stands there twice."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}
    yaml_constructors: ClassVar[dict[str | None, Any]] = {
        name: _SafeLoader.yaml_constructors[name]
        for name in (None, *(TAG + name for name in ("null", "bool", "float", "str", "seq", "map")))
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping's values."""
        keys = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.tag != TAG + "merge":
                name = self.construct_object(key)
                if name in keys:
                    raise yaml.MarkedYAMLError(
                        problem=f"{name!r:.40} stands there twice", problem_mark=key.start_mark
                    )
                keys.add(name)
        values: dict[Any, Any] = super().construct_mapping(node, deep)
        return values


class _Dumper(yaml.SafeDumper):
    """Its counterpart: quotes the texts that the loader, or one of YAML 1.1, takes otherwise."""


def _whole(loader: Any, node: Any) -> int:
    digits = loader.construct_scalar(node).replace("_", "").lower()
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits, BASES.get(digits.lstrip("-+")[:2], 10))


_Loader.add_constructor(TAG + "int", _whole)
_Loader.add_constructor(TAG + "word", lambda loader, node: Word(loader.construct_scalar(node)))
_Dumper.add_representer(Word, lambda dumper, word: dumper.represent_str(str(word)))
for _name, (_pattern, _first) in PLAIN.items():
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(TAG + _name, re.compile(f"^(?:{_pattern})$"), _first)


def load(path: Path) -> Any:
    """Return what a YAML file says.

    Raises
    ------
    UsageError
        The reason, in one line, if it cannot be read, is too long, or is none.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        return parse(data.decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(one_line(error)) from error


def parse(text: str) -> Any:
    """Return what a YAML or JSON text says.

    Raises
    ------
    UsageError
        The reason, in one line, if it is none, is too long or too deep.
    """
    if len(text) > MOST_BYTES:
        raise UsageError(f"it is longer than {MOST_BYTES // 2**20} MiB")
    try:
        _check_size(text)
        return yaml.load(text, _Loader)
    except UsageError:
        raise
    except WRONG as error:
        raise UsageError(one_line(error)) from error


def _check_size(text: str) -> None:
    """Raise UsageError if a text holds too much, each alias counted as all that it stands for."""
    nodes = 0
    open_nodes: list[tuple[str | None, int]] = []  # anchor, and nodes before
    sizes: dict[str | None, int] = {}
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            sizes[anchor] = nodes - before
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_nodes):
                raise UsageError(f"*{event.anchor} stands in what it refers to")
            nodes += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.NodeEvent):
            nodes += 1
            if isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append((event.anchor, nodes - 1))
        if nodes > MOST_NODES:
            raise UsageError(f"it holds more than {MOST_NODES} values")
        if len(open_nodes) > MOST_LEVELS:
            raise UsageError(f"it is nested more than {MOST_LEVELS} levels deep")


def write(value: Any) -> str:
    """Return the YAML from which ``parse`` makes the same value, mappings in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)
