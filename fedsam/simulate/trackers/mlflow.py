"""MLflow: the server of MLFLOW_TRACKING_URI, or a database file beside the runs."""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedsam.base.errors import TrainingError
from fedsam.config.schema import Config
from fedsam.runs.metrics import ROUND
from fedsam.simulate.tracking import finals, hyperparameters, needing, numbers, pictures

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

    def start(self, config: Config, folder: Path) -> None:
        """Begin a run, and write the hyper-parameters."""
        self.folder = folder
        self.waiting: list[Any] = []
        self.round = 0
        self.written = time.monotonic()
        with said_in_one_line(self.mlflow.MlflowException):
            self.client, experiment = self._open(folder.parent.resolve())
            self.id = self.client.create_run(experiment, run_name=folder.name).info.run_id
            params = hyperparameters(config).items()
            self.client.log_batch(
                self.id, params=[self.mlflow.entities.Param(key, str(v)) for key, v in params]
            )

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
