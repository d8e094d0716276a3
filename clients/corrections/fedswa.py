"""FedSWA's client (Liu et al., ICML 2025): a learning rate that falls within each round."""

from torch import Tensor

from fedsam.training.method import Correction, Local


class FedSWA(Correction):
    """Let every round be a cycle of stochastic weight averaging::

        g <- (1 - (1 - rho_end) k / steps) g            k: the step, from 0

    so that the rate goes from lr towards rho_end lr; weight decay keeps lr. The server's average,
    with its rate, is the other half. Nothing is kept; P numbers travel each way. Passes a step:
    the minimizer's.

    Parameters
    ----------
    rho_end : float
        The paper's rho, in [0, 1]: the end of the cycle as a part of lr. Released code: 0, with
        twice FedAvg's lr. 1 is FedAvg.
    """

    def __init__(self, rho_end: float = 0.0) -> None:
        if not 0 <= rho_end <= 1:
            raise ValueError(f"rho_end: must lie in [0, 1], got {rho_end}")
        self.rho_end = rho_end

    def correct(self, w: Tensor, g: Tensor, local: Local) -> Tensor:
        """Return the gradient, shorter from step to step."""
        return g - (1 - self.rho_end) * (local.step * g / local.steps)
