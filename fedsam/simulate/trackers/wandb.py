"""Weights & Biases: its environment variables say where to, and whether online."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsam.base.errors import TrainingError
from fedsam.config.schema import Config
from fedsam.runs.metrics import ROUND
from fedsam.simulate.tracking import finals, keep_run_id, needing, numbers, pictures, run_id

SERVICE = "wandb"


class WandB:
    """A W&B run of the folder's name, in the project ``fedsam`` or that of WANDB_PROJECT.

    What W&B keeps on this machine lies in ``RUN/wandb``, or under WANDB_DIR.
    """

    def __init__(self) -> None:
        with needing("wandb"):
            import wandb
        self.wandb = wandb

    def start(self, config: Config, folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
        """Begin a run beside those that this process may have, or go on with the folder's."""
        self.folder = folder
        before = run_id(folder, SERVICE)
        self.round = 0
        silent = {"silent": True} if config.quiet else {}
        try:
            self.run = self.wandb.init(
                project=os.environ.get("WANDB_PROJECT", "fedsam"),
                name=folder.name,
                dir=os.environ.get("WANDB_DIR", str(folder)),
                config=config.model_dump(),
                reinit="create_new",
                id=before or None,
                resume="allow" if before else None,
                # stdout belongs to all runs of the process, not to one
                settings=self.wandb.Settings(console="off", **silent),
            )
        except self.wandb.Error as error:
            raise TrainingError(f"--track wandb: {error} (or set WANDB_MODE=offline)") from error
        keep_run_id(folder, SERVICE, self.run.id)
        self.first = self.run.step  # earlier ones it has, and takes no second time
        for line in lines:
            self.log(line)

    def log(self, line: Mapping[str, Any]) -> None:
        """Hand the line's metrics over at its round, if W&B has it not."""
        self.round = line[ROUND]
        if self.round >= self.first:
            self.run.log(numbers(line), step=self.round)

    def finish(self, summary: Mapping[str, Any], error: BaseException | None) -> None:
        """Hand over final accuracies and pictures; wait until all has been written or sent."""
        images = {name: self.wandb.Image(str(p)) for name, p in pictures(self.folder).items()}
        self.run.log(images, step=self.round)
        self.run.summary.update(finals(summary))
        self.run.finish(exit_code=0 if error is None else 1)
