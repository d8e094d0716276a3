"""One run, followed: rounds are played, evaluated, written down, and stopped when it is time."""

import logging
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from signal import SIGINT
from typing import Any

import torch
from flwr.serverapp import Grid
from torch import Tensor

from fedsam.base.errors import StorageError, TrainingError, UsageError, one_line
from fedsam.base.randomness import numpy_generator, sample_clients, torch_generator
from fedsam.base.system import Interrupted, Stop, cores
from fedsam.base.timers import Recorder, recording
from fedsam.config.schema import Config
from fedsam.engines.flower import FlowerGrid, RollCall
from fedsam.engines.local import LocalGrid
from fedsam.engines.node_keys import owners
from fedsam.engines.processes import ProcessExecutor, TimedExecutor, unforkable
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
from fedsam.simulate.build.executors import new_ray_executor
from fedsam.simulate.build.steps import new_gradients
from fedsam.simulate.build.strategy import new_strategy
from fedsam.simulate.build.trainer import new_trainer, pinned
from fedsam.simulate.groups import ByNumber, EvaluationGroups
from fedsam.simulate.opening import tell
from fedsam.simulate.profile import Phase, rows_of, save, traced
from fedsam.simulate.resume import RunState
from fedsam.simulate.schedule import Due, EarlyStop
from fedsam.simulate.tracking import new_trackers, tracking
from fedsam.tasks import headline_of
from fedsam.training.client import ClientJob, Trainer, attempt

log = logging.getLogger("fedsam")
SHOWN = 6  # test images whose answers are drawn
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
    RunDir.check(config.out, new=snapshot is None)
    config = pinned(config)
    with one_compute_thread(), ExitStack() as leaving:
        trainer, initial = new_trainer(config)
        leaving.enter_context(computing(trainer))
        threads = new_threads(config, trainer, stop)
        leaving.callback(threads.close)
        tell(config, trainer)
        warm_up(trainer, initial.state, config.rate(1))
        nodes: Mapping[int, int] | Sequence[int] = range(config.clients)
        if flower is not None:
            holders = owners(config.node_keys, config.clients) if config.node_keys else None
            nodes = roll = RollCall(
                flower, config.clients, owners=holders, needed=config.min_clients
            )
            grid: Grid = FlowerGrid(flower, roll)
        elif config.engine == "ray":
            actors = new_ray_executor(config, trainer)
            leaving.callback(actors.close)
            actors.wait_for_one()
            grid = LocalGrid(threads, actors)
        elif gradients := new_gradients(config, trainer):
            from fedsam.engines.batched import BatchedExecutor, BatchedPrograms, BatchedRun

            run = BatchedRun(trainer, upcoming(config, trainer))
            grid = LocalGrid(threads, BatchedExecutor(BatchedPrograms(threads, gradients), run))
        else:
            executor = new_local_executor(config, threads, stop)
            leaving.callback(executor.close)
            grid = LocalGrid(threads, executor)
        return play_out(config, threads, grid, nodes, initial, watch, snapshot=snapshot, stop=stop)


def warm_up(trainer: Trainer, state: Tensor, lr: float) -> None:
    """Train a client for nothing, so that steps are compiled before anybody waits for them."""
    if trainer.compiled:
        largest = ClientJob(int(trainer.partition.sizes.argmax()), state, 1, lr)
        attempt(replace(trainer, debug=False), trainer.new_network(), largest)


def new_threads(config: Config, trainer: Trainer, stop: Stop) -> ThreadExecutor:
    """Return the threads that evaluate, and train where nobody else does."""
    on_cpu = trainer.layout.device.type == "cpu"
    threads = (config.threads or cores()) if on_cpu and not config.debug else 1
    return ThreadExecutor(trainer, threads, stop, upcoming(config, trainer))


