"""``python -m fedsam.flatness RUN...``: how flat the loss is around the models of runs."""

import json
import math
import sys
import time
from argparse import SUPPRESS
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedsam import cli
from fedsam.base.errors import UsageError, flag, storing
from fedsam.base.system import write_whole
from fedsam.cli import Parser, progress_bar
from fedsam.runs import files

BETWEEN = "between"  # stands in the file for what is of several models
Place = tuple[Path, str]  # a run's folder, and the model in it; "": not said which
Results = dict[str, dict[str, Any]]  # by model, then by measure


METAVARS = {int: "N", float: "X", str: "NAME"}
# what the options of the measures mean; which measures take one, of which type, with which
# default: their signatures
OPTIONS = {
    "on": "train, test, client:K, clients (the mean over all clients, each on its own images) or "
    "clients:N (over N of them)",
    "images": "images at most, a seeded sample; 0: all",
    "rho": "radius of sharpness",
    "batch": "m of m-sharpness; 0: all",
    "steps": "of ascent, of Lanczos and of an attack",
    "eta": "of adaptive sharpness",
    "weights_only": "T = 1 on biases, as ASAM trains",
    "sigma": "of average sharpness",
    "eigenvalues": "how many of the largest",
    "probes": "random vectors",
    "points": "of a line, or of each axis of a surface",
    "reach": "of surfaces, filter-normalised",
    "directions": "of surface-line",
    "margin": "around a plane's models",
    "folder": "CIFAR-10-C's files, for corruptions; without it they are made here",
    "draws": "of weight-noise",
}


def flags() -> Parser:
    """Return the parser of the command's flags; the measures' options are those they take."""
    from fedsam.flatness import registry

    out = Parser(
        prog="python -m fedsam.flatness",
        description="Measures of flatness of a run's models, on its data: numbers into "
        f"{files.FLATNESS} and figures into the run's folder. docs/flatness.md has the formulas.",
        allow_abbrev=False,
        argument_default=SUPPRESS,
    )
    out.add_argument(
        "runs",
        nargs="+",
        type=cli.path,
        help="folders of runs, or that hold such, or model files (.safetensors) in them",
    )
    out.add_argument(
        "--measure",
        action="append",
        metavar="NAME",
        help=f"what to measure, again for more: {', '.join(registry.EVERY)}; of several models "
        f"{' and '.join(registry.COMPARISONS)} (default: {', '.join(registry.QUICK)})",
    )
    out.add_argument(
        "--model",
        action="append",
        metavar="NAME",
        help="a model file of the run without its ending, again for more (default: model)",
    )
    out.add_argument(
        "--along", action="store_true", help="every model that --save-every kept, over rounds"
    )
    out.add_argument("--device", help="in place of the run's: auto, cpu, cuda, cuda:1")
    out.add_argument("--data-root", metavar="DIR", help="in place of the run's")
    options = out.add_argument_group("options of the measures")
    for name, text in OPTIONS.items():
        defaults = registry.defaults_of(name)
        kind = type(next((d for d in defaults.values() if d is not None), 0.0))
        text = f"{text} (default: {_told(defaults)})"
        if kind is bool:
            options.add_argument(flag(name), action="store_true", help=text)
        else:
            options.add_argument(flag(name), type=kind, metavar=METAVARS[kind], help=text)
    return out


