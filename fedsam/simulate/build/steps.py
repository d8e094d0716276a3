"""How clients' steps are computed: a cohort's together, or each client's, maybe compiled."""

from dataclasses import replace

from fedsam.config.schema import Config
from fedsam.training.batched import declared
from fedsam.training.batched_gradient import Slots, Vmapped
from fedsam.training.client import Trainer

PAYS_FROM = 50_000  # steps of a run: what compiling takes, when nothing is on the disk yet


def new_gradients(config: Config, trainer: Trainer) -> type[Slots | Vmapped] | None:
    """Return how a cohort's gradients are computed; None where clients train each by itself."""
    if config.cohort == "auto":
        return Slots if trainer.layout.device.type == "cuda" else None
    return {"off": None, "slots": Slots, "vmap": Vmapped}[config.cohort]


def why_not_compiled(config: Config, trainer: Trainer) -> str:
    """Return why the steps of a run are not compiled; "" if they are.

    By the config and the data alone, never by a clock: compiled steps round otherwise.
    """
    if new_gradients(config, trainer) is not None:
        return "a cohort trains as one program (--cohort)"
    sizes, clients = trainer.partition.sizes.unique(return_counts=True)
    of_size = zip(sizes.tolist(), clients.tolist(), strict=True)
    mean = sum(trainer.work.steps(size) * count for size, count in of_size) / config.clients
    total = config.rounds * config.clients_per_round * mean
    if total < PAYS_FROM:
        return f"a run of {total:,.0f} steps ends before it pays, from {PAYS_FROM:,}"
    return declared(trainer, 1)


def with_compiled_steps(config: Config, trainer: Trainer) -> Trainer:
    """Return the trainer with compiled steps, where the config wants them and they pay."""
    if not config.compile or why_not_compiled(config, trainer):
        return trainer
    from fedsam.compiled.steps import CompiledSteps, prepare_compiler

    prepare_compiler(trainer.layout.device)
    width = max(trainer.work.cut(int(trainer.partition.sizes.max())))
    steps = CompiledSteps(trainer.new_module(), trainer.task, width, bf16=trainer.bf16)
    return replace(trainer, compiled=steps)
