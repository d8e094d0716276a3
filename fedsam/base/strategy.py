"""The contracts of the server's plug-ins: how replies become the next model, what is averaged.

Formulas know vectors and nothing of messages, models or devices: P parameters, K clients.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

State = Mapping[str, Tensor]


class ServerMethod(ABC):
    """What the server makes of a round: the classes of ``strategies/``, or yours.

    All but ``update`` has a default. Nothing that a formula is given may be changed in place: it
    returns new tensors. ``server.adapter`` makes a Flower Strategy of it, which also averages
    what is not trained (BatchNorm's statistics) by the clients' weights.

    Attributes
    ----------
    state : tuple of str
        Names of the vectors (P,) that the server keeps from round to round.
    takes : tuple of str
        Metrics of the replies that ``update`` is handed by these names, K numbers each.
    needs : tuple of str
        Parameters that the run fills though they have a default, such as ``momentum``.
    """

    state: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    def start(self, w: Tensor) -> State:
        """Return the state before the first round, given the first model (P,): zeros."""
        return {name: torch.zeros_like(w) for name in self.state}

    def send(self, w: Tensor, state: State, round: int) -> Tensor:
        """Return what the clients start from (P,): the global model itself.

        Parameters
        ----------
        w : Tensor
            The global model, (P,).
        state : mapping
            As the last round left it, (P,) by name.
        round : int
            From 1.
        """
        return w

    @abstractmethod
    def update(
        self, w: Tensor, W: Sequence[Tensor], n: Sequence[float], state: State, round: int
    ) -> tuple[Tensor, State]:
        """Return the new global model (P,) and the new state.

        Parameters
        ----------
        w : Tensor
            The global model before the round, (P,); ``send`` says what the clients were sent.
        W : sequence of Tensor
            The K clients' models, (P,) each, by ascending client.
        n : sequence of float
            Their weights, by default their numbers of examples.
        state : mapping
            As the last round left it, (P,) by name.
        round : int
            From 1.
        """


class Average(ABC):
    """A rule of averaging global models: the classes of ``strategies/averages/``, or yours.

    Parameters
    ----------
    start : int
        Rounds before the averaging begins.
    """

    def __init__(self, start: int) -> None:
        self.start = start

    def rate(self, round: int, lr: float) -> float:
        """Return the clients' learning rate in ``round``: the usual one."""
        return lr

    def collects(self, round: int) -> bool:
        """Return whether the model after ``round`` enters the average: each after ``start``."""
        return round > self.start

    @abstractmethod
    def average(self, average: Tensor, n: int, w: Tensor) -> Tensor:
        """Return the new average (S,), a new tensor, from the old, its n members and a model."""
