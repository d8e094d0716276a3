"""The command line: ``fedsam COMMAND``, a parser of Config's keys, errors to exit codes."""

import argparse
import ast
import importlib
import logging
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from io import TextIOWrapper
from pathlib import Path
from signal import SIGINT
from typing import TYPE_CHECKING, Any, NoReturn, get_origin

import fedsam
from fedsam.base.errors import TrainingError, UsageError, flag, nearest, plain
from fedsam.base.system import Interrupted, Signalled, end_at_once, expanded
from fedsam.config.presets import CONFIGS
from fedsam.config.schema import Config, groups

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn

COMMANDS = {
    "simulate": "one run of federated training, or several as one program",
    "sweep": "a grid of runs, and their report",
    "report": "tables and figures of finished runs",
    "pack": "a large data set in a few files, of which a run reads what it needs",
    "flatness": "how flat the loss is around the models of runs",
    "list": "names of algorithms, minimizers, ... and what they are",
}
FOLDERS = {  # of plug-ins: a file each
    "minimizers": "clients/minimizers",
    "clients": "clients/corrections",
    "losses": "clients/losses",
    "strategies": "strategies",
    "averages": "strategies/averages",
    "models": "models",
}
FUNCTIONS = {
    "datasets": ("sources/load.py", "LOADERS", "LISTINGS"),
    "partitions": ("partitions/splits.py", "METHODS"),
}
COMMON = (  # keys that a short help explains
    *("dataset", "model", "clients", "clients_per_round", "partition", "alpha", "rounds"),
    *("algorithm", "rho", "lr", "batch_size", "swa", "seed", "engine", "device", "out"),
)
KINDS = ("algorithms", *FOLDERS, *FUNCTIONS, "sweeps")


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
            raise UsageError(f"{word}: no such flag{nearest(word, flags)}; --help-all lists them")
        return vars(known)


class ShortHelp(argparse.Action):
    """Prints the flags of every day, and of the others the names."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> NoReturn:
        """Print the help, and end."""
        keys = groups()
        others = {name for names in keys.values() for name in names} - set(COMMON)
        # positional arguments, the command's own flags, then keys in the order of COMMON
        explained = [action for action in parser._actions if action.dest not in others]
        explained.sort(key=lambda a: COMMON.index(a.dest) if a.dest in COMMON else -1)
        text = parser.formatter_class(prog=parser.prog)
        places = [action.dest for action in explained if not action.option_strings]
        text.add_usage(" ".join([parser.prog, *places, "[FLAG VALUE ...]"]), [], [])
        text.add_text(parser.description)
        text.add_arguments(explained)
        print(text.format_help())
        for title, names in keys.items():
            rest = " ".join(flag(name) for name in names if name in others)
            print(textwrap.fill(f"{title}: {rest}", 80, break_on_hyphens=False), end="\n\n")
        print("--help-all explains these, too.")
        parser.exit()


def key_parser() -> Parser:
    """Return a parser of the flags that are keys of Config: one for each of its fields."""
    out = Parser(allow_abbrev=False, add_help=False, argument_default=argparse.SUPPRESS)
    out.add_argument("-h", "--help", action=ShortHelp, nargs=0, help="show the usual flags")
    out.add_argument("--help-all", action="help", help="show all flags")
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
    return "none" if default in ("", {}, None) else str(default)


def _kind(annotation: Any) -> str:
    names = {int: "N", int | None: "N", float: "X", str: "NAME"}
    if get_origin(annotation) is dict:
        return "YAML"
    return names.get(annotation, "NAME")


def console(*, stderr: bool = False) -> "Console":
    """Return the console of every command: what it prints is text, with no markup in it."""
    from rich.console import Console

    options: dict[str, Any] = {}
    if in_notebook():  # as to a file: else each line is an output of its own
        options = {"force_jupyter": False, "force_terminal": False}
    return Console(
        stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=True, **options
    )


def in_notebook() -> bool:
    """Return whether what is printed goes below a notebook's cell."""
    from rich.console import Console

    return Console().is_jupyter


def hush_flower() -> None:
    """Let Flower say errors only: its strategies log every round."""
    logging.getLogger("flwr").addFilter(_an_error)


def _an_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def progress_bar(
    console: "Console", *columns: "str | ProgressColumn", **options: Any
) -> "Progress":
    """Return the bar of every command: what, how far, and columns of its own.

    It is shown on a terminal alone. ``options`` are those of rich's Progress.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    what = TextColumn("{task.description}", markup=False)
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


def path(text: str) -> Path:
    """Return a path that a flag gives, for a parser's ``type``: ``~`` and ``$VAR`` are read."""
    try:
        return Path(expanded(text))
    except UsageError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error


