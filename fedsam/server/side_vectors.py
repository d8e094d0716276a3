"""What some methods send beside the model: the server's side of it, around any strategy.

A strategy sends and averages the model and sees nothing of this; the vectors ride in a record of
their own, put into the messages after the strategy made them and taken out of the replies before
it gets them.
"""

from collections.abc import Sequence

import torch
from flwr.app import Message

from fedsam.base.vector import Layout
from fedsam.messages import EXCHANGED, vectors_of, vectors_record
from fedsam.training.method import Method, Vectors, zeros


class SideVectors:
    """The vectors of a run that travel beside the model.

    Parameters
    ----------
    method : Method
        The clients' side, which says what travels and how the server folds the replies.
    layout : Layout
        The model's.
    clients : int
        Population size.

    Attributes
    ----------
    vectors : mapping
        What the server sends next, (P,) by name.
    """

    def __init__(self, method: Method, layout: Layout, clients: int) -> None:
        self.method = method
        self.layout = layout
        self.clients = clients
        like = torch.zeros(layout.trainable, dtype=layout.dtype, device=layout.device)
        self.vectors: Vectors = zeros(method.exchanged, like)

    def attach(self, messages: Sequence[Message]) -> None:
        """Put the vectors into the messages of a round."""
        if self.vectors:
            record = vectors_record(self.vectors)
            for message in messages:
                message.content[EXCHANGED] = record

    def fold(self, replies: Sequence[Message]) -> None:
        """Take the clients' vectors out of replies that were screened; make the server's next."""
        if not self.vectors:
            return
        theirs = [vectors_of(reply.content, self.layout) for reply in replies]
        for reply in replies:
            del reply.content[EXCHANGED]
        self.vectors = self.method.fold(self.vectors, theirs, len(replies) / self.clients)
