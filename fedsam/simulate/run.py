"""One run, followed: rounds are played, evaluated, written down, and stopped when it is time."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from signal import SIGINT
from typing import Any

import torch
from flwr.serverapp import Grid

from fedsam.base.errors import StorageError, TrainingError, UsageError, one_line, storing
from fedsam.base.randomness import numpy_generator, sample_clients, torch_generator
from fedsam.base.system import Interrupted, Stop, cores
from fedsam.base.timers import Recorder, recording
from fedsam.config.schema import Config
from fedsam.data.partition import Partition, shares_of_test
from fedsam.engines.batched import BatchedExecutor, BatchedPrograms, BatchedRun
from fedsam.engines.flower import FlowerGrid, RollCall
from fedsam.engines.local import LocalGrid
from fedsam.engines.node_keys import owners
from fedsam.engines.threads import ThreadExecutor, computing, one_compute_thread
from fedsam.messages import VectorRecord, model_of, state_of
from fedsam.runs import files, metrics
from fedsam.runs.checkpoint import Snapshot
from fedsam.runs.folder import RunDir
from fedsam.runs.metrics import drift
from fedsam.server.rounds import Round, play
from fedsam.server.screening import Limits
from fedsam.server.side_vectors import SideVectors
from fedsam.server.wrapped import Averaged
from fedsam.simulate.build import new_gradients, new_ray_executor, new_strategy, new_trainer
from fedsam.simulate.profile import Phase, rows_of, save, traced
from fedsam.simulate.resume import RunState
from fedsam.simulate.schedule import Due, EarlyStop
from fedsam.simulate.tracking import new_trackers, tracking
from fedsam.training.client import Trainer

log = logging.getLogger("fedsam")
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
        Go on from there in the folder ``config.out``; ``simulate.resume.resumed`` returns both.
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
    if config.node_keys and flower is None:
        raise UsageError("--node-keys: only Flower's nodes have keys (flwr run .); leave it out")
    if snapshot is None:
        RunDir.check(config.out)
    with one_compute_thread(), ExitStack() as leaving:
        trainer, initial = new_trainer(config)
        leaving.enter_context(computing(trainer))
        threads = new_threads(config, trainer, stop)
        leaving.callback(threads.close)
        nodes: Mapping[int, int] | Sequence[int] = range(config.clients)
        if flower is not None:
            holders = owners(config.node_keys, config.clients) if config.node_keys else None
            nodes = roll = RollCall(
                flower, config.clients, owners=holders, needed=config.min_clients
            )
            grid: Grid = FlowerGrid(flower, roll)
        elif config.engine == "ray":
            executor = new_ray_executor(config, trainer)
            leaving.callback(executor.close)
            executor.wait_for_one()
            grid = LocalGrid(threads, executor)
        elif gradients := new_gradients(config, trainer):
            run = BatchedRun(trainer, sampling(config, trainer))
            grid = LocalGrid(threads, BatchedExecutor(BatchedPrograms(threads, gradients), run))
        else:
            grid = LocalGrid(threads)
        return play_out(config, threads, grid, nodes, initial, watch, snapshot=snapshot, stop=stop)


def new_threads(config: Config, trainer: Trainer, stop: Stop) -> ThreadExecutor:
    """Return the threads that evaluate, and train where nobody else does."""
    on_cpu = trainer.layout.device.type == "cpu"
    return ThreadExecutor(trainer, (config.threads or cores()) if on_cpu else 1, stop)


def sampling(config: Config, trainer: Trainer) -> Callable[..., list[int]]:
    """Return the run's cohorts, as a function of the round and the attempt.

    In a lifelong run, of the clients that hold images of the round's task: all, if they are few.
    Without those that drop out.
    """
    lifelong, wanted = trainer.lifelong, config.clients_per_round
    holders = [c.tolist() for c in lifelong.holders(trainer.partition)] if lifelong else []

    def sample(round: int, attempt: int = 0) -> list[int]:
        able = range(config.clients) if lifelong is None else holders[lifelong.at(round)]
        most = min(wanted, len(able))
        drawn = sample_clients(config.seed, round, len(able), most, attempt)
        cohort = [able[number] for number in drawn]
        if not config.dropout_rate:
            return cohort
        chances = numpy_generator(config.seed, "dropout", round, attempt).random(len(cohort))
        stays = chances >= min(config.dropout_rate, chances.max())
        return [client for client, stayed in zip(cohort, stays, strict=True) if stayed]

    return sample


def play_out(
    config: Config,
    threads: ThreadExecutor,
    grid: Grid,
    nodes: Mapping[int, int] | Sequence[int],
    initial: VectorRecord,
    watch: Watch,
    *,
    snapshot: Snapshot | None = None,
    stop: Stop,
) -> Outcome:
    """Play a run's rounds on a Grid, from its beginning or a snapshot; write down what happens."""
    trainer, memories = threads.trainer, grid.memories if isinstance(grid, LocalGrid) else {}
    side_vectors = SideVectors(trainer.method, trainer.layout, config.clients)
    early = EarlyStop(config.target_accuracy, config.patience)
    state = RunState(new_strategy(config), side_vectors, memories, early)
    trackers = new_trackers(config.track)
    labels = trainer.train.targets.cpu()
    if snapshot is None:
        first, arrays = 0, initial
        folder = RunDir.create(config, trainer.partition, labels)
    else:
        first, arrays = snapshot.round, state.put_back(snapshot, initial)
        folder = RunDir.reopen(config, trainer.partition, labels, snapshot)
    turns = play(
        state.strategy,
        grid,
        arrays,
        rounds=range(first + 1, config.rounds + 1),
        sample=sampling(config, trainer),
        seed=config.seed,
        lr=config.rate,
        node_of=nodes,
        side_vectors=side_vectors,
        limits=Limits(
            config.min_clients,
            config.max_norm,
            config.clip_norm,
            config.client_timeout or None,
            equal=config.weighting == "equal",
        ),
        asked=trainer.asked,
        stop=stop,
    )
    if config.trace:
        turns = traced(turns, folder.path / files.TRACE)
    with ExitStack() as leaving:
        try:
            told = tracking(trackers, config, folder.path, folder.lines)
            track = leaving.enter_context(told)
        except BaseException:  # a tracker could not start
            if snapshot is None:
                folder.remove()
            raise

        def write(line: dict[str, Any]) -> None:
            with storing(folder.path):
                folder.log(line)
            track(line)
            watch(line)

        loop = RunLoop(config, state, threads, folder, write, stop, arrays, first)
        if not config.profile:
            return Outcome(folder.path, loop.play(turns))
        recorder = Recorder()
        with recording(recorder):
            summary = loop.play(turns)
        phases = rows_of(recorder)
        save(phases, folder.path / files.PROFILE)
        return Outcome(folder.path, summary, phases)


