"""FedDyn's server (Acar et al., ICLR 2021): the average, moved by all updates so far."""

from collections.abc import Sequence

from torch import Tensor

from fedsam.base.strategy import ServerMethod, State
from fedsam.base.vector import mean


class FedDyn(ServerMethod):
    """Add to the plain mean the sum of all updates that the clients ever made::

        h <- h - 1/N sum_{k in cohort} (w_k - w)
        w <- mean_k w_k - h

    h is the paper's h / alpha, so that the server does not need alpha; it goes with
    the client of this name. Every client of the cohort counts the same. BatchNorm statistics, which
    are not descended on, are averaged. The server keeps P numbers.

    What is evaluated is w, as in FL-Simulator. The authors' code never evaluates it, but the
    cohort's mean, and the mean of everybody's last models (its plots are of this one, for which a
    server would keep a model a client). At low participation the three differ much. The training is
    the same whichever is evaluated.

    Parameters
    ----------
    clients : int
        N, the population; the run's.
    evaluated : str
        "server": w; "cohort": the mean of the cohort's models, w + h.
    """

    state = ("h",)

    def __init__(self, clients: int, evaluated: str = "server") -> None:
        if evaluated not in ("server", "cohort"):
            raise ValueError(f"evaluated: must be server or cohort, got {evaluated}")
        self.clients = clients
        self.evaluated = evaluated

    def send(self, w: Tensor, state: State, round: int) -> Tensor:
        """Return the model that clients start from (P,)."""
        return w if self.evaluated == "server" else w - state["h"]

    def update(
        self, w: Tensor, W: Sequence[Tensor], n: Sequence[float], state: State, round: int
    ) -> tuple[Tensor, State]:
        """Return the new model (P,) and the new state."""
        mean_w = mean(W)
        h = state["h"] - len(W) / self.clients * (mean_w - self.send(w, state, round))
        return mean_w - h if self.evaluated == "server" else mean_w, {"h": h}
