"""How far the loss rises around w: at the worst point of a ball, and on average."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fedsam.base.errors import UsageError
from fedsam.base.randomness import torch_generator
from fedsam.base.vector import unit
from fedsam.flatness.objective import Objective
from fedsam.flatness.subject import (
    IMAGES,
    Subject,
    Tick,
    batches,
    objective_on,
    objective_settings,
    silent,
)

P = Literal[2, "inf"]
# by (p, adaptive)
RHO = {(2, False): 0.05, (2, True): 0.5, ("inf", False): 0.0005, ("inf", True): 0.005}
SIGMA = {(2, False): 0.01, (2, True): 0.1, ("inf", False): 0.02, ("inf", True): 0.2}
START = 1e-3  # of rho: where the gradient is zero, an ascent needs a first direction


@dataclass(frozen=True)
class Ball:
    """The points w + T u with ``|u|_p <= rho``.

    Attributes
    ----------
    w, T : Tensor
        (P,); T is 1 where sharpness is not adaptive.
    p : int or str
        2 or "inf".
    rho : float
        Radius.
    """

    w: Tensor
    T: Tensor
    p: P
    rho: float

    def steepest(self, v: Tensor) -> Tensor:
        """Return the u of length 1 in the p-norm with the largest inner product with ``v``."""
        return unit(v) if self.p == 2 else v.sign()

    def project(self, u: Tensor) -> Tensor:
        """Return the nearest point to ``u`` with ``|u|_p <= rho``."""
        if self.p == 2:
            return u * (self.rho / u.norm()).clamp(max=1)
        return u.clamp(-self.rho, self.rho)

    def at(self, u: Tensor) -> Tensor:
        """Return w + T u."""
        return self.w + self.T * u


def sharpness(
    subject: Subject,
    *,
    p: P = 2,
    adaptive: bool = False,
    on: str = "train",
    images: int = IMAGES,
    rho: float | None = None,
    batch: int = 128,
    steps: int = 5,
    eta: float = 0.0,
    weights_only: bool = False,
    tick: Tick = silent,
) -> dict[str, Any]:
    """Measure the rise of the loss to the worst point of a ball, on average over batches.

    For each of disjoint batches B of m images (m-sharpness)::

        worst     max  L_B(w + T u) - L_B(w)   over |u|_p <= rho
        one_step  the same at u = rho T g / |T g|  (p = 2),  rho sign(T g)  (p = inf)

    with g the gradient at w and T = 1, or if adaptive ``T = |w| + eta``. The maximum is sought by
    projected gradient ascent in u by steps of length rho, of which one_step is the first; the best
    point on the way counts, so it is a lower bound of the true one. The first gradient is taken at
    a random u of length rho / 1000, so that an ascent finds a way also where the gradient is zero.

    With eta = 0 and T on all parameters, as by default, adaptive sharpness does not change where
    weights are rescaled and the network stays the same.

    Passes: steps gradients, and as many losses and one. Memory: some vectors (P,).

    Parameters
    ----------
    subject : Subject
        A model and its data; not changed.
    p, adaptive : int or str, bool
        2 or "inf"; whether T stretches the ball.
    on, images : str, int
        Where, and on how many images at most (0: all).
    rho : float, optional
        Radius; by default 0.05 and 0.5 (adaptive) for p = 2, 0.0005 and 0.005 for p = inf.
    batch : int
        m; 0 for one batch of all.
    steps : int
        Of the ascent.
    eta, weights_only : float, bool
        Of T; T = 1 on parameters whose name does not hold "weight", as ASAM trains.
    tick : callable
        Told the batches that are done, and of how many.

    References
    ----------
    Foret et al. (ICLR 2021); Kwon et al. (ICML 2021); Andriushchenko et al., A modern look at the
    relationship between sharpness and generalization (ICML 2023).
    """
    _check_p(p)
    rho = RHO[p, adaptive] if rho is None else rho
    _positive(rho=rho, steps=steps)
    if batch < 0:
        raise UsageError(f"--batch {batch}: must be a number of images, or 0 for all")
    objective = objective_on(subject, on, images)
    T = scale(objective, adaptive, eta, weights_only)
    ball = Ball(objective.w, T, p, rho)
    parts = batches(objective, batch, subject.seed)
    climbs = []
    for number, part in enumerate(parts):
        generator = torch_generator(subject.seed, "measure ascent", number)
        noise = torch.randn(len(T), generator=generator).to(T)
        climbs.append(climb(part, ball, START * rho * ball.steepest(noise), steps))
        tick(number + 1, len(parts))
    shares = torch.tensor([len(part) / len(objective) for part in parts], dtype=torch.float64)
    rises = torch.tensor(climbs, dtype=torch.float64)
    worst = rises.max(1).values
    how = {"p": p, "adaptive": adaptive, "rho": rho, "m": batch or len(objective), "steps": steps}
    return {
        "scalars": {"worst": (shares @ worst).item(), "one_step": (shares @ rises[:, 0]).item()},
        "settings": objective_settings(objective, on) | how | _told(adaptive, eta, weights_only),
        "by_step": (shares @ rises).tolist(),
        "by_batch": worst.tolist(),
    }


def average_sharpness(
    subject: Subject,
    *,
    p: P = 2,
    adaptive: bool = False,
    on: str = "train",
    images: int = IMAGES,
    sigma: float | None = None,
    probes: int = 10,
    eta: float = 0.0,
    weights_only: bool = False,
    tick: Tick = silent,
) -> dict[str, Any]:
    """Measure the rise of the loss at random points around w, on average::

        average   mean of  (L(w + T u) + L(w - T u)) / 2 - L(w)

    over u ~ N(0, sigma^2) (p = 2) or uniform in [-sigma, sigma] (p = inf), independent for each
    parameter; T is 1, or if adaptive ``|w| + eta``. A point and its mirror image together have no
    first-order part: near w, the average is half the variance of u times the trace of T H T.

    Passes: 2 probes + 1 losses. The error is the standard error over probes.

    Parameters
    ----------
    subject : Subject
        A model and its data; not changed.
    p : int or str
        2 or "inf": the distribution.
    adaptive : bool
        Scale by T.
    on, images : str, int
        Where, and on how many images at most (0: all).
    sigma : float, optional
        By default 0.01 and 0.1 (adaptive) for p = 2, 0.02 and 0.2 for p = inf.
    probes : int
        Pairs of points, at least 2.
    eta, weights_only : float, bool
        Of T, as for ``sharpness``.
    tick : callable
        Told the pairs that are done, and of how many.
    """
    _check_p(p)
    sigma = SIGMA[p, adaptive] if sigma is None else sigma
    _positive(sigma=sigma)
    if probes < 2:
        raise UsageError(f"--probes {probes}: must be 2 at least, for the standard error")
    objective = objective_on(subject, on, images)
    T = scale(objective, adaptive, eta, weights_only)
    here, rises = objective.loss(objective.w), []
    for number in range(probes):
        generator = torch_generator(subject.seed, "measure noise", number)
        if p == 2:
            u = torch.randn(len(T), generator=generator)
        else:
            u = torch.rand(len(T), generator=generator) * 2 - 1
        e = sigma * T * u.to(T)
        around = objective.loss(objective.w + e) + objective.loss(objective.w - e)
        rises.append((around / 2 - here).item())
        tick(number + 1, probes)
    found = torch.tensor(rises, dtype=torch.float64)
    law = "normal" if p == 2 else "uniform"
    how = {"distribution": law, "p": p, "adaptive": adaptive, "sigma": sigma, "probes": probes}
    error = found.std().item() / math.sqrt(probes)
    return {
        "scalars": {"average": found.mean().item(), "average_error": error},
        "settings": objective_settings(objective, on) | how | _told(adaptive, eta, weights_only),
        "samples": rises,
    }


def climb(objective: Objective, ball: Ball, u: Tensor, steps: int) -> list[float]:
    """Return the rise of the loss after each step of length rho, the first of them from w."""
    here, rises = objective.loss(ball.w), []
    for step in range(steps):
        slope = ball.rho * ball.steepest(ball.T * objective.gradient(ball.at(u)))
        u = slope if step == 0 else ball.project(u + slope)
        rises.append(objective.loss(ball.at(u)) - here)
    return torch.stack(rises).tolist()


def scale(objective: Objective, adaptive: bool, eta: float, weights_only: bool) -> Tensor:
    """Return T (P,): what the ball is stretched by."""
    if eta < 0:
        raise UsageError(f"--eta {eta:g}: must be 0 or more")
    if not adaptive:
        return torch.ones_like(objective.w)
    return objective.layout.adaptive_scale(objective.w, eta, weights_only=weights_only)


def _told(adaptive: bool, eta: float, weights_only: bool) -> dict[str, Any]:
    if not adaptive:
        return {"T": "1"}
    elsewhere = " on weights, 1 elsewhere" if weights_only else " on all parameters"
    return {"T": f"|w|{f' + {eta:g}' if eta else ''}{elsewhere}", "eta": eta}


def _check_p(p: P) -> None:
    if p not in (2, "inf"):
        raise UsageError(f"p: must be 2 or 'inf', got {p!r}")


def _positive(**given: float) -> None:
    for name, value in given.items():
        if not value > 0:
            raise UsageError(f"--{name} {value:g}: must be positive")