def _told(defaults: Mapping[str, Any]) -> str:
    """Return an option's defaults by measure in words: "5", or "5 of sharpness, 30 of density"."""
    by_value: dict[Any, list[str]] = {}
    for measure, value in defaults.items():
        shown = (
            "by the ball" if value is None else "none" if value is False or value == "" else value
        )
        by_value.setdefault(shown, []).append(measure)
    if len(by_value) == 1:
        return str(next(iter(by_value)))
    return "; ".join(f"{value} of {', '.join(names)}" for value, names in by_value.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 1 (disk full), 2 (wrong input) or 130."""

    def act() -> None:
        given = flags().read(arguments)
        go([place for path in given.pop("runs") for place in places(path)], given)

    return cli.run(act, stopped="stopped", interrupted="interrupted; what was measured is kept")


def places(path: Path) -> list[Place]:
    """Return a run's folder, that of a model's file, or the runs below another with a model.

    Raises
    ------
    UsageError
        If there is none.
    """
    if path.is_file():
        for folder in path.parents[:2]:
            if files.is_run(folder) and path.suffix == files.WEIGHTS:
                return [(folder, str(path.relative_to(folder).with_suffix("")))]
        raise UsageError(f"{path}: no model's file ({files.WEIGHTS}) in a run's folder")
    if files.is_run(path):
        return [(path, "")]
    below = [folder for folder in files.folders_below(path) if files.models_of(folder)]
    if not below:
        raise UsageError(f"{path}: no run with a model in it")
    return [(folder, "") for folder in below]


def go(found: Sequence[Place], given: dict[str, Any]) -> None:
    """Measure runs; show, write and draw the results."""
    from rich.console import Console

    from fedsam.flatness import registry
    from fedsam.flatness.figures import flatness as figures

    names = list(given.pop("measure", registry.QUICK))
    wanted, along = given.pop("model", None), given.pop("along", False)
    if along and wanted:
        raise UsageError("--along: stands without --model")
    place = {key: given.pop(key, "") for key in ("device", "data_root")}
    registry.check(names, given)
    console = Console()
    several = [name for name in names if name in registry.COMPARISONS]
    names = [name for name in names if name not in several]
    for folder, one in found if names else ():
        console.print(str(folder), highlight=False, markup=False, soft_wrap=True)
        models = [one] if one else _models(folder, wanted, along=along)
        before = read(folder)
        for model, name, result in measured(folder, models, names, given, place, console):
            before.setdefault(model, {})[name] = result
            with storing(folder):
                write_whole(folder / files.FLATNESS, json.dumps(_finite(before), indent=1) + "\n")
        drawn = figures.draw_all(folder, {m: before[m] for m in models}, along=along)
        for name in dict.fromkeys(registry.key(name, given) for name in names):
            console.print(table({model: before[model] for model in models}, name))
        say_where(console, drawn, folder)
    if several:
        each = [(run, m) for run, one in found for m in ([one] if one else wanted or [files.MODEL])]
        compare(each, several, given, place, console)


def say_where(console: Any, pictures: Sequence[str], folder: Path) -> None:
    """Print which files were written."""
    names = ", ".join([files.FLATNESS, *pictures])
    console.print(f"{names} in {folder}", highlight=False, markup=False, soft_wrap=True)


def compare(
    models: Sequence[Place],
    names: Sequence[str],
    options: dict[str, Any],
    place: dict[str, str],
    console: Any,
) -> None:
    """Measure what is between models, all with the first run's data; it lies in its folder."""
    from fedsam.flatness import registry
    from fedsam.flatness.figures import flatness as figures
    from fedsam.flatness.subject import subjects_of_models

    named, folder = subjects_of_models(models, **place), models[0][0]
    before = read(folder)
    found = before.setdefault(BETWEEN, {})
    for name in names:
        function, given = registry.COMPARISONS[name], registry.chosen(name, options)
        with progress(name, console) as tick:
            found[name] = function(named, **given, tick=tick)
        with storing(folder):
            write_whole(folder / files.FLATNESS, json.dumps(_finite(before), indent=1) + "\n")
        console.print(table({BETWEEN: found}, name))
    drawn = figures.draw_all(folder, {BETWEEN: found}, along=False)
    say_where(console, drawn, folder)


def measured(
    folder: Path,
    models: Sequence[str],
    names: Sequence[str],
    options: dict[str, Any],
    place: dict[str, str],
    console: Any,
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield model, measure and result, with a line of progress."""
    from fedsam.flatness import registry
    from fedsam.flatness.measures.cohort_spread import cohort_of_run, cohort_spread
    from fedsam.flatness.subject import read_model, subject_of_run

    subject = subject_of_run(folder, models[0], **place)
    for model in models:
        subject = subject.with_state(read_model(folder, model, subject.network.layout))
        for name in names:
            begin = time.perf_counter()
            with progress(f"{model}: {name}", console) as tick:
                if name == registry.COHORT:
                    cohort = cohort_of_run(folder, model, tick, **place)
                    given = registry.chosen(name, options)
                    result = cohort_spread(cohort, **given, tick=tick)
                else:
                    result = registry.take(subject, name, options, tick)
            seconds = time.perf_counter() - begin
            console.print(f"  {model}: {name}, {seconds:.1f} s", highlight=False)
            yield model, registry.key(name, options), result


@contextmanager
def progress(what: str, console: Any) -> Iterator[Callable[[int, int], None]]:
    """Show a line of progress; what it yields is told how much is done, and of how much."""
    from rich.progress import TimeRemainingColumn

    with progress_bar(console, TimeRemainingColumn(), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)


def read(folder: Path) -> Results:
    """Return what a run's flatness.json holds; nothing where there is none.

    Raises
    ------
    UsageError
        If it is damaged.
    """
    path = folder / files.FLATNESS
    try:
        found = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise UsageError(f"{path}: damaged: {error}; remove it") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path}: damaged: must hold a mapping; remove it")
    return found


def table(results: Results, name: str) -> Any:
    """Return a measure's scalars as rich's table: a column a model."""
    from rich.table import Table

    found = {model: measures[name] for model, measures in results.items() if name in measures}
    out = Table(name, *found, box=None, pad_edge=False)
    for key in next(iter(found.values()))["scalars"]:
        values = [result["scalars"].get(key) for result in found.values()]
        out.add_row(key, *("none" if v is None else f"{v:.5g}" for v in values))
    return out


def _models(folder: Path, wanted: Sequence[str] | None, *, along: bool) -> list[str]:
    if not along:
        return list(wanted or [files.MODEL])
    by_round = files.models_by_round(folder)
    if not by_round:
        raise UsageError(f"{folder}: --along: no models by round; train with --save-every N")
    return list(by_round.values())


def _finite(value: Any) -> Any:
    """Return the same as JSON can hold it: what is not finite as null."""
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
