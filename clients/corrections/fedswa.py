"""FedSWA's client (Liu et al., ICML 2025): a learning rate that falls within each round."""

from torch import Tensor

from fedsam.training.method import Correction, Local


class FedSWA(Correction):
    """Let every round be a cycle of stochastic weight averaging::

        rate_k = lr (1 - (1 - rho_end) k / steps)           k: the step, from 0

    so that the rate goes from lr towards rho_end lr. The server's average, with its rate, is the
    other half. Nothing is kept; P numbers travel each way. Passes a step: the minimizer's.

    Values are the paper's, as two independent notes quote them. The released code: in May 2025
    rho_end is a flag, by default 0.1; since November 2025 it is 0, every rate is doubled, and the
    command asks for twice FedAvg's --lr besides, so that a round starts at four times that.

    Parameters
    ----------
    rho_end : float
        The paper's rho, in [0, 1]: the end of the cycle as a part of lr. The paper's: 0.1. 1 is
        FedAvg.
    """

    def __init__(self, rho_end: float = 0.1) -> None:
        self.rho_end = part_of_lr(rho_end)

    def correct(self, w: Tensor, g: Tensor, local: Local) -> Tensor:
        """Return the gradient as it is."""
        return g

    def rate(self, local: Local) -> float | Tensor:
        """Return the learning rate of the step."""
        return falling(local, self.rho_end)


def falling(local: Local, end: float | Tensor) -> float | Tensor:
    """Return the rate of a step on the way from lr towards ``end`` lr."""
    return local.lr - (1 - end) * (local.step * local.lr / local.steps)


def part_of_lr(rho_end: float) -> float:
    """Return it, if it lies in [0, 1]."""
    if not 0 <= rho_end <= 1:
        raise ValueError(f"rho_end: must lie in [0, 1], got {rho_end}")
    return rho_end
