"""The local engine against a bare PyTorch loop: the same steps on the same tensors, in turn.

    python benchmarks/local.py                        # CIFAR-10-shaped random images
    python benchmarks/local.py --data-root data       # the genuine ones

Before anything is timed, one round of each from equal weights must give equal weights. Then the
contestants run one after the other, round by round; what is printed are medians over the rounds,
and medians of the ratios within a round, which hold when the machine's speed drifts.
"""

import argparse
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from handed import loss_of, with_plain_convolutions
from ours import Ours
from torch import Tensor

from fedsam.base.randomness import sample_clients
from fedsam.config.schema import Config, resolve
from fedsam.messages import VectorRecord
from fedsam.training.client import Trainer

LR, RHO, ETA = 0.01, 0.1, 0.2


class Bare:
    """FedAvg as one would write it without a framework: one model, loops, PyTorch's optimiser.

    ``plain``: convolutions are PyTorch's own, where fedsam's model has others.
    """

    def __init__(
        self,
        trainer: Trainer,
        initial: VectorRecord,
        cohort: int,
        threads: int,
        *,
        minimizer: str = "sgd",
        channels_last: bool = True,
        plain: bool = True,
        bf16: bool = False,
        lr: float = LR,
    ) -> None:
        self.trainer, self.cohort, self.threads = trainer, cohort, threads
        self.minimizer, self.bf16, self.lr = minimizer, bf16, lr
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.model = trainer.new_module()
        if plain:
            with_plain_convolutions(self.model)
        self.state = {n: t.clone() for n, t in initial.layout.read(initial.state).items()}
        self.number = 0

    def climb(self) -> list[Tensor]:
        """Move to the worst point nearby, parameter by parameter; return the way back."""
        named = list(self.model.named_parameters())
        with torch.no_grad():
            scale = [
                p.abs() + ETA if self.minimizer == "asam" and "weight" in n else torch.ones(())
                for n, p in named
            ]
            grads = [p.grad for _, p in named if p.grad is not None]
            steps = [t * g for t, g in zip(scale, grads, strict=True)]
            length = torch.stack([s.norm() for s in steps]).norm() + 1e-16
            steps = [RHO * t * s / length for t, s in zip(scale, steps, strict=True)]
            for step, (_, p) in zip(steps, named, strict=True):
                p.add_(step)
        return steps

    def client(self, client: int) -> None:
        plan = self.trainer.plan(client, self.number)
        self.model.to(memory_format=self.format).train().load_state_dict(self.state)
        decay = self.trainer.method.weight_decay
        optimiser = torch.optim.SGD(self.model.parameters(), lr=self.lr, weight_decay=decay)
        for step in range(len(plan)):
            batch = self.trainer.train.batch(plan, step)
            images = batch.images.contiguous(memory_format=self.format)
            optimiser.zero_grad()
            loss_of(self.model, images, batch.targets, bf16=self.bf16).backward()
            if self.minimizer != "sgd":
                back = self.climb()
                optimiser.zero_grad()
                loss_of(self.model, images, batch.targets, bf16=self.bf16).backward()
                with torch.no_grad():
                    for p, step_taken in zip(self.model.parameters(), back, strict=True):
                        p.sub_(step_taken)
            optimiser.step()

    def round(self) -> Tensor:
        torch.set_num_threads(self.threads)
        self.number += 1
        clients = sample_clients(0, self.number, len(self.trainer.partition), self.cohort)
        sizes = [len(self.trainer.partition[client]) for client in clients]
        mean: dict[str, Tensor] = {}
        for client, size in zip(clients, sizes, strict=True):
            self.client(client)
            for name, tensor in self.model.state_dict().items():
                part = tensor * (size / sum(sizes))
                mean[name] = mean[name] + part if name in mean else part
        self.state = mean
        torch.set_num_threads(1)
        return self.trainer.layout.write(mean)


def check(a: Callable[[], Tensor], b: Callable[[], Tensor], tolerance: float) -> None:
    """Let both play a round from the same weights; refuse to time what is not the same work."""
    first, second = a(), b()
    error = float((first - second).abs().max() / second.abs().max())
    if error > tolerance:
        raise SystemExit(f"not the same work: after one round the weights differ by {error:.1e}")


