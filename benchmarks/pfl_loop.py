"""FedAvg in pfl-research, told round by round what to play; run by the Python that has pfl.

    python benchmarks/pfl_loop.py FOLDER    # as benchmarks/engines.py does, which fills FOLDER

Under torchrun the cohort is shared out over the processes.
"""

import argparse
from pathlib import Path

import torch
from contest import serve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="holds settings.json and data.npz")
    parser.add_argument("--threads", type=int, default=1, help="compute threads of each process")
    parser.add_argument("--tiny", action="store_true", help="the folder says how much is played")
    given = parser.parse_args()
    try:
        from pfl.internal.ops.selector import get_framework_module
        from pfl_rounds import Rounds
    except ModuleNotFoundError as error:
        if error.name != "pfl":
            raise
        raise SystemExit("pfl_loop: this Python has no pfl: pip install 'pfl[pytorch]'") from error
    torch.set_num_threads(given.threads)
    rounds = Rounds(given.folder)
    processes = get_framework_module().distributed
    turn = torch.zeros(1)

    def play() -> float:
        if processes.world_size > 1:  # the others wait until the first one is told
            torch.distributed.broadcast(turn.fill_(1), 0)
        return rounds.play()

    if processes.global_rank == 0:
        serve(play, rounds.save)
        if processes.world_size > 1:
            torch.distributed.broadcast(turn.fill_(0), 0)
        return
    while True:
        torch.distributed.broadcast(turn, 0)
        if not turn:
            return
        rounds.play()


if __name__ == "__main__":
    main()
