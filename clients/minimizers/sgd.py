"""SGD, the minimizer of plain FedAvg."""

from torch import Tensor

from fedsam.training.method import Descend, Grad, Local, Minimizer, Vectors


class SGD(Minimizer):
    """Descend along the gradient of the mini-batch loss::

        w <- w - lr g(w)

    Passes a step: 1.
    """

    def step(self, w: Tensor, grad: Grad, descend: Descend, local: Local) -> tuple[Tensor, Vectors]:
        """Return w after one mini-batch, and no state."""
        return descend(w, grad(w)), {}
