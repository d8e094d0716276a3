"""``python -m fedsam.flatness RUN...``: how flat the loss is around the models of runs."""

import sys

from fedsam.base.system import end_at_once

if __name__ == "__main__":
    end_at_once()  # by a signal, while what follows is imported

import importlib
import json
import math
import time
from argparse import SUPPRESS
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedsam import cli
from fedsam.base.errors import UsageError, flag, plain
from fedsam.base.system import raising, write_whole
from fedsam.cli import Parser, progress_bar
from fedsam.flatness.options import COHORT, COMPARISONS, MEASURES, OPTIONS, QUICK
from fedsam.runs import files

BETWEEN = "between"  # stands in the file for what is of several models
ModelFile = tuple[Path, str]  # a run's folder, and the model in it; "": not said which
Results = dict[str, dict[str, Any]]  # by model, then by measure
METAVARS = {int: "N", float: "X", str: "NAME"}


def flags() -> Parser:
    """Return the parser of the command's flags; the measures' options are those they take."""
    parser = Parser(
        prog="python -m fedsam.flatness",
        description="Measures of flatness of a run's models, on its data: numbers into "
        f"{files.FLATNESS} and figures into the run's folder. docs/flatness.md has the formulas.",
        allow_abbrev=False,
        argument_default=SUPPRESS,
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=cli.path,
        help="folders of runs, or that hold such, or model files (.safetensors) in them",
    )
    parser.add_argument(
        "--measure",
        action="append",
        metavar="NAME",
        help=f"what to measure, again for more: {', '.join((*MEASURES, COHORT))}; of several "
        f"models {' and '.join(COMPARISONS)} (default: {', '.join(QUICK)})",
    )
    parser.add_argument(
        "--model",
        action="append",
        metavar="NAME",
        help="a model file of the run without its ending, again for more (default: model)",
    )
    parser.add_argument(
        "--along", action="store_true", help="every model that --save-every kept, over rounds"
    )
    parser.add_argument("--device", help="in place of the run's: auto, cpu, cuda, cuda:1")
    parser.add_argument("--data-root", metavar="DIR", help="in place of the run's")
    options = parser.add_argument_group("options of the measures")
    for name, option in OPTIONS.items():
        text = f"{option.text} (default: {option.default})"
        if option.type is bool:
            options.add_argument(flag(name), action="store_true", help=text)
        else:
            metavar = METAVARS[option.type]
            options.add_argument(flag(name), type=option.type, metavar=metavar, help=text)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 1 (disk full), 2 (wrong input) or 130."""

    def act() -> None:
        options = flags().read(arguments)
        paths = options.pop("runs")
        models = [model for path in paths for model in models_at(path)]
        importlib.import_module("fedsam.flatness.registry")  # nothing is raised out of this
        with raising():
            measure_models(models, options)

    return cli.run(act, stopped="stopped", interrupted="interrupted; what was measured is kept")


def models_at(path: Path) -> list[ModelFile]:
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


def measure_models(models: Sequence[ModelFile], options: dict[str, Any]) -> None:
    """Measure models of runs; show, write and draw the results."""
    from fedsam.flatness import registry
    from fedsam.flatness.figures import flatness as figures

    names = list(options.pop("measure", QUICK))
    chosen, along = options.pop("model", None), options.pop("along", False)
    if along and chosen:
        raise UsageError("--along: stands without --model")
    where = {key: options.pop(key, "") for key in ("device", "data_root")}
    registry.check(names, options)
    console = cli.console()
    comparisons = [name for name in names if name in COMPARISONS]
    names = [name for name in names if name not in comparisons]
    for folder, one in models if names else ():
        console.print(plain(str(folder)))
        files_of_run = [one] if one else _models(folder, chosen, along=along)
        results = read(folder)
        for model, name, result in measured(folder, files_of_run, names, options, where, console):
            results.setdefault(model, {})[name] = result
            write(folder, results)
        shown = {model: results[model] for model in files_of_run}
        pictures = figures.draw_all(folder, shown, along=along)
        for name in dict.fromkeys(registry.key(name, options) for name in names):
            show(console, shown, name)
        say_where(console, pictures, folder)
    if comparisons:
        each = [
            (run, model)
            for run, one in models
            for model in ([one] if one else chosen or [files.MODEL])
        ]
        compare(each, comparisons, options, where, console)


def write(folder: Path, results: Results) -> None:
    """Write a run's flatness.json."""
    with files.storing(folder):
        write_whole(folder / files.FLATNESS, json.dumps(_finite(results), indent=1) + "\n")


