"""PGD adversarial training (Madry et al., ICLR 2018): the loss at the worst images nearby."""

from torch import Tensor

from fedsam.data.images import Batch
from fedsam.tasks import Task
from fedsam.training.attack import Attack
from fedsam.training.gradient import mean_loss
from fedsam.training.method import Loss, Model, rounds_before

from .plain import Plain


class PGDAT(Loss):
    """Minimise the loss at images that were moved to raise it::

        x' = argmax l(w, x')    over |x' - x| <= eps in each pixel, x' in [0, 1]
        L(w) = mean l(w, x')

    The maximum is sought by ``training.attack.Attack`` from a random point of the cube, which the
    plan chooses for each image. w is that of the pass: SAM's second pass is attacked anew at
    w + e, from the same point. Where mixup is on, the mixed loss is attacked at the mixed images.
    The attack sees the network in eval mode (BatchNorm's running statistics, which it leaves
    alone), as in Zhou et al.'s code; only the pass at x' updates them. Passes over the network:
    steps + 1 for each of the minimizer's.

    Parameters
    ----------
    rounds : int
        Of the run: ``--rounds``.
    eps : float
        Radius (l_inf), in 1/255 of a pixel's range. Madry's CIFAR-10 code: 8; Zhou et al.: 4.
    step : float
        Of the ascent, in 1/255. Both codes: 2.
    steps : int
        Of the ascent. Both codes: 10.
    start : float
        Rounds before which the plain loss stands in its place: a fraction of them up to 1.0, or
        their number.
    """

    draws = True

    def __init__(
        self, rounds: int, eps: float = 8.0, step: float = 2.0, steps: int = 10, start: float = 0
    ) -> None:
        self.before = rounds_before(start, rounds)
        self.attack = Attack(eps, step, steps)
        self.plain = Plain()

    def at(self, round: int) -> Loss:
        """Return the loss in force in a round."""
        return self if round > self.before else self.plain

    def value(self, model: Model, batch: Batch, task: Task) -> Tensor:
        """Return the mean loss of a mini-batch, a scalar."""

        def loss(images: Tensor) -> Tensor:
            return mean_loss(task, model.forward(images), batch)

        x = batch.images
        begin = self.attack.eps * (2 * batch.uniform() - 1)
        with model.evaluating():
            worst = self.attack.worst(x, loss, begin, batch.pixels)
        return loss(worst)
