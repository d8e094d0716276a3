"""The base optimisers on a flat vector, with the numbers of torch.optim's.

``state`` holds their vectors by name, zero at the start of each round; a step returns the new ones.
"""

from collections.abc import Mapping

from torch import Tensor

from fedsam.base.vector import along

State = Mapping[str, Tensor]
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
) -> tuple[Tensor, State]:
    """Step by ``v <- m v + g + decay w``, ``w <- w - lr v``; Nesterov's: ``g + m v`` for v.

    Returns
    -------
    w : Tensor
        After the step.
    state : mapping
        The velocity v, if ``state`` holds one.
    """
    g = along(g, weight_decay, w)
    if "velocity" not in state:
        return along(w, -lr, g), state
    velocity = along(g, momentum, state["velocity"])
    g = along(g, momentum, velocity) if nesterov else velocity
    return along(w, -lr, g), {"velocity": velocity}


def adamw(
    w: Tensor, g: Tensor, lr: float | Tensor, state: State, *, weight_decay: float | Tensor = 0.0
) -> tuple[Tensor, State]:
    """Return w and state after a step of AdamW, whose decay is ``w <- w - lr decay w``."""
    b1, b2 = BETAS
    t = state["t"] + 1
    m = b1 * state["m"] + (1 - b1) * g
    v = b2 * state["v"] + (1 - b2) * g**2
    mean, variance = m / (1 - b1**t), v / (1 - b2**t)
    w = w - lr * weight_decay * w - lr * mean / (variance.sqrt() + EPSILON)
    return w, {"m": m, "v": v, "t": t}
