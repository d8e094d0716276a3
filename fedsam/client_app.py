"""Flower's ClientApp: a SuperNode that trains its partition, as any engine's client does."""

from functools import lru_cache

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedsam import wire
from fedsam.config import Config, from_run_config
from fedsam.engines.crew import keep_freed_memory, one_compute_thread
from fedsam.engines.flower import partition_answer
from fedsam.experiment import new_trainer
from fedsam.replica import Replica
from fedsam.trainer import Job, Trainer

app = ClientApp()


@lru_cache(maxsize=1)  # data and model stay with the process; the text is the whole config
def resident(text: str) -> tuple[Trainer, Replica]:
    """Return the trainer of a config in JSON, and a model."""
    keep_freed_memory()
    trainer, _ = new_trainer(Config.model_validate_json(text))
    return trainer, trainer.new_replica()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Answer the roll call."""
    return partition_answer(message, int(context.node_config[wire.PARTITION]))


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train this node's partition for one round."""
    with one_compute_thread():
        trainer, replica = resident(from_run_config(context.run_config).model_dump_json())
        arrays, round, lr = wire.instruction(message.content)
        state = wire.state_of(arrays, trainer.layout)
        client = int(context.node_config[wire.PARTITION])
        done = trainer.train_client(replica, Job(client, state, round, lr))
    record = wire.plain(wire.VectorRecord(trainer.layout, done.state))
    content = wire.trained(record, done.examples, done.steps, done.loss)
    return Message(content, reply_to=message)
