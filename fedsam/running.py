"""One run, followed: rounds are played, evaluated, written down, and stopped when it is time."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from fedsam.base.errors import UsageError, storing
from fedsam.base.randomness import sample_clients
from fedsam.base.system import Stop, cores
from fedsam.checkpoint import Snapshot
from fedsam.config.schema import Config
from fedsam.engines.batched import Alone, BatchedExecutor, Member
from fedsam.engines.flower import FlowerGrid, roll_call
from fedsam.engines.local import LocalGrid
from fedsam.engines.threads import ThreadExecutor, on_device, one_compute_thread
from fedsam.experiment import new_actors, new_gradients, new_strategy, new_trainer
from fedsam.following import Following
from fedsam.messages import VectorRecord
from fedsam.phases import Phase, Phases, traced
from fedsam.resume import EarlyStop, RunState
from fedsam.rundir import RunDir
from fedsam.server.rounds import play
from fedsam.server.screening import Limits
from fedsam.server.side_vectors import SideVectors
from fedsam.tracking import new_trackers, tracking
from fedsam.training.client import Trainer

Watch = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: its folder, what summary.json holds, and what --profile measured."""

    folder: Path
    summary: dict[str, Any]
    phases: Sequence[Phase] = ()


def run(
    config: Config,
    watch: Watch = lambda line: None,
    flower: Grid | None = None,
    *,
    snapshot: Snapshot | None = None,
    stop: Stop | None = None,
) -> Outcome:
    """Run an experiment.

    Parameters
    ----------
    config : Config
        What to run.
    watch : callable
        Gets each line of metrics.jsonl as it is written.
    flower : Grid, optional
        Flower's Grid, to run on its nodes; by default the clients train in this process.
    snapshot : Snapshot, optional
        Go on from there in the folder ``config.out``; ``fedsam.resume.resumed`` returns both.
    stop : Stop, optional
        Asked after each client whether to stop.

    Returns
    -------
    Outcome
        Where the results lie and what they say.

    Raises
    ------
    UsageError
        If the config asks for what there is not; nothing has been written then.
    TrainingError
        If no client's update can be used any more; the last good model has been written.
    StorageError
        If the disk is full or gone; the checkpoints written before are whole.
    Interrupted
        If it was asked to stop, or by Ctrl-C: what was done can be gone on with.
    """
    stop = stop or Stop()
    if config.client_timeout and config.engine == "local" and flower is None:
        raise UsageError(
            "--client-timeout: a thread of the local engine cannot be stopped; --engine ray"
        )
    if snapshot is None:
        RunDir.check(config.out)
    with one_compute_thread(), ExitStack() as leaving:
        trainer, initial = new_trainer(config)
        leaving.enter_context(on_device(trainer.layout.device, config.precision))
        crew = new_crew(config, trainer, stop)
        leaving.callback(crew.close)
        nodes: Mapping[int, int] | Sequence[int] = range(config.clients)
        if flower is not None:
            grid: Grid = FlowerGrid(flower)
            nodes = roll_call(flower, config.clients)
        elif config.engine == "ray":
            actors = new_actors(config, trainer)
            leaving.callback(actors.close)
            grid = LocalGrid(crew, actors)
        elif gradients := new_gradients(config, trainer):
            member = Member(trainer, sampling(config, trainer))
            grid = LocalGrid(crew, Alone(BatchedExecutor(crew, gradients), member))
        else:
            grid = LocalGrid(crew)
        return play_out(config, crew, grid, nodes, initial, watch, snapshot=snapshot, stop=stop)


def new_crew(config: Config, trainer: Trainer, stop: Stop) -> ThreadExecutor:
    """Return the threads that evaluate, and train where nobody else does."""
    on_cpu = trainer.layout.device.type == "cpu"
    return ThreadExecutor(trainer, (config.threads or cores()) if on_cpu else 1, stop)


def sampling(config: Config, trainer: Trainer) -> Callable[..., list[int]]:
    """Return the run's cohorts, as a function of the round and the attempt.

    In a lifelong run, of the clients that hold images of the round's task: all, if they are few.
    """
    lifelong, wanted = trainer.lifelong, config.clients_per_round
    holders = [c.tolist() for c in lifelong.holders(trainer.partition)] if lifelong else []

    def sample(round: int, attempt: int = 0) -> list[int]:
        if lifelong is None:
            return sample_clients(config.seed, round, config.clients, wanted, attempt)
        able = holders[lifelong.at(round)]
        most = min(wanted, len(able))
        return [able[n] for n in sample_clients(config.seed, round, len(able), most, attempt)]

    return sample


def play_out(
    config: Config,
    crew: ThreadExecutor,
    grid: Grid,
    nodes: Mapping[int, int] | Sequence[int],
    initial: VectorRecord,
    watch: Watch,
    *,
    snapshot: Snapshot | None = None,
    stop: Stop,
) -> Outcome:
    """Play a run's rounds on a Grid, from its beginning or a snapshot; write down what happens."""
    trainer, memories = crew.trainer, grid.memories if isinstance(grid, LocalGrid) else {}
    exchange = SideVectors(trainer.method, trainer.layout, config.clients)
    early = EarlyStop(config.target_accuracy, config.patience)
    state = RunState(new_strategy(config), exchange, memories, early)
    trackers = new_trackers(config.track)
    if snapshot is None:
        first, arrays = 0, initial
        folder = RunDir.create(config, trainer.partition, trainer.train.targets.cpu())
    else:
        first, arrays = snapshot.round, state.put_back(snapshot, initial)
        folder = RunDir.reopen(config, trainer.partition, snapshot)
    turns = play(
        state.strategy,
        grid,
        arrays,
        rounds=range(first + 1, config.rounds + 1),
        sample=sampling(config, trainer),
        seed=config.seed,
        lr=config.rate,
        node_of=nodes,
        exchange=exchange,
        limits=Limits(
            config.min_clients, config.max_norm, config.clip_norm, config.client_timeout or None
        ),
    )
    if config.trace:
        turns = traced(turns, folder.path / "trace.json.gz")
    with tracking(trackers, config, folder.path) as track:

        def write(line: dict[str, Any]) -> None:
            with storing(folder.path):
                folder.log(line)
            track(line)
            watch(line)

        following = Following(config, state, crew, folder, write, stop, arrays, first)
        if not config.profile:
            return Outcome(folder.path, following.go(turns))
        phases = Phases()
        with phases.watching(state.strategy):
            outcome = Outcome(folder.path, following.go(turns))
        phases.save(folder.path / "profile.json")
        return replace(outcome, phases=phases.rows())
