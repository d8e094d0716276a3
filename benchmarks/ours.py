"""Rounds of fedsam as the benchmarks time them: the only file of theirs that knows its engines."""

from collections.abc import Iterator
from contextlib import ExitStack, closing

from torch import Tensor

from fedsam.base.system import Stop
from fedsam.config.schema import Config
from fedsam.engines.batched import BatchedExecutor, BatchedPrograms, BatchedRun
from fedsam.engines.local import Executor, LocalGrid
from fedsam.messages import VectorRecord
from fedsam.server.rounds import Round, play
from fedsam.simulate.build.executors import new_ray_executor
from fedsam.simulate.build.strategy import new_strategy
from fedsam.simulate.build.trainer import new_trainer
from fedsam.simulate.run import new_local_executor, new_threads, sampling
from fedsam.training.batched_gradient import Slots, Vmapped
from fedsam.training.client import Trainer

Made = tuple[Trainer, VectorRecord]


class Ours:
    """Whole rounds: sampling, messages, plans, training, averaging. Nothing is tested or written.

    Parameters
    ----------
    config : Config
        What is run, on threads of this process or on Ray; ``rounds`` does not matter.
    made : tuple, optional
        Trainer and first weights, where another one's are to be used again.
    gradients : type, optional
        Train a cohort as one program: ``Slots`` or ``Vmapped``.
    capture : bool
        On a GPU, replay steps of that program from a CUDA graph.
    """

    def __init__(
        self,
        config: Config,
        made: Made | None = None,
        *,
        gradients: type[Slots | Vmapped] | None = None,
        capture: bool = False,
    ) -> None:
        self.trainer, self.initial = made or new_trainer(config)
        stop = Stop()
        self.threads = new_threads(config, self.trainer, stop)
        sample = sampling(config, self.trainer)
        executor: Executor
        self.leaving = ExitStack()
        self.leaving.callback(self.threads.close)
        self.batched: BatchedPrograms | None = None
        if config.engine == "ray":
            executor = self.leaving.enter_context(closing(new_ray_executor(config, self.trainer)))
        elif gradients is not None:
            self.batched = BatchedPrograms(self.threads, gradients, capture=capture)
            executor = BatchedExecutor(self.batched, BatchedRun(self.trainer, sample))
        else:
            local = new_local_executor(config, self.threads, stop)
            executor = self.leaving.enter_context(closing(local))
        self.turns: Iterator[Round] = play(
            new_strategy(config),
            LocalGrid(self.threads, executor),
            self.initial,
            rounds=range(1, 10**9),
            sample=sample,
            seed=config.seed,
            lr=config.rate,
            node_of=range(config.clients),
        )

    def round(self) -> Tensor:
        """Play one more round and return the model (S,)."""
        return next(self.turns).arrays.state

    def close(self) -> None:
        """End threads, processes and actors."""
        self.leaving.close()
