"""TensorBoard: an event file in the run's folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsam.config.schema import Config
from fedsam.runs.files import TENSORBOARD
from fedsam.runs.metrics import ENDED, ROUND
from fedsam.simulate.tracking import finals, hyperparameters, needing, numbers, pictures

FLUSH = 10  # seconds until what was logged is seen, and may be lost in a kill


class TensorBoard:
    """Scalars by round, hyper-parameters and pictures in ``RUN/tensorboard``.

    TensorBoard keeps scalars in float32.
    """

    def __init__(self) -> None:
        with needing("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        self._new_writer = SummaryWriter

    def start(self, config: Config, folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
        """Open an event file, which stands in place of earlier ones, and write what there is."""
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        self.folder = folder
        self.round = 0
        # a kill loses the end of a file, and rounds after the checkpoint come again: all is
        # written anew, and what earlier files hold from step 0 on counts no more
        self.writer = self._new_writer(str(folder / TENSORBOARD), flush_secs=FLUSH, purge_step=0)
        self.writer.file_writer.add_summary(hparams_pb(hyperparameters(config), folder.name))
        for line in lines:
            self.log(line)

    def log(self, line: Mapping[str, Any]) -> None:
        """Write the line's metrics at its round."""
        self.round = line[ROUND]
        for name, value in numbers(line).items():
            self.writer.add_scalar(name, value, self.round)

    def finish(self, summary: Mapping[str, Any], error: BaseException | None) -> None:
        """Write the final accuracies, why the run ended, and its pictures; close the file."""
        from matplotlib.image import imread

        for name, value in finals(summary).items():
            self.writer.add_scalar(name, value, self.round)
        self.writer.add_text("ended", summary.get(ENDED) or repr(error), self.round)
        for name, path in pictures(self.folder).items():
            self.writer.add_image(name, imread(path), self.round, dataformats="HWC")
        self.writer.close()