def new_local_executor(
    config: Config, threads: ThreadExecutor, stop: Stop
) -> ThreadExecutor | ProcessExecutor | TimedExecutor:
    """Return who trains clients one by one on this machine: the threads, or processes.

    By --processes. Without it processes train where the first rounds, timed in the threads, show
    that they pay, but for runs that some other code may follow in this process.
    """
    trainer, wanted = threads.trainer, config.processes
    why_not = unforkable(trainer)
    if wanted and why_not:
        raise UsageError(f"--processes {wanted}: {why_not}; give --processes 0")

    def fork() -> ProcessExecutor:
        many = wanted or threads.number
        return ProcessExecutor(trainer, many, config.clients_per_round, stop)

    if wanted:
        return fork()
    locked = getattr(sys, "_is_gil_enabled", lambda: True)()  # else threads do not wait
    followed = config.debug or config.profile or config.trace or not only_ours(config)
    alone = min(threads.number, config.clients_per_round) == 1
    if wanted == 0 or why_not or followed or alone or not locked:
        return threads
    return TimedExecutor(threads, fork, config.rounds)


def only_ours(config: Config) -> bool:
    """Return whether all code of a config's clients is fedsam's or torchvision's."""
    options = (config.minimizer_options, config.client_options, config.loss_options)
    named = [config.model, config.minimizer, config.client, config.loss, config.task]
    named += [value for taken in options for value in taken.values() if isinstance(value, str)]
    return all(":" not in n or re.match(r"(fedsam|torchvision)[.:]", n) for n in named)


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


