"""The Hessian of the loss: its largest eigenvalues, its trace, the density of its spectrum.

It is seen through its products with vectors alone. One run of Lanczos gives both ends of the
spectrum, for which ARPACK (SciPy's eigsh) makes two, and its density, for which it has nothing.
"""

import math
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fedsam.base.errors import UsageError
from fedsam.base.randomness import torch_generator
from fedsam.flatness.measures.lanczos import lanczos
from fedsam.flatness.subject import IMAGES, Subject, Tick, objective_on, objective_settings, silent

STEPS = 80  # of Lanczos at most
TOLERANCE = 0.01  # residual, as a part of the eigenvalue


def hessian(
    subject: Subject,
    *,
    on: str = "train",
    images: int = IMAGES,
    eigenvalues: int = 5,
    tick: Tick = silent,
) -> dict[str, Any]:
    """Measure the largest eigenvalues of the Hessian, and the lowest one.

    Largest and lowest are algebraic, not by size. Lanczos with full reorthogonalisation goes on
    until the residual ``|H v - lambda v|`` of each of the largest is at most 1 % of it, and that of
    the lowest 1 % of the largest ``|lambda|``, or for 80 products; there is an eigenvalue of H
    within the residual of each lambda, and in practice much nearer. Equal eigenvalues may count
    once.

    Passes: the products, each of some four times a gradient's time. Memory: a vector (P,) for each
    product.

    Parameters
    ----------
    subject : Subject
        A model and its data.
    on, images : str, int
        Where, and on how many images at most (0: all).
    eigenvalues : int
        How many of the largest.
    tick : callable
        Told the products that are done, and how many there are at most.
    """
    objective = objective_on(subject, on, images)
    size = len(objective.w)
    if not 1 <= eigenvalues <= min(size, STEPS // 2):
        most = min(size, STEPS // 2)
        raise UsageError(f"--eigenvalues {eigenvalues}: must lie in 1..{most}")
    start = torch.randn(size, generator=torch_generator(subject.seed, "measure hessian"))
    product = partial(objective.curvature, objective.w)
    for T, beta in islice(lanczos(product, start.to(objective.w)), STEPS):
        values, vectors = torch.linalg.eigh(T)
        residuals = beta * vectors[-1].abs()
        allowed = TOLERANCE * values.abs()
        allowed[0] = allowed.max()  # the lowest may be near zero
        left = (residuals - allowed)[[0, *range(-min(eigenvalues, len(T)), 0)]]
        tick(len(T), STEPS)
        # beta is 0 where the space was exhausted: what lies outside is still to come
        if len(T) > 2 * eigenvalues + 1 and beta > 0 and left.max() <= 0:
            break
    top, lowest = values.flip(0)[:eigenvalues].tolist(), values[0].item()
    scalars = {"lambda_1": top[0], "lambda_min": lowest}
    if eigenvalues >= 5:
        scalars |= {"lambda_5": top[4], "lambda_1/lambda_5": top[0] / top[4]}
    how = {"eigenvalues": eigenvalues, "which": "largest algebraic", "tolerance": TOLERANCE}
    return {
        "scalars": scalars,
        "settings": objective_settings(objective, on) | how | {"products": len(T)},
        "eigenvalues": top,
        "residuals": residuals.flip(0)[:eigenvalues].tolist(),
        "lowest_residual": residuals[0].item(),
    }


def trace(
    subject: Subject,
    *,
    on: str = "train",
    images: int = IMAGES,
    probes: int = 10,
    tick: Tick = silent,
) -> dict[str, Any]:
    """Measure the trace of the Hessian: the mean of z^T H z over random signs z (Hutchinson).

    Passes: a product for each probe. The error is the standard error of that mean.

    Parameters
    ----------
    subject : Subject
        A model and its data.
    on, images : str, int
        Where, and on how many images at most (0: all).
    probes : int
        How many z, at least 2.
    tick : callable
        Told the products that are done, and of how many.

    References
    ----------
    Hutchinson (1990), Communications in Statistics 19(2).
    """
    if probes < 2:
        raise UsageError(f"--probes {probes}: the trace needs 2 at least, for its standard error")
    objective = objective_on(subject, on, images)
    forms = []
    for number in range(probes):
        z = signs(objective.w, subject.seed, number)
        forms.append((objective.curvature(objective.w, z) @ z).item())
        tick(number + 1, probes)
    found = torch.tensor(forms, dtype=torch.float64)
    error = found.std().item() / math.sqrt(probes)
    return {
        "scalars": {"trace": found.mean().item(), "trace_error": error},
        "settings": objective_settings(objective, on)
        | {"probes": probes, "distribution": "random signs"},
        "samples": forms,
    }


def density(
    subject: Subject,
    *,
    on: str = "train",
    images: int = IMAGES,
    probes: int = 3,
    steps: int = 30,
    tick: Tick = silent,
) -> dict[str, Any]:
    """Measure how the Hessian's eigenvalues are spread, by stochastic Lanczos quadrature.

    For random signs z, Lanczos from ``z / |z|`` gives a tridiagonal T; its eigenvalues are nodes,
    the squared first entries of its eigenvectors their weights, and the sum of weight x f(node)
    estimates tr f(H) / P, for polynomials f of degree up to 2 steps - 1 as exactly as z does.

    Passes: probes x steps products. Memory: a vector (P,) for each step.

    Parameters
    ----------
    subject : Subject
        A model and its data.
    on, images : str, int
        Where, and on how many images at most (0: all).
    probes : int
        How many z.
    steps : int
        Of Lanczos for each.
    tick : callable
        Told the products that are done, and of how many.

    Returns
    -------
    dict
        ``scalars``: the trace and the Frobenius norm of H that follow, and the part of the sum of
        ``|lambda|`` that is negative. ``nodes`` and ``weights``: a list for each probe.

    References
    ----------
    Ghorbani, Krishnan and Xiao, An investigation into neural net optimization via Hessian
    eigenvalue density (ICML 2019).
    """
    if probes < 1 or steps < 1:
        raise UsageError(f"--probes {probes} and --steps {steps}: must be at least 1")
    objective = objective_on(subject, on, images)
    size, product = len(objective.w), partial(objective.curvature, objective.w)
    nodes, weights = [], []
    for number in range(probes):
        z = signs(objective.w, subject.seed, number)
        for T, _ in islice(lanczos(product, z), steps):
            tick(number * steps + len(T), probes * steps)
        values, vectors = torch.linalg.eigh(T)
        nodes.append(values)
        weights.append(vectors[0].square())
    lambdas, share = torch.cat(nodes), torch.cat(weights) / probes
    sizes = share @ lambdas.abs()
    scalars = {
        "trace": size * (share @ lambdas).item(),
        "frobenius": math.sqrt(size * (share @ lambdas.square()).item()),
        "negative_part": (share @ lambdas.clamp(max=0).abs() / sizes).item(),
    }
    return {
        "scalars": scalars,
        "settings": objective_settings(objective, on) | {"probes": probes, "steps": steps},
        "nodes": [values.tolist() for values in nodes],
        "weights": [values.tolist() for values in weights],
    }


def signs(w: Tensor, seed: int, number: int) -> Tensor:
    """Return random signs like ``w`` (P,)."""
    generator = torch_generator(seed, "measure signs", number)
    return torch.randint(0, 2, w.shape, generator=generator).mul_(2).sub_(1).to(w)