def race(contestants: Mapping[str, Callable[[], object]], rounds: int, base: str) -> None:
    """Run the contestants in turn and print medians and ratios to ``base``."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, play_round in contestants.items():
            begin = time.perf_counter()
            play_round()
            if turn:  # the first one warms up
                seconds[name].append(time.perf_counter() - begin)
    for name, mine in seconds.items():
        ratios = [a / b for a, b in zip(mine, seconds[base], strict=True)]
        spread = f"{min(mine):.3f} to {max(mine):.3f}"
        print(f"  {name:44s} {median(mine):7.3f} s  ({spread})   {median(ratios):.2f} x {base}")


def options(data_root: str, *, tiny: bool) -> Callable[..., Config]:
    """Return a function from further keys to a config: the paper's, or one of moments."""
    keys: dict[str, Any] = {"data_root": data_root or "none", "dataset": "shapes:cifar10"}
    keys |= {"device": "cpu", "rounds": 10**6, "alpha": 0.0}
    if tiny:
        keys |= {"dataset": "digits", "model": "digits-cnn", "augment": "none"}
    return lambda **more: resolve(keys | more, "paper/cifar10")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", default="", help="folder with CIFAR-10 (else random images)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of each contestant")
    parser.add_argument("--tiny", action="store_true", help="start, and measure next to nothing")
    given = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    rounds = 1 if given.tiny else given.rounds
    config = options(given.data_root, tiny=given.tiny)
    source = "cifar10" if given.data_root else "random images in CIFAR-10's shape"
    print(
        f"{'digits' if given.tiny else source}; torch {torch.__version__}, {os.cpu_count()} cores, "
        f"{platform.machine()}, load {os.getloadavg()[0]:.1f}"
    )

    print("\nA round of 5 clients, one thread (seconds, lower is better)")
    ours = {
        m: Ours(config(minimizer=m, rho=RHO, eta=ETA, threads=1)) for m in ("sgd", "sam", "asam")
    }
    trainer, initial = ours["sgd"].trainer, ours["sgd"].initial
    bare = {m: Bare(trainer, initial, 5, 1, minimizer=m) for m in ours}
    plain = Bare(trainer, initial, 5, 1, channels_last=False)
    helped = Bare(trainer, initial, 5, 1, plain=False)
    for name in ours:
        check(ours[name].round, bare[name].round, 1e-4)
    contestants = {f"bare loop, {m}, channels-last": bare[m].round for m in bare}
    contestants["bare loop, sgd, as PyTorch comes"] = plain.round
    contestants["bare loop, sgd, fedsam's convolutions"] = helped.round
    contestants |= {f"fedsam, {m}": ours[m].round for m in ours}
    race(contestants, rounds, "bare loop, sgd, channels-last")
    print("\nThe same, minimizers against SGD")
    race({f"fedsam, {m}": ours[m].round for m in ours}, rounds, "fedsam, sgd")

    print("\nA round of 10 clients, two threads")
    for precision in ("fp32", "bf16"):
        two = Ours(config(clients_per_round=10, precision=precision, threads=2))
        one = Ours(config(clients_per_round=10, precision=precision, threads=1))
        half = precision == "bf16"
        loops = {
            f"bare loop, {precision}, 2 compute threads": Bare(
                two.trainer, two.initial, 10, 2, channels_last=False, bf16=half
            ),
            f"bare loop, {precision}, 2, channels-last": Bare(
                two.trainer, two.initial, 10, 2, bf16=half
            ),
        }
        check(two.round, next(iter(loops.values())).round, 0.05 if half else 1e-4)
        players = {name: loop.round for name, loop in loops.items()}
        players |= {
            f"fedsam, {precision}, 1 thread": one.round,
            f"fedsam, {precision}, 2 threads": two.round,
        }
        race(players, rounds, f"bare loop, {precision}, 2 compute threads")

    print("\nA round in which 10 clients train nothing")
    for threads in (1, 2):
        idle = Ours(config(clients_per_round=10, local_epochs=0.0, threads=threads))
        times = []
        for _ in range(10 if given.tiny else 50):
            begin = time.perf_counter()
            idle.round()
            times.append(time.perf_counter() - begin)
        times = [1e3 * t for t in times[5:]]
        spread = f"{min(times):.2f} to {max(times):.2f}"
        print(f"  fedsam, threads {threads}: {median(times):.2f} ms ({spread})")


if __name__ == "__main__":
    main()
