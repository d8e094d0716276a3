"""``python -m fedsam.simulate``: one run of federated training, from flags and a YAML file."""

import sys

from fedsam.base.system import end_at_once

if __name__ == "__main__":
    end_at_once()  # by a signal, while what follows is imported

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsam import cli
from fedsam.base.errors import UsageError
from fedsam.base.system import importing, listening
from fedsam.cli import Parser, key_parser
from fedsam.config.schema import Config, dump, resolve

if TYPE_CHECKING:
    from fedsam.runs.checkpoint import Snapshot


def parser() -> Parser:
    """Return the parser of the command: ``--config``, ``--resume`` and the keys."""
    out = key_parser()
    out.prog = "python -m fedsam.simulate"
    out.description = (
        "Federated training of one model. Flags override the --config file, the file the "
        "--algorithm's preset, and that the defaults."
    )
    out.add_argument(
        "--config",
        metavar="FILE",
        action="append",
        default=[],
        help="YAML file with these keys, or a shipped one's name; several are trained as one "
        "program, for which see docs/cohort.md; it names code to import: read one that you were "
        "given before you run it",
    )
    out.add_argument(
        "--resume",
        metavar="DIR",
        type=cli.path,
        default=None,
        help="go on with the run in this folder from its last checkpoint; of its keys only those "
        "that say how it is computed, and --rounds, may be other ones; its config names code to "
        "import",
    )
    out.add_argument(
        "--print-config",
        action="store_true",
        default=False,
        help="print all keys of the run as YAML, which --config takes, and do nothing else",
    )
    out.add_argument(
        "--go-on",
        action="store_true",
        default=False,
        help="go on with the run in --out, where there is one, as --resume does",
    )
    return out


def parse(arguments: Sequence[str] | None) -> list[tuple[Config, "Snapshot | None"]]:
    """Return the configs of these command-line arguments, and where their runs go on."""
    given = parser().read(arguments)
    del given["print_config"]
    return configs_of(given)


def configs_of(given: dict[str, Any]) -> list[tuple[Config, "Snapshot | None"]]:
    """Return the configs of arguments by name, and where their runs go on.

    One, or one a ``--config``, but for those that have ended; None is a run that begins.

    Raises
    ------
    UsageError
        One line that names the flag and says what would be right.
    """
    files, folder, go_on = given.pop("config"), given.pop("resume"), given.pop("go_on")
    if folder:
        if files or go_on or "out" in given:
            raise UsageError("--resume: stands without --config, --out and --go-on")
        from fedsam.simulate.resume import ended, resumed

        config, snapshot = resumed(folder, given)
        if not given and ended(config, snapshot):
            _leave_alone(folder)
            return []
        return [(config, snapshot)]
    found: list[tuple[Config, Snapshot | None]] = []
    for config in [resolve(given, file) for file in files or [""]]:
        if not go_on:
            found.append((config, None))
            continue
        from fedsam.simulate.resume import went_on

        place = went_on(config)
        if place is None:
            _leave_alone(Path(config.out))
        else:
            found.append(place)
    return found


def _leave_alone(folder: Path) -> None:
    """Say that a run has ended, and how it would go on all the same."""
    from fedsam.runs.run import ending

    print(
        f"{folder}: has ended ({ending(folder)[1]}) and is left as it is; more --rounds, another "
        "--target-accuracy or another --patience let it go on"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 1 (training failed), 2 (wrong input) or 130."""
    return cli.run(lambda: train(arguments))


def train(arguments: Sequence[str] | None) -> None:
    """Train what the arguments say, with a line of progress and a summary."""
    given = parser().read(arguments)
    only_print = given.pop("print_config")
    begins = configs_of(given)
    if only_print:
        print("---\n".join(dump(config) for config, _ in begins), end="")
        return
    if not begins:
        return
    configs, snapshots = map(list, zip(*begins, strict=True))
    # only now: --help and a wrong flag are answered before torch is imported
    from fedsam.simulate.progress import Progress

    with Progress(configs) as progress, listening() as stop:
        with importing("torch"):
            from fedsam.simulate.run import run

        if len(configs) == 1:
            watch = progress.update
            outcomes = [run(configs[0], watch, snapshot=snapshots[0], stop=stop)]
        else:
            from fedsam.simulate.joint import run_together

            outcomes = run_together(
                configs,
                lambda number, line: progress.update(line, number),
                snapshots=snapshots,
                stop=stop,
            )
    for config, outcome in zip(configs, outcomes, strict=True):
        progress.summarise(config, outcome)


if __name__ == "__main__":
    sys.exit(main())
