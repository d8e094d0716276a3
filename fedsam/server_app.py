"""Flower's ServerApp: the same experiment on Flower's runtime (``flwr run .``)."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsam.config.schema import from_run_config
from fedsam.simulate.run import run

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment of the run config on the nodes behind ``grid``."""
    outcome = run(from_run_config(context.run_config), flower=grid)
    print(f"final accuracy {outcome.summary['final_accuracy']:.4f}, results in {outcome.folder}")
