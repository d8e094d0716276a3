"""TRADES (Zhang et al., ICML 2019): the plain loss, and how far the answers can be moved."""

from torch import Tensor
from torch.nn import functional as F

from fedsam.data.images import Batch
from fedsam.tasks import Task
from fedsam.training.attack import Attack
from fedsam.training.gradient import mean_loss, mean_of
from fedsam.training.method import Loss, Model, rounds_before

from .plain import Plain

SPREAD = 0.255  # of the first point around x: 0.001 of a pixel's range, as in the authors' code


class TRADES(Loss):
    """Minimise the plain loss and the divergence of the answers at the worst images nearby::

        x' = argmax KL(p(w, x) || p(w, x'))    over |x' - x| <= eps in each pixel, x' in [0, 1]
        L(w) = mean l(w, x) + beta mean KL(p(w, x) || p(w, x'))

    p is the softmax over the outputs' second dimension: a loss for classifiers. The maximum is
    sought by ``training.attack.Attack`` from x + 0.001 n, n ~ N(0, 1), which the plan chooses for
    each image. w is that of the pass: SAM's second pass is attacked anew at w + e, from the same
    point. The attack sees the network in eval mode; x and x' then pass through it in training mode,
    one after the other, and both update BatchNorm's statistics. So does the authors' code, which
    passes x twice. Passes over the network: steps + 2 for each of the minimizer's.

    Parameters
    ----------
    rounds : int
        Of the run: ``--rounds``.
    eps : float
        Radius (l_inf), in 1/255 of a pixel's range. The authors' code for CIFAR-10: 0.031 of it.
    step : float
        Of the ascent, in 1/255. The authors' code: 0.007 of the range.
    steps : int
        Of the ascent. The authors' code: 10.
    beta : float
        Weight of the divergence, the paper's 1 / lambda. The authors' CIFAR-10 script: 6 (its loss
        function's own default: 1).
    start : float
        Rounds before which the plain loss stands in its place: a fraction of them up to 1.0, or
        their number.
    """

    draws = True
    one_answer = True

    def __init__(
        self,
        rounds: int,
        eps: float = 7.905,
        step: float = 1.785,
        steps: int = 10,
        beta: float = 6.0,
        start: float = 0,
    ) -> None:
        self.before = rounds_before(start, rounds)
        self.attack = Attack(eps, step, steps)
        self.beta = beta
        self.plain = Plain()

    def at(self, round: int) -> Loss:
        """Return the loss in force in a round."""
        return self if round > self.before else self.plain

    def value(self, model: Model, batch: Batch, task: Task) -> Tensor:
        """Return the mean loss of a mini-batch, a scalar."""
        x = batch.images
        begin = SPREAD * normal(batch.uniform())
        with model.evaluating():
            answers = model.forward(x).detach()

            def moved(images: Tensor) -> Tensor:
                return divergence(answers, model.forward(images)).sum()

            worst = self.attack.worst(x, moved, begin, batch.pixels)
        output = model.forward(x)
        apart = divergence(output, model.forward(worst))
        return mean_loss(task, output, batch) + self.beta * mean_of(apart, batch)


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """Return KL(p || q) in nats, (B,), of the softmaxes of two outputs (B, classes, ...)."""
    p, q = first.log_softmax(1), second.log_softmax(1)
    return F.kl_div(q, p, reduction="none", log_target=True).flatten(1).sum(1)


def normal(u: Tensor) -> Tensor:
    """Return standard normal numbers from uniform ones in (0, 1)."""
    return (2 * u - 1).erfinv() * 2**0.5
