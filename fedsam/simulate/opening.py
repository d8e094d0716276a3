"""What a run says of itself before its first round."""

import logging

import torch

from fedsam.base.system import cores
from fedsam.config.schema import Config
from fedsam.simulate.build.model import model_name
from fedsam.simulate.build.steps import why_not_compiled
from fedsam.training.client import Trainer

log = logging.getLogger("fedsam")


def tell(config: Config, trainer: Trainer) -> None:
    """Log which model is trained where, and on how many images a client."""
    sizes, device = trainer.partition.sizes, trainer.layout.device
    many = config.processes or config.threads or cores()
    one, more = ("process", "processes") if config.processes else ("thread", "threads")
    on_cpu = f"{many} {one if many == 1 else more}"
    place = on_cpu if device.type == "cpu" else torch.cuda.get_device_name(device)
    frozen = {t.data_ptr(): t.numel() for t in trainer.layout.frozen.values()}
    beside = f" beside {sum(frozen.values()):,} frozen" if frozen else ""
    trained = f"{trainer.layout.trainable:,} parameters{beside}"
    what = f"{model_name(config)}, {trained}, {trainer.precision}"
    log.info("model     %s on %s (%s)", what, device.type, place)
    if config.compile:
        log.info("compile   %s", why_not_compiled(config, trainer) or "the step, once")
    whose = f"{len(sizes)} clients, {sizes.min()} to {sizes.max()} each"
    images, tested = int(sizes.sum()), len(trainer.test)
    log.info("data      %s images over %s; %s for testing", f"{images:,}", whose, f"{tested:,}")