def say_where(console: Any, pictures: Sequence[str], folder: Path) -> None:
    """Print which files were written."""
    names = ", ".join([files.FLATNESS, *pictures])
    console.print(plain(f"{names} in {folder}"))


def compare(
    models: Sequence[ModelFile],
    names: Sequence[str],
    options: dict[str, Any],
    where: dict[str, str],
    console: Any,
) -> None:
    """Measure what is between models, all with the first run's data; it lies in its folder."""
    from fedsam.flatness import registry
    from fedsam.flatness.figures import flatness as figures
    from fedsam.flatness.subject import subjects_of_models

    named, folder = subjects_of_models(models, **where), models[0][0]
    results = read(folder)
    between = results.setdefault(BETWEEN, {})
    for name in names:
        function, taken = registry.COMPARISONS[name], registry.chosen(name, options)
        with progress(name, console) as tick:
            between[name] = function(named, **taken, tick=tick)
        write(folder, results)
        show(console, {BETWEEN: between}, name)
    pictures = figures.draw_all(folder, {BETWEEN: between}, along=False)
    say_where(console, pictures, folder)


def measured(
    folder: Path,
    models: Sequence[str],
    names: Sequence[str],
    options: dict[str, Any],
    where: dict[str, str],
    console: Any,
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield model, measure and result, with a line of progress."""
    from fedsam.flatness import registry
    from fedsam.flatness.measures.cohort_spread import cohort_of_run, cohort_spread
    from fedsam.flatness.subject import read_model, subject_of_run

    subject = subject_of_run(folder, models[0], **where)
    for model in models:
        subject = subject.with_state(read_model(folder, model, subject.network.layout))
        for name in names:
            begin = time.perf_counter()
            with progress(f"{model}: {name}", console) as tick:
                if name == COHORT:
                    cohort = cohort_of_run(folder, model, tick, **where)
                    result = cohort_spread(cohort, **registry.chosen(name, options), tick=tick)
                else:
                    result = registry.take(subject, name, options, tick)
            seconds = time.perf_counter() - begin
            console.print(f"  {model}: {name}, {seconds:.1f} s")
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
        results = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise UsageError(f"{path}: damaged: {error}; remove it") from error
    if not isinstance(results, dict):
        raise UsageError(f"{path}: damaged: must hold a mapping; remove it")
    return results


def show(console: Any, results: Results, name: str) -> None:
    """Print a measure's scalars with their errors, and what there is to know about them."""
    console.print(table(results, name), soft_wrap=False)
    for model, measures in results.items():
        for line in measures.get(name, {}).get("warnings", ()):
            console.print(f"  {model}: {name}: {line}")


def table(results: Results, name: str) -> Any:
    """Return a measure's scalars as rich's table: a column a model."""
    from rich.table import Table

    by_model = {model: measures[name] for model, measures in results.items() if name in measures}
    out = Table(name, *by_model, box=None, pad_edge=False)
    for scalar in next(iter(by_model.values()))["scalars"]:
        out.add_row(scalar, *(with_errors(result, scalar) for result in by_model.values()))
    return out


def with_errors(result: Mapping[str, Any], scalar: str) -> str:
    """Return a number and its errors: "9.25 ± 1.2 (images) ± 0.0001 (residual)"."""
    value = result["scalars"].get(scalar)
    if value is None or math.isnan(value):
        return "none"
    words = [f"{value:.5g}"]
    for cause, by_scalar in result.get("errors", {}).items():
        error = by_scalar.get(scalar)
        if error is not None and error > 0:
            words.append(f"± {error:.2g} ({cause})")
    return " ".join(words)


def _models(folder: Path, chosen: Sequence[str] | None, *, along: bool) -> list[str]:
    if not along:
        return list(chosen or [files.MODEL])
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
