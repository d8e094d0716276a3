"""One run, followed: rounds are played, evaluated, written down, and stopped when it is time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedsam import wire
from fedsam.config import Config
from fedsam.engines.cohort import Alone, Cohort, Member
from fedsam.engines.crew import Crew, on_device, one_compute_thread
from fedsam.engines.flower import FlowerGrid, roll_call
from fedsam.engines.local import LocalGrid
from fedsam.errors import TrainingError
from fedsam.exchange import Exchange
from fedsam.experiment import new_actors, new_gradients, new_strategy, new_trainer
from fedsam.machine import cores
from fedsam.measure.drift import drift
from fedsam.phases import Phase, Phases, traced
from fedsam.randomness import sample_clients
from fedsam.rounds import Round, play
from fedsam.rundir import RunDir
from fedsam.tracking import new_trackers, tracking
from fedsam.trainer import Trainer
from fedsam.wire import VectorRecord
from strategies.averages import Averaged


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: its folder, what summary.json holds, and what --profile measured."""

    folder: Path
    summary: dict[str, Any]
    phases: Sequence[Phase] = ()


def run(
    config: Config,
    watch: Callable[[dict[str, Any]], None] = lambda line: None,
    flower: Grid | None = None,
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
    """
    RunDir.check(config.out)
    with one_compute_thread(), ExitStack() as leaving:
        trainer, initial = new_trainer(config)
        leaving.enter_context(on_device(trainer.layout.device, config.precision))
        crew = new_crew(config, trainer)
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
            member = Member(trainer, sampling(config))
            grid = LocalGrid(crew, Alone(Cohort(crew, gradients), member))
        else:
            grid = LocalGrid(crew)
        return play_out(config, crew, grid, nodes, initial, watch)


def new_crew(config: Config, trainer: Trainer) -> Crew:
    """Return the threads that evaluate, and train where nobody else does."""
    on_cpu = trainer.layout.device.type == "cpu"
    return Crew(trainer, (config.threads or cores()) if on_cpu else 1)


def sampling(config: Config) -> Callable[[int], list[int]]:
    """Return the run's cohorts, as a function of the round."""
    return lambda r: sample_clients(config.seed, r, config.clients, config.clients_per_round)


def play_out(
    config: Config,
    crew: Crew,
    grid: Grid,
    nodes: Mapping[int, int] | Sequence[int],
    initial: VectorRecord,
    watch: Callable[[dict[str, Any]], None],
) -> Outcome:
    """Play a run's rounds on a Grid, and write down what happens."""
    strategy, trainer = new_strategy(config), crew.trainer
    trackers = new_trackers(config.track)
    turns = play(
        strategy,
        grid,
        initial,
        rounds=range(1, config.rounds + 1),
        sample=sampling(config),
        seed=config.seed,
        lr=config.lr,
        node_of=nodes,
        exchange=Exchange(trainer.method, trainer.layout, config.clients),
    )
    folder = RunDir.create(config, trainer.partition, trainer.train.targets.cpu())
    if config.trace:
        turns = traced(turns, folder.path / "trace.json.gz")
    with tracking(trackers, config, folder.path) as track:

        def write(line: dict[str, Any]) -> None:
            folder.log(line)
            track(line)
            watch(line)

        if not config.profile:
            return _follow(config, strategy, turns, initial, crew, folder, write)
        phases = Phases()
        with phases.watching(strategy):
            outcome = _follow(config, strategy, turns, initial, crew, folder, write)
        phases.save(folder.path / "profile.json")
        return replace(outcome, phases=phases.rows())


def _follow(
    config: Config,
    strategy: Strategy,
    turns: Iterator[Round],
    arrays: VectorRecord,
    crew: Crew,
    folder: RunDir,
    write: Callable[[dict[str, Any]], None],
) -> Outcome:
    """Go through the rounds: evaluate, write, and stop early where that was asked for."""

    def evaluated(arrays: VectorRecord) -> VectorRecord:
        """Return the model that is evaluated: the average where there is one."""
        return strategy.model(arrays) if isinstance(strategy, Averaged) else arrays

    def measure(arrays: VectorRecord) -> dict[str, float]:
        return crew.evaluate(evaluated(arrays).state, crew.trainer.test)

    stop = EarlyStop(config.target_accuracy, config.patience)
    reason = "all rounds done"
    write({"round": 0, **measure(arrays)})
    try:
        for turn in turns:
            arrays = turn.arrays
            line = _line(turn)
            if config.evaluates(turn.number):
                line |= measure(arrays) | _drift(turn)
            write(line)
            if "accuracy" in line and (wanted := stop.reason(line["accuracy"])):
                reason = wanted
                break
    except (TrainingError, KeyboardInterrupt) as error:
        folder.finish(evaluated(arrays), arrays, str(error) or "interrupted", finished=False)
        raise
    summary = folder.finish(evaluated(arrays), arrays, reason, finished=True)
    return Outcome(folder.path, summary)


def _line(turn: Round) -> dict[str, Any]:
    """Return a round's line of metrics.jsonl; what clients report is marked as training's."""
    train = {f"train_{name}": value for name, value in turn.metrics.items()}
    line = {"round": turn.number, "seconds": turn.seconds, "clients": turn.clients, **train}
    return line | ({"left_out": turn.left_out} if turn.left_out else {})


def _drift(turn: Round) -> dict[str, float]:
    """Return the lengths of a round's updates."""
    layout = turn.arrays.layout
    sent = [wire.model_of(reply.content) for reply in turn.replies]
    states = [turn.before.state, *(wire.state_of(r, layout) for r in sent), turn.arrays.state]
    before, *clients, after = [state[: layout.trainable] for state in states]
    return drift(before, clients, after)


class EarlyStop:
    """When to end before the last round.

    Parameters
    ----------
    target : float
        Accuracy that is enough; 0 for none.
    patience : int
        Evaluations without a better accuracy that are too many; 0 for any number.
    """

    def __init__(self, target: float, patience: int) -> None:
        self.target = target
        self.patience = patience
        self.best = -1.0
        self.since = 0

    def reason(self, accuracy: float) -> str:
        """Return why to stop after an evaluation with this accuracy, or ""."""
        self.since = 0 if accuracy > self.best else self.since + 1
        self.best = max(self.best, accuracy)
        if self.target and accuracy >= self.target:
            return f"reached --target-accuracy {self.target:g}"
        if self.patience and self.since >= self.patience:
            return f"--patience {self.patience}: no better accuracy since {self.best:.4f}"
        return ""
