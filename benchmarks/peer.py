"""FedAvg in another framework, told round by round what to play; run by the Python that has it.

    python benchmarks/peer.py blazefl FOLDER --way threads --workers 2

as benchmarks/engines.py does, which fills FOLDER.
"""

import argparse
from importlib import import_module
from pathlib import Path

PACKAGES = {"blazefl": "blazefl[contrib]", "fedjax": "fedjax", "pfl": "pfl[pytorch]"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=list(PACKAGES))
    parser.add_argument("folder", type=Path, help="holds settings.json and data.npz")
    parser.add_argument("--way", default="threads", help="threads, processes or devices")
    parser.add_argument("--workers", type=int, default=1, help="how many of them")
    parser.add_argument("--tiny", action="store_true", help="the folder says how much is played")
    given = parser.parse_args()
    try:
        rounds = import_module(f"{given.peer}_rounds")
    except ModuleNotFoundError as error:
        if error.name != given.peer:
            raise
        package = PACKAGES[given.peer]
        raise SystemExit(
            f"peer: this Python has no {given.peer}: pip install '{package}'"
        ) from error
    rounds.compete(given.folder, given.way, given.workers)


if __name__ == "__main__":
    main()
