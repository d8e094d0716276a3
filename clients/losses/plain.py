"""The plain loss: the mean of the task's losses over the mini-batch."""

from torch import Tensor

from fedsam.data.images import Batch
from fedsam.tasks import Task
from fedsam.training.gradient import mean_loss
from fedsam.training.method import Loss, Model


class Plain(Loss):
    """Minimise what the task says::

        L(w) = mean l(w, x)

    Passes over the network: those of the minimizer.
    """

    def value(self, model: Model, batch: Batch, task: Task) -> Tensor:
        """Return the mean loss of a mini-batch, a scalar."""
        return mean_loss(task, model.forward(batch.images), batch)
