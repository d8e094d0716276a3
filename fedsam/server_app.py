"""Flower's ServerApp: the same experiment on Flower's runtime (``flwr run .``)."""

import logging

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsam.base.errors import TrainingError, UsageError
from fedsam.config.schema import from_run_config
from fedsam.runs.metrics import finals, headline_of, words_of
from fedsam.simulate.run import run

log = logging.getLogger("fedsam")
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment of the run config on the nodes behind ``grid``."""
    try:
        outcome = run(from_run_config(context.run_config), flower=grid)
    except (UsageError, TrainingError) as error:
        log.error("fedsam: error: %s", error)  # Flower prints a traceback after it
        raise error.with_traceback(None) from None
    headline = headline_of(outcome.summary)
    final = outcome.summary[finals(headline)[0]]
    print(f"final {words_of(headline)} {final:.4f}, results in {outcome.folder}")
