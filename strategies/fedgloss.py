"""FedGloSS's server (Caldarola et al., CVPR 2025): SAM on the server, without a second round."""

from collections.abc import Sequence

from torch import Tensor

from fedsam.base.strategy import ServerMethod, State
from fedsam.base.vector import mean, unit

from .feddyn import FedDyn


class FedGloSS(ServerMethod):
    """Let clients start at the server's worst point near w, as the last round's update shows it::

        e     = rho_t unit(g)         g: the pseudo-gradient of the round before, at first 0
        sent  = w + e
        g    <- sent - mean_k w_k
        w    <- (FedDyn's w from sent) - e

    rho_t goes linearly from rho_0 to rho over ``warmup`` rounds. It goes with FedDyn's client,
    whose alpha is 1 / beta of the paper, and with SAM as the minimizer, whose rho has a warm-up of
    its own, as long. With rho = 0 it is FedDyn. The server keeps 2P numbers; P travel each way.

    The released code differs three times. By a slip its server does not warm up: from round 2 to
    warmup + 1 it has the CLIENTS' rho, 0.15 on CIFAR-10 and 0.2 on CIFAR-100, afterwards its own;
    ``held`` does so. It divides the server's correction by the cohort's size once more than
    FedDyn's formula. Its g weighs clients by their images, as the paper's box does; here they
    count the same, which is the same where all hold as many.

    Parameters
    ----------
    clients : int
        Population size; the run's.
    rho : float
        Radius on the server (l2). CIFAR-10: 0.15; CIFAR-100: 0.01.
    rho_0 : float
        Radius in the first round: 0.001.
    warmup : int
        Rounds. CIFAR-10: 2000 of 10,000; CIFAR-100: 15,000 of 20,000. 0: rho from the start.
    held : float
        Radius until round warmup + 1 in place of one that grows, as the released code has it (0:
        it grows). CIFAR-10: 0.15; CIFAR-100: 0.2.
    """

    state = ("g", "h")

    def __init__(
        self,
        clients: int,
        rho: float = 0.15,
        rho_0: float = 0.001,
        warmup: int = 0,
        held: float = 0.0,
    ) -> None:
        self.feddyn = FedDyn(clients)
        self.rho, self.rho_0, self.warmup, self.held = rho, rho_0, warmup, held

    def ascent(self, g: Tensor, round: int) -> Tensor:
        """Return e (P,), the round's step from w to what is sent."""
        if self.held and round <= self.warmup + 1:
            return self.held * unit(g)
        done = min(1.0, (round - 1) / self.warmup) if self.warmup else 1.0
        return (self.rho_0 + done * (self.rho - self.rho_0)) * unit(g)

    def send(self, w: Tensor, state: State, round: int) -> Tensor:
        """Return the perturbed model (P,)."""
        return w + self.ascent(state["g"], round)

    def update(
        self, w: Tensor, W: Sequence[Tensor], n: Sequence[float], state: State, round: int
    ) -> tuple[Tensor, State]:
        """Return the new model (P,) and the new state."""
        e = self.ascent(state["g"], round)
        sent = w + e
        new, feddyn = self.feddyn.update(sent, W, n, state, round)
        return new - e, {"g": sent - mean(W), **feddyn}
