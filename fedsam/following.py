"""A run, followed from round to round: evaluated, written down, kept, and stopped in good order."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from signal import SIGINT
from typing import Any

import torch

from fedsam.base.errors import StorageError, TrainingError, storing
from fedsam.base.randomness import torch_generator
from fedsam.base.system import Interrupted, Stop
from fedsam.checkpoint import Snapshot
from fedsam.config.schema import Config
from fedsam.engines.threads import ThreadExecutor
from fedsam.measure import lifelong
from fedsam.measure.drift import drift
from fedsam.messages import VectorRecord, model_of, state_of
from fedsam.resume import Due, RunState
from fedsam.rundir import RunDir
from fedsam.server.rounds import Round
from fedsam.server.wrapped import Averaged


@dataclass
class Following:
    """Where a run is.

    Attributes
    ----------
    config : Config
        What is run.
    state : RunState
        All else that changes from round to round.
    crew : ThreadExecutor
        Evaluates.
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
    crew: ThreadExecutor
    folder: RunDir
    write: Callable[[dict[str, Any]], None]
    stop: Stop
    arrays: VectorRecord
    done: int

    def go(self, turns: Iterable[Round]) -> dict[str, Any]:
        """Play the rounds; return the summary."""
        due, reason = Due(self.config.checkpoint_every), "all rounds done"
        kept = self._gather()
        try:
            if not self.done:
                self.write({"round": 0, **self._measure()})
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
        return self._finish(kept, reason, finished=True)

    def _take(self, turn: Round) -> str:
        """Take in a round that was played; return why to stop after it, or ""."""
        self.arrays, number = turn.arrays, turn.number
        line = line_of(turn)
        if self.config.evaluates(number):
            line |= self._measure(number) | drift_of(turn)
        if self.config.save_every and number % self.config.save_every == 0:
            with storing(self.folder.path):
                self.folder.save_model(f"models/{number:06d}", self._evaluated())
        self.write(line)
        self.done = number
        return self.state.stop.reason(line["accuracy"]) if "accuracy" in line else ""

    def _evaluated(self) -> VectorRecord:
        """Return the model that is evaluated: the average where there is one."""
        strategy, config, trainer = self.state.strategy, self.config, self.crew.trainer
        model = strategy.model(self.arrays) if isinstance(strategy, Averaged) else self.arrays
        if not config.update_bn:
            return model
        drawn = torch.randperm(len(trainer.train), generator=torch_generator(config.seed, "bn"))
        state = self.crew.update_bn(model.state, trainer.train, drawn[: config.update_bn])
        return VectorRecord(model.layout, state)

    def _measure(self, round: int = 0) -> dict[str, Any]:
        """Return the metrics of the test set; in a lifelong run, of each task so far as well."""
        trainer, state = self.crew.trainer, self._evaluated().state
        found: dict[str, Any] = {**self.crew.evaluate(state, trainer.test)}
        if trainer.lifelong is not None:
            begun = trainer.lifelong.at(round) + 1
            rows = trainer.lifelong.rows_by_task(trainer.test.targets)[:begun]
            each = [self.crew.evaluate(state, trainer.test, task) for task in rows]
            found[lifelong.KEY] = [metrics["accuracy"] for metrics in each]
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


def line_of(turn: Round) -> dict[str, Any]:
    """Return a round's line of metrics.jsonl; what clients report is marked as training's."""
    train = {f"train_{name}": value for name, value in turn.metrics.items()}
    line = {"round": turn.number, "seconds": turn.seconds, "clients": turn.clients, **train}
    return line | ({"left_out": turn.left_out} if turn.left_out else {})


def drift_of(turn: Round) -> dict[str, float]:
    """Return the lengths of a round's updates."""
    layout = turn.arrays.layout
    sent = [model_of(reply.content) for reply in turn.replies]
    states = [turn.before.state, *(state_of(r, layout) for r in sent), turn.arrays.state]
    before, *clients, after = [state[: layout.trainable] for state in states]
    return drift(before, clients, after)