@dataclass
class RunLoop:
    """Where a run is.

    Attributes
    ----------
    config : Config
        What is run.
    state : RunState
        All else that changes from round to round.
    threads : ThreadExecutor
        Evaluate.
    folder : RunDir
        Where things are written to.
    write : callable
        Takes a line of metrics.
    stop : Stop
        Asked after each round whether to stop.
    arrays : VectorRecord
        The global model.
    done : int
        Rounds that were played.
    """

    config: Config
    state: RunState
    threads: ThreadExecutor
    folder: RunDir
    write: Callable[[dict[str, Any]], None]
    stop: Stop
    arrays: VectorRecord
    done: int

    @cached_property
    def client_tests(self) -> Partition:
        """Which test images are whose."""
        trainer = self.threads.trainer
        return shares_of_test(
            trainer.partition,
            trainer.train.targets.cpu(),
            trainer.test.targets.cpu(),
            numpy_generator(self.config.seed, "client tests"),
        )

    def play(self, turns: Iterable[Round]) -> dict[str, Any]:
        """Play the rounds; return the summary."""
        due, reason = Due(self.config.checkpoint_every), "all rounds done"
        kept = self._gather()
        try:
            if not self.done:
                self.write({metrics.ROUND: 0, **self._measure()})
                kept = self._gather()
            for turn in turns:
                wanted = self._take(turn)
                kept = self._gather() if due.ever else kept
                if due.now(turn.number):
                    self._save(kept)
                if wanted:
                    reason = wanted
                    break
                self.stop.check()
        except StorageError:
            raise
        except TrainingError as error:
            self._finish(kept, str(error), finished=False)
            raise
        except KeyboardInterrupt as error:
            self._finish(kept, "interrupted", finished=False)
            folder = self.folder.path if due.ever else None
            raise Interrupted(self.stop.signal or SIGINT, folder, kept.round) from error
        except Exception as error:  # a plug-in's own: its traceback is shown, the run is kept
            if self.folder.length:
                self._finish(kept, f"{type(error).__name__}: {one_line(error)}", finished=False)
            else:
                self.folder.remove()
            raise
        return self._finish(kept, reason, finished=True)

    def _take(self, turn: Round) -> str:
        """Take in a round that was played; return why to stop after it, or ""."""
        self.arrays, number = turn.arrays, turn.number
        line = metrics.line_of_round(
            number, turn.seconds, turn.clients, turn.metrics, turn.left_out
        )
        if self.config.evaluates(number):
            line |= self._measure(number) | drift_of(turn)
        if self.config.save_every and number % self.config.save_every == 0:
            with storing(self.folder.path):
                self.folder.save_model(files.model_after(number), self._evaluated())
        self.write(line)
        self.done = number
        accuracy = line.get(metrics.ACCURACY)
        return "" if accuracy is None else self.state.stop.reason(accuracy)

    def _evaluated(self) -> VectorRecord:
        """Return the model that is evaluated: the average where there is one."""
        strategy, config, trainer = self.state.strategy, self.config, self.threads.trainer
        model = strategy.model(self.arrays) if isinstance(strategy, Averaged) else self.arrays
        if not config.update_bn:
            return model
        drawn = torch.randperm(len(trainer.train), generator=torch_generator(config.seed, "bn"))
        state = self.threads.update_bn(model.state, trainer.train, drawn[: config.update_bn])
        return VectorRecord(model.layout, state)

    def _measure(self, round: int = 0) -> dict[str, Any]:
        """Return the metrics of the test set; in a lifelong run, of each task as well."""
        config, trainer, state = self.config, self.threads.trainer, self._evaluated().state
        found: dict[str, Any] = {**self.threads.evaluate(state, trainer.test)}
        if not math.isfinite(found[metrics.LOSS]):
            log.warning("round %d: the test loss is not finite", round)
        if config.client_tests:
            each = self.threads.evaluate_each(state, trainer.test, self.client_tests)
            found |= metrics.over_clients([one[metrics.ACCURACY] for one in each])
        if trainer.lifelong is not None:
            begun = trainer.lifelong.at(round) + 1
            rows = trainer.lifelong.rows_by_task(trainer.test.targets)
            each = [self.threads.evaluate(state, trainer.test, task) for task in rows]
            accuracies = [result[metrics.ACCURACY] for result in each]
            found[metrics.TASK_ACCURACY] = accuracies[:begun]
            found[metrics.UNSEEN_ACCURACY] = accuracies[begun:]
        return found

    def _gather(self) -> Snapshot:
        """Return what is needed to go on after the last round."""
        return self.state.gather(self.done, self.arrays, self.folder.length, self.folder.seconds)

    def _save(self, snapshot: Snapshot) -> None:
        with storing(self.folder.path):
            self.folder.save(snapshot)

    def _finish(self, kept: Snapshot, reason: str, *, finished: bool) -> dict[str, Any]:
        """Write all files of the run."""
        if Due(self.config.checkpoint_every).ever:
            self._save(kept)
        with storing(self.folder.path):
            return self.folder.finish(self._evaluated(), self.arrays, reason, finished=finished)


def drift_of(turn: Round) -> dict[str, float]:
    """Return the lengths of a round's updates."""
    layout = turn.arrays.layout
    sent = [model_of(reply.content) for reply in turn.replies]
    states = [turn.before.state, *(state_of(r, layout) for r in sent), turn.arrays.state]
    before, *clients, after = [state[: layout.trainable] for state in states]
    return drift(before, clients, after)
