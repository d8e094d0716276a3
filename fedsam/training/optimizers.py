"""The base optimisers on a flat vector, with the numbers of torch.optim's.

``state`` holds their vectors by name, zero at the start of each round; a step puts new ones there.
"""

from collections.abc import MutableMapping

from torch import Tensor

from fedsam.base.vector import along

State = MutableMapping[str, Tensor]
BETAS = (0.9, 0.999)  # of AdamW, as torch.optim's defaults
EPSILON = 1e-8


def sgd(
    w: Tensor,
    g: Tensor,
    lr: float | Tensor,
    state: State,
    *,
    momentum: float | Tensor = 0.0,
    weight_decay: float | Tensor = 0.0,
    nesterov: bool = False,
) -> Tensor:
    """Return w after ``v <- m v + g + decay w``, ``w <- w - lr v``; Nesterov's: ``g + m v``."""
    g = along(g, weight_decay, w)
    if "velocity" in state:
        state["velocity"] = velocity = along(g, momentum, state["velocity"])
        g = along(g, momentum, velocity) if nesterov else velocity
    return along(w, -lr, g)


def adamw(
    w: Tensor, g: Tensor, lr: float | Tensor, state: State, *, weight_decay: float | Tensor = 0.0
) -> Tensor:
    """Return w after a step of AdamW, whose decay is ``w <- w - lr decay w``, apart from g."""
    b1, b2 = BETAS
    state["t"] = t = state["t"] + 1
    state["m"] = m = b1 * state["m"] + (1 - b1) * g
    state["v"] = v = b2 * state["v"] + (1 - b2) * g**2
    mean, variance = m / (1 - b1**t), v / (1 - b2**t)
    return w - lr * weight_decay * w - lr * mean / (variance.sqrt() + EPSILON)
