"""What a run shows while it runs and when it is done."""

import logging
import time
from collections.abc import Mapping, Sequence
from html import escape
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fedsam.base.errors import plain
from fedsam.base.timers import WAITING
from fedsam.cli import console, hush_flower, in_notebook, progress_bar
from fedsam.config.schema import Config
from fedsam.runs import metrics
from fedsam.runs.metrics import TRAIN_LOSS, words_of

if TYPE_CHECKING:  # what says that a run begins is there before PyTorch is
    from fedsam.simulate.profile import Phase
    from fedsam.simulate.run import Outcome

NAME = 80  # characters of a name beside a bar
NARROW = 100  # columns of a terminal; below, a bar goes without the rate
PLAIN_LINES = 20  # where there is no terminal, a run prints about so many


class Rate(ProgressColumn):
    """Rounds a second."""

    def render(self, task: Task) -> Text:
        """Return the text."""
        return Text(f"{task.speed:.1f} rounds/s" if task.speed else "", style="cyan")


class PlainLines(logging.Formatter):
    """A message is one line that is safe to print, whatever names or reasons it quotes."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802, logging's name
        """Return the line; a traceback follows as it is."""
        return plain(record.message)


class Opening(logging.Handler):
    """Prints what a run says of itself before its first round, which is no warning.

    Parameters
    ----------
    console : Console
        Where to.
    """

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message that is of no higher level than INFO."""
        if record.levelno <= logging.INFO:
            self.console.print(plain(record.getMessage()))


class NotebookLine:
    """A bar and a line below a notebook's cell, which change in their place."""

    def __init__(self) -> None:
        self.output: Any = None

    def show(self, done: int, of: int, text: str) -> None:
        """Show how far a run is, and what of it."""
        from IPython.display import HTML, display

        html = HTML(
            f'<progress value="{done}" max="{of}"></progress> <code>{escape(plain(text))}</code>'
        )
        if self.output is None:
            self.output = display(html, display_id=True)
        else:
            self.output.update(html)


