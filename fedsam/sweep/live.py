"""What a sweep shows while it runs: what runs, is done, failed, and the time left."""

import itertools
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from rich.progress import TaskID, TextColumn, TimeElapsedColumn

from fedsam.base.errors import plain
from fedsam.cli import console, progress_bar
from fedsam.runs import files, metrics
from fedsam.sweep.grid import SweepPoint

TAIL = 1 << 17  # bytes at the end of metrics.jsonl in which its last line is looked for


class LiveTable:
    """A live table on a terminal, a plain line a cell elsewhere.

    Parameters
    ----------
    cells : sequence of SweepPoint
        Those that are to be run.
    """

    def __init__(self, cells: Sequence[SweepPoint]) -> None:
        self.open = {cell.name: cell for cell in cells}
        self.console, self.errors = console(), console(stderr=True)
        self.failed: dict[str, str] = {}
        self.done = 0
        self.pace = Pace()
        self.bar = progress_bar(
            self.console,
            TextColumn("{task.fields[shown]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", markup=False),
        )
        self.total = sum(cell.config.rounds for cell in cells)
        self.whole = self.bar.add_task("", total=self.total, shown="rounds of all cells", left="")
        self.running: dict[str, TaskID] = {}

    def __enter__(self) -> "LiveTable":
        self.look([])
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def look(self, jobs: Iterable[Sequence[SweepPoint]]) -> None:
        """Show how far the cells of jobs are that have begun."""
        for cell in itertools.chain(*jobs):
            if cell.name in self.open and cell.name not in self.running:
                line, name = last_line(cell) or {}, plain(cell.name, 80)
                self.pace.begin(cell.name, line.get(metrics.ROUND, 0))
                self.running[cell.name] = self.bar.add_task(
                    name, total=cell.config.rounds, shown="loads", left=""
                )
        under_way = 0
        for name, task in self.running.items():
            if (last := last_line(self.open[name])) is None:
                continue
            under_way += last[metrics.ROUND]
            self.pace.reached(name, last[metrics.ROUND])
            self.bar.update(task, completed=last[metrics.ROUND], shown="")
            headline = metrics.headline_of(last)
            if (value := last.get(headline)) is not None:
                self.bar.update(task, shown=f"{metrics.words_of(headline)} {value:.2%}")
        numbers = {
            "done": self.done,
            "failed": len(self.failed),
            "running": len(self.running),
            "waiting": len(self.open) - len(self.running),
        }
        said = ", ".join(f"{number} {what}" for what, number in numbers.items())
        to_go = sum(cell.config.rounds for cell in self.open.values()) - under_way
        left = self.pace.left(to_go, len(self.running))
        self.bar.update(self.whole, completed=self.total - to_go, description=said, left=left)

    def end(self, cells: Sequence[SweepPoint], failures: Mapping[str, str]) -> None:
        """Say that cells have ended, and why those failed that did."""
        for cell in cells:
            del self.open[cell.name]
            self.pace.end(cell.name, cell.config.rounds)
            if cell.name in self.running:
                self.bar.remove_task(self.running.pop(cell.name))
            if cell.name in failures:
                self.failed[cell.name] = failures[cell.name]
                why = f" ({cell.log})" if cell.log.exists() else ""
                said = f"failed: {cell.name}: {failures[cell.name]}{why}"
                self.errors.print(plain(said))
                continue
            self.done += 1
            said = f"done: {cell.name}  ({len(self.open)} to go)"
            self.console.print(plain(said))


class Pace:
    """How long the cells take, loading and writing included, and so how long the others will."""

    def __init__(self) -> None:
        self.begins: dict[str, tuple[float, int]] = {}  # of cells that run: when, at which round
        self.rounds: dict[str, int] = {}  # how far they are
        self.spent, self.played = 0.0, 0  # seconds and rounds of those that have ended

    def begin(self, name: str, rounds: int) -> None:
        """Take down that a cell begins, or goes on after so many rounds."""
        self.begins[name] = time.monotonic(), rounds
        self.rounds[name] = rounds

    def reached(self, name: str, rounds: int) -> None:
        """Take down how far a cell is."""
        self.rounds[name] = rounds

    def end(self, name: str, rounds: int) -> None:
        """Take down that a cell has ended, after so many rounds."""
        if name in self.begins:
            when, first = self.begins.pop(name)
            del self.rounds[name]
            self.spent += time.monotonic() - when
            self.played += rounds - first

    def left(self, rounds: int, running: int) -> str:
        """Return the time that so many rounds will take, "" as long as nobody can know."""
        now = time.monotonic()
        spent = self.spent + sum(now - when for when, _ in self.begins.values())
        played = self.played + sum(
            self.rounds[name] - first for name, (_, first) in self.begins.items()
        )
        if not played or not running:
            return ""
        return f"about {timedelta(seconds=round(rounds * spent / played / running))} left"


def last_line(cell: SweepPoint) -> dict[str, Any] | None:
    """Return the last whole line of a cell's metrics; None before it has one."""
    try:
        with (cell.folder / files.METRICS).open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL))
            lines = file.read().split(b"\n")[:-1]  # what follows the last newline is not whole
    except FileNotFoundError:
        return None
    return json.loads(lines[-1]) if lines and lines[-1].startswith(b"{") else None
