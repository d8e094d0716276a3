"""MLflow: the server of MLFLOW_TRACKING_URI, or a database file beside the runs."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedsam.base.errors import TrainingError
from fedsam.config.schema import Config
from fedsam.runs.metrics import ROUND
from fedsam.simulate.tracking import (
    finals,
    hyperparameters,
    keep_run_id,
    needing,
    numbers,
    pictures,
    run_id,
)

SERVICE = "mlflow"
PAUSE = 1.0  # seconds between writes: one takes a database 4 ms, as long as a small round
BATCH = 1000  # metrics that a server takes at once, MLflow's limit


class MLflow:
    """An MLflow run of the folder's name, in the experiment ``fedsam`` or MLFLOW_EXPERIMENT_NAME.

    Without MLFLOW_TRACKING_URI it is kept in ``mlflow.db`` and ``mlflow-artifacts`` in the folder
    that holds the run's, so that runs side by side are compared with each other. (MLflow's older
    store of plain files is closed by MLflow itself, unless MLFLOW_ALLOW_FILE_STORE=true.)
    """

    def __init__(self) -> None:
        with needing("mlflow"):
            import filelock
            import mlflow
        self.mlflow, self.lock = mlflow, filelock.FileLock

    def start(self, config: Config, folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
        """Begin a run, or go on with the folder's; write the hyper-parameters and what is missing.

        MLflow keeps a parameter and a metric's step for ever: a key that has another value now is
        the tag ``resumed.KEY``, and a step that is there is not written again.
        """
        self.folder = folder
        self.waiting: list[Any] = []
        self.steps: dict[str, set[int]] = {}  # that MLflow has, by metric
        self.round = 0
        self.written = time.monotonic()
        values = {key: str(value) for key, value in hyperparameters(config).items()}
        params, tag = self.mlflow.entities.Param, self.mlflow.entities.RunTag
        with said_in_one_line(self.mlflow.MlflowException):
            self.client, experiment = self._open(folder.parent.resolve())
            run = self._before(run_id(folder, SERVICE))
            if run is None:
                run = self.client.create_run(experiment, run_name=folder.name)
                keep_run_id(folder, SERVICE, run.info.run_id)
            else:
                self.client.update_run(run.info.run_id, status="RUNNING")
            self.id, had = run.info.run_id, run.data.params
            for name in run.data.metrics:
                history = self.client.get_metric_history(self.id, name)
                self.steps[name] = {metric.step for metric in history}
            changed = {k: v for k, v in values.items() if had.get(k, v) != v}
            self.client.log_batch(
                self.id,
                params=[params(k, v) for k, v in values.items() if k not in had],
                tags=[tag(f"resumed.{k}", v) for k, v in changed.items()],
            )
        for line in lines:
            self.log(line)

    def _before(self, id: str) -> Any:
        """Return the run of this id, if there is one and it was not deleted."""
        if not id:
            return None
        try:
            run = self.client.get_run(id)
        except self.mlflow.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def _open(self, beside: Path) -> tuple[Any, str]:
        """Return a client, and the experiment's id."""
        if uri := os.environ.get("MLFLOW_TRACKING_URI"):
            return self._connect(uri, None)
        # MLflow 3.17 fails where two runs create a database at the same time
        with self.lock(beside / ".mlflow.lock"):
            artifacts = (beside / "mlflow-artifacts").as_uri()
            return self._connect(f"sqlite:///{beside / 'mlflow.db'}", artifacts)

    def _connect(self, uri: str, artifacts: str | None) -> tuple[Any, str]:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "fedsam")
        client = self.mlflow.MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name(name)
        if experiment is not None:
            return client, experiment.experiment_id
        return client, client.create_experiment(name, artifact_location=artifacts)

    def log(self, line: Mapping[str, Any]) -> None:
        """Take the line's metrics at its round; write now and then."""
        self.round = line[ROUND]
        self._take(numbers(line))
        if time.monotonic() - self.written > PAUSE:
            self._write()

    def _take(self, metrics: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self.waiting += [
            self.mlflow.entities.Metric(name, value, now, self.round)
            for name, value in metrics.items()
            if self.round not in self.steps.get(name, ())
        ]

    def _write(self) -> None:
        with said_in_one_line(self.mlflow.MlflowException):
            for first in range(0, len(self.waiting), BATCH):
                self.client.log_batch(self.id, metrics=self.waiting[first : first + BATCH])
        self.waiting = []
        self.written = time.monotonic()

    def finish(self, summary: Mapping[str, Any], error: BaseException | None) -> None:
        """Write what is left, final accuracies and pictures; say how the run ended."""
        status = "FINISHED" if error is None else "FAILED"
        if isinstance(error, KeyboardInterrupt):
            status = "KILLED"
        self._take(finals(summary))
        self._write()
        with said_in_one_line(self.mlflow.MlflowException):
            for path in pictures(self.folder).values():
                self.client.log_artifact(self.id, str(path))
            self.client.set_terminated(self.id, status)


@contextmanager
def said_in_one_line(kind: type[Exception]) -> Iterator[None]:
    """Raise TrainingError, which ends a run in good order, where MLflow raises its own."""
    try:
        yield
    except kind as error:
        message = " ".join(str(error).split())
        raise TrainingError(f"--track mlflow: {message}") from error
