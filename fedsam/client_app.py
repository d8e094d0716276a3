"""Flower's ClientApp: a SuperNode that trains its partition, as any engine's client does."""

from functools import lru_cache

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedsam.config.schema import Config, from_run_config
from fedsam.engines.flower import partition_answer
from fedsam.engines.threads import keep_freed_memory, one_compute_thread
from fedsam.messages import (
    MEMORY,
    PARTITION,
    VectorRecord,
    plain_content,
    plain_record,
    state_of,
    train_instruction,
    train_reply,
    vectors_of,
    vectors_record,
)
from fedsam.simulate.build import new_trainer
from fedsam.training.client import ClientJob, Trainer
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
        trainer, network = resident(from_run_config(context.run_config).model_dump_json())
        arrays, round, lr = train_instruction(message.content)
        state = state_of(arrays, trainer.layout)
        client = int(context.node_config[PARTITION])
        memory = vectors_of(context.state, trainer.layout, MEMORY)
        sent = vectors_of(message.content, trainer.layout)
        done = trainer.train_client(network, ClientJob(client, state, round, lr, memory, sent))
    if done.memory:  # Flower keeps a context's state for the node's next round
        context.state[MEMORY] = plain_record(vectors_record(done.memory))
    record = VectorRecord(trainer.layout, done.state)
    content = train_reply(record, done.examples, done.steps, done.loss, done.reply)
    return Message(plain_content(content), reply_to=message)
