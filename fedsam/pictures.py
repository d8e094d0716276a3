"""The pictures that lie in run folders, as a page can hold them."""

from base64 import b64encode
from pathlib import Path

from fedsam.results import Grid, Run

PATTERNS = ("flatness-*.png", "lifelong.png")
MOST = 20  # pictures
LARGEST = 1 << 20  # bytes each


def pictures(grid: Grid) -> tuple[list[dict[str, str]], int]:
    """Return pictures as data URLs with their text, and how many were left out.

    Those of the first seed of each method and setting come first; at most ``MOST``, none of more
    than ``LARGEST`` bytes.
    """
    ranked = [
        (seed, number, run)
        for number, cell in enumerate(grid.cells.values())
        for seed, run in enumerate(cell.runs)
    ]
    order = [run for *_, run in sorted(ranked, key=lambda entry: entry[:2])]
    files = [(run, file) for run in order for file in _of(run)]
    small = [(run, file) for run, file in files if file.stat().st_size <= LARGEST]
    chosen = [
        {
            "data": f"data:image/png;base64,{b64encode(file.read_bytes()).decode()}",
            "text": f"{run.path.name}: {file.stem.replace('-', ' ')}",
        }
        for run, file in small[:MOST]
    ]
    return chosen, len(files) - len(chosen)


def _of(run: Run) -> list[Path]:
    return [file for pattern in PATTERNS for file in sorted(run.path.glob(pattern))]