def upcoming(config: Config, trainer: Trainer) -> Callable[[int], list[int]]:
    """Return the run's most likely cohort, as a function of the round; after the last none."""
    sample = sampling(config, trainer)
    return lambda round: sample(round) if round <= config.rounds else []


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
    headline = headline_of(trainer.task)
    early = EarlyStop(config.target_accuracy, config.patience, headline=headline)
    state = RunState(new_strategy(config), side_vectors, memories, early)
    trackers = new_trackers(config.track)
    labels = trainer.train.classes.cpu()
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
    with closing(folder), ExitStack() as leaving:
        try:
            told = tracking(trackers, config, folder.path, folder.lines)
            track = leaving.enter_context(told)
        except BaseException:  # a tracker could not start
            if folder.new:
                folder.remove()
            raise

        def write(line: dict[str, Any]) -> None:
            with files.storing(folder.path):
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
    kept : Snapshot
        The run after the last round that is written down.
    """

    config: Config
    state: RunState
    threads: ThreadExecutor
    folder: RunDir
    write: Callable[[dict[str, Any]], None]
    stop: Stop
    arrays: VectorRecord
    done: int
    kept: Snapshot = field(init=False)

    @cached_property
    def groups(self) -> EvaluationGroups:
        """Which test images are told of together."""
        return EvaluationGroups(self.config, self.threads.trainer)

    def play(self, turns: Iterable[Round]) -> dict[str, Any]:
        """Play the rounds; return the summary."""
        self.kept = self._gather()
        try:
            reason = self._play(turns)
        except StorageError:
            raise
        except KeyboardInterrupt as error:
            self._finish("interrupted", finished=False)
            folder = self.folder.path if Due(self.config.checkpoint_every).ever else None
            raise Interrupted(self.stop.signal or SIGINT, folder, self.kept.round) from error
        except TrainingError as error:
            self._keep(str(error))
            raise
        except (Exception, SystemExit) as error:  # a plug-in's own: its traceback is shown
            self._keep(f"{type(error).__name__}: {one_line(error)}")
            if isinstance(error, SystemExit):
                raise RuntimeError("a plug-in asked Python to exit") from error
            raise
        return self._finish(reason, finished=True)

    def _play(self, turns: Iterable[Round]) -> str:
        """Play the rounds; return why to end."""
        due = Due(self.config.checkpoint_every)
        if due.ever and self.folder.new:
            self._save()
        if not self.folder.lines:
            self._begin()
        if reason := self.state.stop.met:  # it was killed before it said so
            return reason
        for turn in turns:
            reason = self._take(turn)
            if due.ever:
                self.kept = self._gather()
            if due.now(turn.number):
                self._save()
            if reason:
                return reason
            self.stop.check()
        return metrics.ALL_ROUNDS

    def _begin(self) -> None:
        """Measure the model before training."""
        try:
            self.write({metrics.ROUND: 0, **self._measure()})
        except (TrainingError, KeyboardInterrupt):
            raise
        except BaseException:  # a plug-in's own: there is nothing to keep
            if self.folder.new:
                self.folder.remove()
            raise
        self.kept = self._gather()

    def _keep(self, reason: str) -> None:
        """Write all files of a run that something ended; what fails in that does not hide it."""
        if not self.folder.path.exists():
            return
        try:
            self._finish(reason, finished=False)
        except Exception as error:
            log.exception("%s: could not be kept whole: %s", self.folder.path, one_line(error))

    def _take(self, turn: Round) -> str:
        """Take in a round that was played; return why to stop after it, or ""."""
        self.arrays, number = turn.arrays, turn.number
        line = metrics.line_of_round(
            number, turn.seconds, turn.clients, turn.metrics, turn.left_out
        )
        if self.config.evaluates(number):
            line |= self._measure(number) | drift_of(turn)
        if self.config.save_every and number % self.config.save_every == 0:
            with files.storing(self.folder.path):
                self.folder.save_model(files.model_after(number), self._evaluated())
        self.write(line)
        self.done = number
        headline = headline_of(self.threads.trainer.task)
        value = line.get(metrics.of_validation(headline) if self.config.validation else headline)
        return "" if value is None else self.state.stop.reason(value)

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
        """Return the metrics of the test set, and what is told of its groups, in one pass."""
        trainer, state = self.threads.trainer, self._evaluated().state
        whole, by_group = self.threads.evaluate_by_group(state, trainer.test, self.groups.places)
        if not math.isfinite(whole[metrics.LOSS]):
            log.warning("round %d: the test loss is not finite", round)
        beside: ByNumber = {}
        if trainer.beside:
            images = trainer.beside.images
            _, beside = self.threads.evaluate_by_group(state, images, self.groups.beside)
        told = self.groups.told(by_group, beside, round)
        return {**metrics.named(headline_of(trainer.task)), **whole, **told}

    def _gather(self) -> Snapshot:
        """Return what is needed to go on after the last round."""
        return self.state.gather(self.done, self.arrays, self.folder.position)

    def _save(self) -> None:
        with files.storing(self.folder.path):
            self.folder.save(self.kept)

    def _finish(self, reason: str, *, finished: bool) -> dict[str, Any]:
        """Write all files of the run."""
        if Due(self.config.checkpoint_every).ever:
            self._save()
        try:
            evaluated = self._evaluated()
            answers = self._answers(evaluated)
        except Exception as error:  # a plug-in's, after another mistake
            if finished:
                raise
            log.exception("the trained model stands for the one evaluated: %s", one_line(error))
            evaluated, answers = self.arrays, None
        with files.storing(self.folder.path):
            summary = self.folder.finish(evaluated, self.arrays, reason, finished=finished)
            if answers:
                self.folder.draw_answers(*answers, self.threads.trainer.test.pixels.outside)
        return summary

    def _answers(self, model: VectorRecord) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return some test images, and what is true and said of their pixels, where it is."""
        test = self.threads.trainer.test
        rows = torch.linspace(0, len(test) - 1, min(SHOWN, len(test))).long()
        answers = self.threads.answers(model.state, test, rows) if test.aligned else None
        if answers is None:
            return None
        shown = test.only(rows)
        return shown.raw, shown.targets, answers


def drift_of(turn: Round) -> dict[str, float]:
    """Return the lengths of a round's updates."""
    layout = turn.arrays.layout
    sent = [model_of(reply.content) for reply in turn.replies]
    states = [turn.before.state, *(state_of(r, layout) for r in sent), turn.arrays.state]
    before, *clients, after = [state[: layout.trainable] for state in states]
    return drift(before, clients, after)
