"""The late-phase switch (Zhou et al., ICLR 2025): one minimizer first, another in the end."""

from typing import ClassVar

from torch import Tensor

from fedsam.training.method import Descend, Grad, Local, Minimizer, Vectors, rounds_before


class Late(Minimizer):
    """Train by ``first`` in rounds 1 to s, by ``then`` from round s + 1 on.

    The paper's finding: SAM in the last few epochs does nearly as well as SAM throughout. It
    switches by epoch; here by communication round. Its two optimisers keep momenta of their own,
    as here every round does. Passes a step: those of the minimizer in force.

    Parameters
    ----------
    first : Minimizer
        Until the switch; by name.
    then : Minimizer
        After it, likewise. The paper goes from sgd to sam, and back.
    rounds : int
        Of the run: ``--rounds``.
    start : float
        s: a fraction of the rounds up to 1.0, or a round. The paper's Figure 1: 175 of 200 epochs.
    """

    minimizers: ClassVar = {"first": "sgd", "then": "sam"}

    def __init__(self, first: Minimizer, then: Minimizer, rounds: int, start: float = 0.75) -> None:
        for name, minimizer in (("first", first), ("then", then)):
            if minimizer.memory or minimizer.exchanged:
                raise ValueError(
                    f"{name}: {type(minimizer).__name__} remembers vectors from round to round: "
                    "choose another"
                )
        self.first = first
        self.then = then
        self.start = rounds_before(start, rounds)

    def at(self, round: int) -> Minimizer:
        """Return the minimizer in force in a round."""
        minimizer: Minimizer = (self.then if round > self.start else self.first).at(round)
        return minimizer

    def step(self, w: Tensor, grad: Grad, descend: Descend, local: Local) -> tuple[Tensor, Vectors]:
        """Return what the minimizer in force does."""
        return self.at(int(local.round)).step(w, grad, descend, local)
