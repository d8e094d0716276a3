"""Who trains the clients, where the Config asks for more than threads."""

import math
from typing import TYPE_CHECKING

from fedsam.base.errors import UsageError
from fedsam.base.system import cores
from fedsam.config.schema import Config
from fedsam.simulate.build.trainer import new_trainer
from fedsam.training.client import Trainer

if TYPE_CHECKING:
    from fedsam.engines.ray import RayExecutor


def new_ray_executor(config: Config, trainer: Trainer) -> "RayExecutor":
    """Return Ray actors that train the clients."""
    try:
        from fedsam.engines.ray import RayExecutor
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise UsageError("--engine ray: Ray is not installed; pip install 'fedsam[ray]'") from error

    digest = trainer.layout.digest

    def make() -> Trainer:
        """Make the trainer in the actor, from the config alone."""
        made = new_trainer(config)[0]
        if made.layout.digest != digest:
            raise UsageError(
                "--engine ray: the frozen parameters of an actor are not the driver's; every node "
                "needs the same --weights file"
            )
        return made

    workers = config.workers or cores()
    address, gpus = config.ray_address, config.gpus_per_worker
    return RayExecutor(trainer, make, workers, address, gpus, config.client_timeout or math.inf)
