"""``python -m fedsam.flatness RUN...``: how flat the loss is around the models of runs."""

import json
import math
import sys
import time
from argparse import SUPPRESS
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedsam.errors import StorageError, UsageError, storing
from fedsam.files import write_whole
from fedsam.simulate import Parser

FILE = "flatness.json"
Results = dict[str, dict[str, Any]]  # by model, then by measure


def flags() -> Parser:
    """Return the parser of the command's flags."""
    out = Parser(
        prog="python -m fedsam.flatness",
        description="Measures of flatness of a run's models, on its data: numbers into "
        "flatness.json and figures into the run's folder. docs/flatness.md has the formulas.",
        allow_abbrev=False,
        argument_default=SUPPRESS,
    )
    out.add_argument("runs", nargs="+", type=Path, help="folders of runs, or that hold such")
    out.add_argument(
        "--measure",
        action="append",
        metavar="NAME",
        help="what to measure, again for more: slope, hessian, trace, density, sharpness, "
        "sharpness-inf, average-sharpness, average-sharpness-inf, and the last four with "
        "adaptive- in front (default: slope, sharpness, adaptive-sharpness and hessian)",
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
    options.add_argument(
        "--on",
        metavar="WHERE",
        help="train, test, client:K, clients (the mean over all clients, each on its own images) "
        "or clients:N (over N of them) (default: train)",
    )
    options.add_argument(
        "--images", type=int, help="images at most, a seeded sample; 0: all (default: 512)"
    )
    options.add_argument("--rho", type=float, help="radius of sharpness (default: by measure)")
    options.add_argument("--batch", type=int, help="m of m-sharpness; 0: all (default: 128)")
    options.add_argument(
        "--steps", type=int, help="of the ascent (default: 5), of the density (default: 30)"
    )
    options.add_argument("--eta", type=float, help="of adaptive sharpness (default: 0)")
    options.add_argument(
        "--weights-only", action="store_true", help="T = 1 on biases, as ASAM trains"
    )
    options.add_argument("--sigma", type=float, help="of average sharpness (default: by measure)")
    options.add_argument("--eigenvalues", type=int, help="how many of the largest (default: 5)")
    options.add_argument(
        "--probes", type=int, help="random vectors of trace, density, averages (default: 10, 3, 10)"
    )
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 1 (disk full), 2 (wrong input) or 130."""
    try:
        given = flags().read(arguments)
        folders = [folder for path in given.pop("runs") for folder in runs_below(path)]
        go(folders, given)
    except UsageError as error:
        print(f"fedsam: error: {error}", file=sys.stderr)
        return 2
    except StorageError as error:
        print(f"fedsam: stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fedsam: interrupted; what was measured is kept", file=sys.stderr)
        return 130
    return 0


def runs_below(path: Path) -> list[Path]:
    """Return a run's folder, or those below another that hold a model.

    Raises
    ------
    UsageError
        If there is none.
    """
    from fedsam.results import folders_below
    from fedsam.subjects import models_of

    if (path / "config.yaml").is_file():
        return [path]
    found = [folder for folder in folders_below(path) if models_of(folder)]
    if not found:
        raise UsageError(f"{path}: no run with a model in it")
    return found


def go(folders: Sequence[Path], given: dict[str, Any]) -> None:
    """Measure runs; show, write and draw the results."""
    from rich.console import Console

    from fedsam import flatness_figures as figures
    from fedsam import measures

    names = list(given.pop("measure", measures.QUICK))
    wanted, along = given.pop("model", None), given.pop("along", False)
    if along and wanted:
        raise UsageError("--along: stands without --model")
    place = {key: given.pop(key, "") for key in ("device", "data_root")}
    measures.check(names, given)
    console = Console()
    for folder in folders:
        console.print(str(folder), highlight=False, soft_wrap=True)
        models = _models(folder, wanted, along=along)
        before = read(folder)
        for model, name, result in measured(folder, models, names, given, place, console):
            before.setdefault(model, {})[name] = result
            with storing(folder):
                write_whole(folder / FILE, json.dumps(_finite(before), indent=1) + "\n")
        drawn = figures.draw_all(folder, {m: before[m] for m in models}, along=along)
        for name in dict.fromkeys(measures.key(name, given) for name in names):
            console.print(table({model: before[model] for model in models}, name))
        console.print(f"{FILE}, {', '.join(drawn)} in {folder}", highlight=False, soft_wrap=True)


def measured(
    folder: Path,
    models: Sequence[str],
    names: Sequence[str],
    options: dict[str, Any],
    place: dict[str, str],
    console: Any,
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield model, measure and result, with a line of progress."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from fedsam import measures, subjects
    from fedsam.engines.crew import on_device

    subject = subjects.of_run(folder, models[0], **place)
    layout = subject.replica.layout
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed} of {task.total}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    with bar, on_device(layout.device, "fp32"):
        for model in models:
            subject = subject.with_state(subjects.read(folder, model, layout))
            for name in names:
                begin = time.perf_counter()
                task = bar.add_task(f"{model}: {name}", total=None)

                def tick(done: int, of: int, task: Any = task) -> None:
                    bar.update(task, completed=done, total=of)

                result = measures.take(subject, name, options, tick)
                bar.remove_task(task)
                seconds = time.perf_counter() - begin
                console.print(f"  {model}: {name}, {seconds:.1f} s", highlight=False)
                yield model, measures.key(name, options), result


def read(folder: Path) -> Results:
    """Return what a run's flatness.json holds; nothing where there is none.

    Raises
    ------
    UsageError
        If it is damaged.
    """
    path = folder / FILE
    try:
        found = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise UsageError(f"{path}: damaged: {error}; remove it") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path}: damaged: must hold a mapping; remove it")
    return found


def table(results: Results, name: str) -> Any:
    """Return a measure's scalars as rich's table: a row a model."""
    from rich.table import Table

    found = {model: measures[name] for model, measures in results.items() if name in measures}
    keys = next(iter(found.values()))["scalars"]
    out = Table(name, *keys, box=None, pad_edge=False)
    for model, result in found.items():
        values = [result["scalars"].get(key) for key in keys]
        out.add_row(model, *("none" if v is None else f"{v:.5g}" for v in values))
    return out


def _models(folder: Path, wanted: Sequence[str] | None, *, along: bool) -> list[str]:
    from fedsam import subjects

    if not along:
        return list(wanted or ["model"])
    found = subjects.along(folder)
    if not found:
        raise UsageError(f"{folder}: --along: no models/*.safetensors; train with --save-every N")
    return found


def _finite(value: Any) -> Any:
    """Return the same as JSON can hold it: what is not finite as null."""
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
