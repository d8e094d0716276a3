"""``python -m fedsam.simulate``: one run of federated training, from flags and a YAML file."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn, get_origin

from fedsam.base.errors import TrainingError, UsageError, flag, nearest
from fedsam.base.system import Interrupted, listening
from fedsam.config.schema import Config, resolve

if TYPE_CHECKING:
    from fedsam.checkpoint import Snapshot
    from fedsam.results import Run


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
    for name, field in Config.model_fields.items():
        text = " ".join((field.description or "").split()).removesuffix(".")
        text = f"{text} (default: {_shown(field.default)})".replace("%", "%%")
        if field.annotation is bool:
            out.add_argument(flag(name), action=argparse.BooleanOptionalAction, help=text)
        else:
            out.add_argument(flag(name), metavar=_kind(field.annotation), help=text)
    return out


def parser() -> Parser:
    """Return the parser of the command: ``--config``, ``--resume`` and the keys."""
    out = key_parser()
    out.prog = "python -m fedsam.simulate"
    out.description = (
        "Federated training of one model. Flags stand before the --config file, the file before "
        "the --algorithm's preset, and that before the defaults."
    )
    out.add_argument(
        "--config",
        metavar="FILE",
        action="append",
        default=[],
        help="YAML file with these keys, or a shipped one's name; several are trained as one "
        "program, for which see docs/cohort.md",
    )
    out.add_argument(
        "--resume",
        metavar="DIR",
        default="",
        help="go on with the run in this folder from its last checkpoint; of its keys only those "
        "that say how it is computed, and --rounds, may be other ones",
    )
    out.add_argument(
        "--go-on",
        action="store_true",
        default=False,
        help="go on with the run in --out, where there is one, as --resume does",
    )
    return out


def _shown(default: Any) -> str:
    return "none" if default in ("", {}) else str(default)


def _kind(annotation: Any) -> str:
    names = {int: "N", float: "X", str: "NAME"}
    if get_origin(annotation) is dict:
        return "YAML"
    return names.get(annotation, "NAME")


def parse(arguments: Sequence[str] | None) -> list[tuple[Config, "Snapshot | None"]]:
    """Return the configs of these command-line arguments, and where their runs go on.

    One, or one a ``--config``; None is a run that begins.

    Raises
    ------
    UsageError
        One line that names the flag and says what would be right.
    """
    given = parser().read(arguments)
    files, folder, go_on = given.pop("config"), given.pop("resume"), given.pop("go_on")
    if folder:
        if files or go_on or "out" in given:
            raise UsageError("--resume: stands without --config, --out and --go-on")
        from fedsam.resume import resumed

        return [resumed(Path(folder), given)]
    found: list[tuple[Config, Snapshot | None]] = []
    for config in [resolve(given, file) for file in files or [""]]:
        if not go_on:
            found.append((config, None))
            continue
        from fedsam.resume import went_on

        found.append(went_on(config))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 1 (training failed), 2 (wrong input) or 130."""
    try:
        configs, snapshots = map(list, zip(*parse(arguments), strict=True))
        # only now: --help and a wrong flag are answered before torch is imported
        from fedsam.progress import Progress
        from fedsam.running import run
        from fedsam.together import run_together

        with Progress(configs) as progress, listening() as stop:
            if len(configs) == 1:
                watch = progress.update
                outcomes = [run(configs[0], watch, snapshot=snapshots[0], stop=stop)]
            else:
                outcomes = run_together(
                    configs,
                    lambda number, line: progress.update(line, number),
                    snapshots=snapshots,
                    stop=stop,
                )
        for config, outcome in zip(configs, outcomes, strict=True):
            progress.summarise(config, outcome)
    except UsageError as error:
        print(f"fedsam: error: {error}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"fedsam: training stopped: {error}", file=sys.stderr)
        return 1
    except Interrupted as error:
        print(f"fedsam: interrupted after round {error.round}{error.advice}", file=sys.stderr)
        return 128 + error.signal
    return 0


class _Command(ModuleType):
    """The module is its command: ``fedsam.simulate(alpha=0.05)`` runs one as well."""

    def __call__(self, config: str = "", **keys: Any) -> "Run":
        """Run an experiment, and return what it left.

        Parameters
        ----------
        config : str
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
        from fedsam.progress import Progress
        from fedsam.results import load
        from fedsam.running import run

        resolved = resolve(keys, config)
        with Progress([resolved]) as progress:
            return load(run(resolved, progress.update).folder)


sys.modules[__name__].__class__ = _Command

if __name__ == "__main__":
    sys.exit(main())