def run(
    act: Callable[[], int | None],
    *,
    stopped: str = "training stopped",
    interrupted: str = "interrupted",
) -> int:
    """Do what a command does; return its exit code, having said what went wrong in one line.

    Parameters
    ----------
    act : callable
        The command; may return an exit code.
    stopped, interrupted : str
        What is said of a TrainingError, and of Ctrl-C where nothing listens to it.

    Returns
    -------
    int
        0, 1 (it could not go on), 2 (wrong input), 128 + n (signal n).
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal or file that has not every character
            stream.reconfigure(errors="backslashreplace")
    try:
        return act() or 0
    except UsageError as error:
        print(f"fedsam: error: {error}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"fedsam: {stopped}: {error}", file=sys.stderr)
        return 1
    except Interrupted as error:
        said = plain(f"interrupted after round {error.round}{error.advice}")
        print(f"fedsam: {said}", file=sys.stderr)
        return 128 + error.signal
    except KeyboardInterrupt as error:
        print(f"fedsam: {interrupted}", file=sys.stderr)
        return 128 + (error.signal if isinstance(error, Signalled) else SIGINT)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``fedsam``: hand the rest of the words to the command that the first one names."""
    if arguments is None:  # a process of its own
        end_at_once()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: fedsam COMMAND ..., fedsam COMMAND --help, fedsam --version\n")
        print("\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items()))
        return 0
    if words[0] == "--version":
        print(f"fedsam {fedsam.__version__}")
        return 0
    if words[0] == "list":
        return run(lambda: show(words[1:]))
    if words[0] not in COMMANDS:
        what = f"{plain(words[0])}: no such command{nearest(words[0], COMMANDS)}"
        print(f"fedsam: error: {what}; have {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    code: int = importlib.import_module(f"fedsam.{words[0]}.__main__").main(words[1:])
    return code


def show(arguments: Sequence[str]) -> None:
    """Print the names of each kind, or of one, with what they are; nothing is imported."""
    parser = Parser(prog="fedsam list", description="Names, and what they are.")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}")
    kinds = parser.read(arguments)["kinds"]
    for kind in kinds:
        if kind not in KINDS:
            raise UsageError(
                f"list {kind}: no such kind{nearest(kind, KINDS)}; have {', '.join(KINDS)}"
            )
    for kind in kinds or KINDS:
        lines = dict(_listed(kind))
        width = max(map(len, lines))
        alone = len(kinds) == 1
        print("" if alone else f"{kind}\n", end="")
        for name, what in lines.items():
            print(f"{'' if alone else '  '}{name:{width}}  {what}".rstrip())


def _listed(kind: str) -> Iterator[tuple[str, str]]:
    """Yield the names of a kind, each with its comment's or docstring's first line."""
    if kind in ("algorithms", "sweeps"):
        for file in sorted(CONFIGS.glob(f"{kind}/*.yaml")):
            yield file.stem, file.read_text().partition("\n")[0].removeprefix("# ")
        return
    if kind in FUNCTIONS:
        name, *tables = FUNCTIONS[kind]
        for table in tables:
            yield from _of_table(Path(__file__).parent / "data" / name, table)
        return
    folder = next(p for f in fedsam.__path__ if (p := Path(f) / FOLDERS[kind]).is_dir())
    for file in sorted(folder.glob("*.py")):
        if file.stem != "__init__":
            yield file.stem, _first_line(ast.parse(file.read_text()))


def _of_table(file: Path, table: str) -> Iterator[tuple[str, str]]:
    """Yield the keys of a dict of functions in a module, with what the functions say."""
    trees = {path: ast.parse(path.read_text()) for path in file.parent.glob("*.py")}
    nodes = [node for tree in trees.values() for node in tree.body]
    said = {node.name: _first_line(node) for node in nodes if isinstance(node, ast.FunctionDef)}
    for node in trees[file].body:
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.value, ast.Dict)
            and ast.unparse(node.target) == table
        ):
            for key, function in zip(node.value.keys, node.value.values, strict=True):
                yield str(getattr(key, "value", "")), said.get(ast.unparse(function), "")


def _first_line(node: ast.Module | ast.FunctionDef) -> str:
    return (ast.get_docstring(node) or "").partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
