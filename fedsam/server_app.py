"""Flower's ServerApp: the same experiment on Flower's runtime (``flwr run .``)."""

import logging

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsam.base.errors import TrainingError, UsageError
from fedsam.config.schema import from_run_config
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
    print(f"final accuracy {outcome.summary['final_accuracy']:.4f}, results in {outcome.folder}")
