"""FedAvg's client (McMahan et al., AISTATS 2017): no correction."""

from torch import Tensor

from fedsam.training.method import Correction, Local


class FedAvg(Correction):
    """Follow the gradient of the client's own loss as it is."""

    def correct(self, w: Tensor, g: Tensor, local: Local) -> Tensor:
        """Return ``g``."""
        return g
