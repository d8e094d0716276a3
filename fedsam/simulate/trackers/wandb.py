"""Weights & Biases: its environment variables say where to, and whether online."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsam.base.errors import TrainingError
from fedsam.config.schema import Config
from fedsam.runs.metrics import ROUND
from fedsam.simulate.tracking import finals, needing, numbers, pictures


class WandB:
    """A W&B run of the folder's name, in the project ``fedsam`` or that of WANDB_PROJECT.

    What W&B keeps on this machine lies in ``RUN/wandb``, or under WANDB_DIR.
    """

    def __init__(self) -> None:
        with needing("wandb"):
            import wandb
        self.wandb = wandb

    def start(self, config: Config, folder: Path) -> None:
        """Begin a run beside those that this process may have already."""
        self.folder = folder
        self.round = 0
        silent = {"silent": True} if config.quiet else {}
        try:
            self.run = self.wandb.init(
                project=os.environ.get("WANDB_PROJECT", "fedsam"),
                name=folder.name,
                dir=os.environ.get("WANDB_DIR", str(folder)),
                config=config.model_dump(),
                reinit="create_new",
                # stdout belongs to all runs of the process, not to one
                settings=self.wandb.Settings(console="off", **silent),
            )
        except self.wandb.Error as error:
            raise TrainingError(f"--track wandb: {error} (or set WANDB_MODE=offline)") from error

    def log(self, line: Mapping[str, Any]) -> None:
        """Hand the line's metrics over at its round."""
        self.round = line[ROUND]
        self.run.log(numbers(line), step=self.round)

    def finish(self, summary: Mapping[str, Any], error: BaseException | None) -> None:
        """Hand over final accuracies and pictures; wait until all has been written or sent."""
        images = {name: self.wandb.Image(str(p)) for name, p in pictures(self.folder).items()}
        self.run.log(images, step=self.round)
        self.run.summary.update(finals(summary))
        self.run.finish(exit_code=0 if error is None else 1)
