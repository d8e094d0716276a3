"""Flower's ClientApp: a SuperNode that trains its partition, as any engine's client does."""

from functools import lru_cache

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedsam.config.schema import Config, from_run_config, of_ours
from fedsam.engines.codec import job_of, reply_of
from fedsam.engines.flower import partition_answer
from fedsam.engines.threads import computing, keep_freed_memory, one_compute_thread
from fedsam.messages import (
    MEMORY,
    PARTITION,
    plain_content,
    plain_record,
    vectors_of,
    vectors_record,
)
from fedsam.simulate.build.trainer import new_trainer
from fedsam.training.client import Trainer
from fedsam.training.flat_module import FlatModule

app = ClientApp()


@lru_cache(maxsize=1)  # data and model stay with the process; the text is the whole config
def resident(text: str) -> tuple[Trainer, FlatModule]:
    """Return the trainer of a config in JSON, and a model."""
    keep_freed_memory()
    trainer, _ = new_trainer(Config.model_validate_json(text))
    return trainer, trainer.new_network()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Answer the roll call."""
    return partition_answer(message, int(context.node_config[PARTITION]))


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train this node's partition for one round."""
    with one_compute_thread():
        trainer, network = resident(from_run_config(of_ours(context.run_config)).model_dump_json())
    with computing(trainer):
        client = int(context.node_config[PARTITION])
        memory = vectors_of(context.state, trainer.layout, MEMORY)
        job = job_of(message.content, trainer.layout, client, memory)
        done = trainer.train_client(network, job)
    if done.memory:  # Flower keeps a context's state for the node's next round
        context.state[MEMORY] = plain_record(vectors_record(done.memory))
    return Message(plain_content(reply_of(trainer.layout, done)), reply_to=message)
