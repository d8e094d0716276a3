"""What a run shows while it runs and when it is done."""

import logging
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.logging import RichHandler
from rich.progress import ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fedsam.base.errors import plain
from fedsam.base.timers import WAITING
from fedsam.cli import console, progress_bar
from fedsam.config.schema import Config
from fedsam.runs import metrics
from fedsam.runs.metrics import words_of
from fedsam.simulate.profile import Phase
from fedsam.simulate.run import Outcome

NAME = 80  # characters of a name beside a bar
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


class Progress:
    """A live line on a terminal, now and then a plain one elsewhere, nothing if quiet.

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
        shown = TextColumn("{task.fields[shown]}", markup=False)
        self.bar = progress_bar(
            self.console, Rate(), TimeRemainingColumn(), shown, disable=self.quiet
        )
        names = [plain(f"{c.algorithm} on {c.dataset}", NAME) for c in configs]
        self.tasks = [
            self.bar.add_task(name, total=c.rounds, shown="")
            for name, c in zip(names, configs, strict=True)
        ]

    def __enter__(self) -> "Progress":
        logger = logging.getLogger("fedsam")
        self.handler = RichHandler(console=self.errors, show_time=False, show_path=False)
        self.handler.setFormatter(PlainLines())
        logger.addHandler(self.handler)
        # Flower's strategies log every round, and warn that they do not evaluate on clients
        logging.getLogger("flwr").setLevel(logging.ERROR)
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()
        logging.getLogger("fedsam").removeHandler(self.handler)

    def update(self, line: dict[str, Any], run: int = 0) -> None:
        """Show one line of metrics of a run."""
        if (headline := metrics.headline_of(line)) in line:
            self.shown[run] = f"{words_of(headline)} {line[headline]:.2%}"
        shown, rounds = self.shown[run], self.configs[run].rounds
        self.bar.update(self.tasks[run], completed=line["round"], shown=shown)
        every = max(1, rounds // PLAIN_LINES)
        if self.bar.disable and not self.quiet and line["round"] % every == 0:
            which = f"run {run}  " if len(self.configs) > 1 else ""
            self.console.print(f"{which}round {line['round']}/{rounds}  {shown}")

    def summarise(self, config: Config, outcome: Outcome) -> None:
        """Print what was run, how well it did, and where the results lie."""
        summary = outcome.summary
        headline = metrics.headline_of(summary)
        final, last, best = (_percent(summary[key]) for key in metrics.finals(headline))
        average = "" if config.averaging == "none" else f" + {config.averaging}"
        said = {
            "run": f"{config.algorithm}{average} ({config.minimizer}, {config.client} client, "
            f"{config.strategy} server) on {config.dataset}",
            "clients": f"{config.clients_per_round} of {config.clients} a round, "
            f"{config.partition} split, alpha {config.alpha:g}",
            "rounds": f"{summary['rounds']} in {summary['seconds']:.1f} s "
            f"({summary['rounds_per_second']:.1f} a second), {summary['ended']}",
            words_of(headline): f"{final} mean of the last 100 rounds (last {last}, best {best})",
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
        for name, text in said.items():  # never cut: a path is there to be copied
            self.console.print(f"{name:<9} {plain(text)}")
        if outcome.phases:
            self._show(outcome.phases)

    def _show(self, phases: Sequence[Phase]) -> None:
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


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.2%}"
