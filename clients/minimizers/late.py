"""The late-phase switch (Zhou et al., ICLR 2025): one minimiser first, another in the end."""

import inspect

from torch import Tensor

from fedsam.config import plugins
from fedsam.training.method import Descend, Grad, Local, Minimizer, Remembering, rounds_before


class Late:
    """Train by ``first`` in rounds 1 to s, by ``then`` from round s + 1 on.

    The paper's finding: SAM in the last few epochs does nearly as well as SAM throughout. It
    switches by epoch; here by communication round. Its two optimisers keep momenta of their own,
    as here every round does. Passes a step: those of the minimiser in force.

    Parameters
    ----------
    rho : float
        Passed on to whichever takes it.
    eta : float
        Passed on to whichever takes it.
    rounds : int
        Of the run: ``--rounds``.
    first : str
        Name of a minimiser, or an import path.
    then : str
        Likewise. The paper goes from sgd to sam, and back.
    start : float
        s: a fraction of the rounds up to 1.0, or a round. The paper's Figure 1: 175 of 200 epochs.
    **options : object
        Further arguments, passed on to whichever takes them: k, theta, ....
    """

    def __init__(
        self,
        rho: float,
        eta: float,
        rounds: int,
        first: str = "sgd",
        then: str = "sam",
        start: float = 0.75,
        **options: object,
    ) -> None:
        self.start = rounds_before(start, rounds)
        classes = [
            plugins.find("minimizer", name, "fedsam.clients.minimizers") for name in (first, then)
        ]
        known = {name for cls in classes for name in inspect.signature(cls).parameters}
        if unknown := sorted(set(options) - known):
            raise ValueError(f"neither {first} nor {then} has an option {unknown[0]!r}")
        values = {"rho": rho, "eta": eta, "rounds": rounds, **options}
        self.first, self.then = [plugins.build("minimizer", cls, {}, **values) for cls in classes]
        for name, minimizer in ((first, self.first), (then, self.then)):
            if isinstance(minimizer, Remembering):
                raise ValueError(f"{name} remembers vectors from round to round: choose another")

    def at(self, round: int) -> Minimizer:
        """Return the minimiser in force in a round."""
        return self.then if round > self.start else self.first

    def step(self, w: Tensor, grad: Grad, descend: Descend, local: Local) -> Tensor:
        """Return w after one mini-batch."""
        return self.at(int(local.round)).step(w, grad, descend, local)