class Progress:
    """A live line on a terminal or in a notebook, now and then a plain one elsewhere.

    Nothing if quiet, but for what goes wrong.

    Parameters
    ----------
    configs : sequence of Config
        What is run: one run, or several as one program, a line each.
    """

    def __init__(self, configs: Sequence[Config]) -> None:
        self.configs = configs
        self.quiet = configs[0].quiet
        self.console = console()
        self.errors = console(stderr=True)
        self.shown = [""] * len(configs)
        self.began = time.perf_counter()
        self.first: list[int | None] = [None] * len(configs)  # round of each that is told of
        self.lines = [NotebookLine() for _ in configs] if in_notebook() else []
        shown = TextColumn("{task.fields[shown]}", markup=False)
        rate = [Rate()] if self.console.width >= NARROW else []
        columns = [*rate, TimeRemainingColumn(), TextColumn("left", markup=False), shown]
        self.bar = progress_bar(self.console, *columns, disable=self.quiet)
        names = [plain(f"{c.algorithm} on {c.dataset}", NAME) for c in configs]
        self.tasks = [
            self.bar.add_task(name, total=c.rounds, shown="")
            for name, c in zip(names, configs, strict=True)
        ]

    def __enter__(self) -> "Progress":
        logger = logging.getLogger("fedsam")
        warnings = RichHandler(
            logging.WARNING, console=self.errors, show_time=False, show_path=False
        )
        warnings.setFormatter(PlainLines())
        self.handlers: list[logging.Handler] = [warnings]
        if not self.quiet:
            self.handlers.append(Opening(self.console))
        self.level = logger.level
        logger.setLevel(logging.INFO)
        for handler in self.handlers:
            logger.addHandler(handler)
        hush_flower()
        if not self.quiet and len(self.configs) == 1:
            self._print(_what(self.configs[0]))
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()
        logger = logging.getLogger("fedsam")
        logger.setLevel(self.level)
        for handler in self.handlers:
            logger.removeHandler(handler)

    def update(self, line: dict[str, Any], run: int = 0) -> None:
        """Show one line of metrics of a run."""
        if (headline := metrics.headline_of(line)) in line:
            self.shown[run] = f"{words_of(headline)} {line[headline]:.2%}"
        number, rounds = line[metrics.ROUND], self.configs[run].rounds
        self.bar.update(self.tasks[run], completed=number, shown=self.shown[run])
        every = max(1, rounds // PLAIN_LINES)
        if self.quiet or not self.bar.disable or number % every:
            return
        which = f"run {run}  " if len(self.configs) > 1 else ""
        loss = f"  train loss {line[TRAIN_LOSS]:.4g}" if TRAIN_LOSS in line else ""
        text = f"{which}round {number}/{rounds}  {self.shown[run]}{loss}{self._time(run, number)}"
        if self.lines:
            self.lines[run].show(number, rounds, text)
        else:
            self.console.print(text)

    def _time(self, run: int, number: int) -> str:
        """Return how long a run took so far, and takes by that."""
        first, seconds = self.first[run], time.perf_counter() - self.began
        if first is None:  # the first round is not in the pace: all is loaded in it
            self.first[run], self.began = number, time.perf_counter()
            return ""
        left = seconds / (number - first) * (self.configs[run].rounds - number)
        return f"  {seconds:.1f} s, {left:.1f} s left"

    def _print(self, said: Mapping[str, str]) -> None:
        for name, text in said.items():  # never cut: a path is there to be copied
            self.console.print(f"{name:<9} {plain(text)}")

    def summarise(self, config: Config, outcome: "Outcome") -> None:
        """Print how well a run did, and where the results lie."""
        if self.quiet:
            return
        summary = outcome.summary
        headline = metrics.headline_of(summary)
        final, last, best = (_percent(summary[key]) for key in metrics.finals(headline))
        many = min(summary["rounds"], 100)
        mean = f"mean of the last {many} rounds" if many > 1 else "after one round"
        said = _what(config) if len(self.configs) > 1 else {}
        said |= {
            "rounds": f"{summary['rounds']} in {summary['seconds']:.1f} s "
            f"({summary['rounds_per_second']:.1f} a second), {summary['ended']}",
            words_of(headline): f"{final} {mean} (last {last}, best {best})",
        }
        if groups := summary.get(metrics.GROUPS):
            said["groups"] = (
                f"{_percent(summary[metrics.WORST])} the worst of {len(groups)}, "
                f"{_percent(summary[metrics.GAP])} below "
                f"{'what is seen' if metrics.SEEN in groups else 'the best'}"
            )
        if (chosen := summary.get(metrics.SELECTED_ROUND)) is not None:
            said["selected"] = (
                f"{_percent(summary[metrics.of_selected(headline)])} at round {chosen}, where "
                f"validation was best, {_percent(summary[metrics.of_validation(headline)])}"
            )
        if lifelong := summary.get("lifelong"):
            said["lifelong"] = (
                f"{_percent(lifelong[f'average_{headline}'])} average {words_of(headline)} after "
                "the last of "
                f"{config.lifelong} tasks, {_percent(lifelong['forgetting'])} forgetting"
            )
        said["results"] = str(outcome.folder)
        self._print(said)
        if outcome.phases:
            self._show(outcome.phases)

    def _show(self, phases: "Sequence[Phase]") -> None:
        """Print where the time went."""
        whole = sum(phase.seconds for phase in phases if phase.name != WAITING)
        table = Table("phase", box=None, pad_edge=False, title_justify="left")
        for heading in ("calls", "seconds", "share"):
            table.add_column(heading, justify="right")
        for name, calls, seconds in phases:
            share = "" if name == WAITING else f"{seconds / whole:.1%}"
            table.add_row(name, f"{calls}", f"{seconds:.3f}", share)
        self.console.print("\nTime by phase, summed over threads")
        self.console.print(table)


def _what(config: Config) -> dict[str, str]:
    """Return what a run trains, and whom."""
    average = "" if config.averaging == "none" else f" + {config.averaging}"
    alpha = f", alpha {config.alpha:g}" if config.by_alpha else ""
    return {
        "run": f"{config.algorithm}{average} ({config.minimizer}, {config.client} client, "
        f"{config.strategy} server) on {config.dataset}",
        "clients": f"{config.clients_per_round} of {config.clients} a round, "
        f"{config.partition} split{alpha}",
    }


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.2%}"
