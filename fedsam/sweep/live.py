"""What a sweep shows while it runs: what runs, is done, failed, and the time left."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.progress import TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

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
        self.rounds = 0  # of cells that have ended
        self.bar = progress_bar(
            self.console,
            TextColumn("{task.fields[shown]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            speed_estimate_period=3600,  # cells differ in speed: the mean of all says more
        )
        total = sum(cell.config.rounds for cell in cells)
        self.whole = self.bar.add_task("", total=total, shown="rounds of all cells")
        self.running: dict[str, TaskID] = {}

    def __enter__(self) -> "LiveTable":
        self.look()
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def look(self) -> None:
        """Show how far the running cells are."""
        under_way = 0
        for name, cell in self.open.items():
            if (line := last_line(cell)) is None:
                continue
            if name not in self.running:
                total = cell.config.rounds
                self.running[name] = self.bar.add_task(plain(name, 80), total=total, shown="")
            task = self.running[name]
            self.bar.update(task, completed=line[metrics.ROUND])
            headline = metrics.headline_of(line)
            if (value := line.get(headline)) is not None:
                self.bar.update(task, shown=f"{metrics.words_of(headline)} {value:.2%}")
            under_way += line[metrics.ROUND]
        numbers = {
            "done": self.done,
            "failed": len(self.failed),
            "running": len(self.running),
            "waiting": len(self.open) - len(self.running),
        }
        said = ", ".join(f"{number} {what}" for what, number in numbers.items())
        self.bar.update(self.whole, completed=self.rounds + under_way, description=said)

    def end(self, cells: Sequence[SweepPoint], failures: Mapping[str, str]) -> None:
        """Say that cells have ended, and why those failed that did."""
        for cell in cells:
            del self.open[cell.name]
            self.rounds += cell.config.rounds
            if cell.name in self.running:
                self.bar.remove_task(self.running.pop(cell.name))
            if cell.name in failures:
                self.failed[cell.name] = failures[cell.name]
                said = f"failed: {cell.name}: {failures[cell.name]}"
                self.errors.print(plain(said))
                continue
            self.done += 1
            said = f"done: {cell.name}  ({len(self.open)} to go)"
            self.console.print(plain(said))


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
