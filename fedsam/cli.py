"""The command line: a parser whose flags are the keys of Config, errors in one line."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn, get_origin

from fedsam.base.errors import UsageError, flag, nearest
from fedsam.config.schema import Config, groups

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn


class Parser(argparse.ArgumentParser):
    """Argparse that raises UsageError instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        """Raise ``message`` as the one line that the user will see."""
        raise UsageError(message)

    def read(self, arguments: Sequence[str] | None) -> dict[str, Any]:
        """Return the arguments by name; an unknown flag is told the nearest one."""
        known, unknown = self.parse_known_args(arguments)
        if unknown:
            word = unknown[0].partition("=")[0]
            flags = [option for action in self._actions for option in action.option_strings]
            raise UsageError(f"{word}: no such flag{nearest(word, flags)}; --help lists all")
        return vars(known)


def key_parser() -> Parser:
    """Return a parser of the flags that are keys of Config: one for each of its fields."""
    out = Parser(allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for title, names in groups().items():
        group = out.add_argument_group(title[0].lower() + title[1:])
        for name in names:
            _add(group, name)
    return out


def _add(group: "argparse._ArgumentGroup", name: str) -> None:
    """Add the flag of a key."""
    field = Config.model_fields[name]
    text = " ".join((field.description or "").split()).removesuffix(".")
    text = f"{text} (default: {_shown(field.default)})".replace("%", "%%")
    if field.annotation is bool:
        group.add_argument(flag(name), action=argparse.BooleanOptionalAction, help=text)
    else:
        group.add_argument(flag(name), metavar=_kind(field.annotation), help=text)


def _shown(default: Any) -> str:
    return "none" if default in ("", {}) else str(default)


def _kind(annotation: Any) -> str:
    names = {int: "N", float: "X", str: "NAME"}
    if get_origin(annotation) is dict:
        return "YAML"
    return names.get(annotation, "NAME")


def progress_bar(
    console: "Console", *columns: "str | ProgressColumn", **options: Any
) -> "Progress":
    """Return the bar of every command: what, how far, and columns of its own.

    It is shown on a terminal alone. ``options`` are those of rich's Progress.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    what = TextColumn("{task.description}")
    disable = options.pop("disable", False) or not console.is_terminal
    return Progress(
        what,
        BarColumn(),
        MofNCompleteColumn(),
        *columns,
        console=console,
        disable=disable,
        **options,
    )
