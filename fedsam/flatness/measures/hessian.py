"""The Hessian of the loss: its largest eigenvalues, its trace, the density of its spectrum.

It is seen through its products with vectors alone. One run of Lanczos gives both ends of the
spectrum, for which ARPACK (SciPy's eigsh) makes two, and its density, for which it has nothing.
"""

import math
from dataclasses import dataclass
from functools import partial
from itertools import islice
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from fedsam.base.errors import UsageError
from fedsam.base.randomness import torch_generator
from fedsam.flatness.measures.lanczos import lanczos
from fedsam.flatness.objective import Objective
from fedsam.flatness.sampling import errors_of_images, errors_of_means
from fedsam.flatness.subject import IMAGES, Subject, Tick, objective_on, objective_settings, silent

STEPS = 80  # of Lanczos at most
TOLERANCE = 1e-3  # residual, as a part of the eigenvalue: nearer ones may be found as one
LOWEST = 0.01  # of the lowest, and to end the search: as a part of the largest |lambda|
ROUNDING = 100  # of the products, in units of their dtype's last place of the largest |lambda|
RATIO = "lambda_1/lambda_5"


@dataclass(frozen=True)
class Spectrum:
    """The ends of a spectrum.

    Attributes
    ----------
    top : list of float
        The largest eigenvalues, descending.
    residuals : list of float
        ``|H v - lambda v|`` of each: an eigenvalue of H lies within it. At least the rounding of
        the products.
    converged : list of bool
        Whether that is at most 0.1 % of the eigenvalue, or rounding.
    lowest, lowest_residual, lowest_converged : float, float, bool
        The same of the lowest, with 1 %.
    products : int
        With H.
    """

    top: list[float]
    residuals: list[float]
    converged: list[bool]
    lowest: float
    lowest_residual: float
    lowest_converged: bool
    products: int

    @classmethod
    def of(
        cls, objective: Objective, start: Tensor, eigenvalues: int, tick: Tick = silent
    ) -> "Spectrum":
        """Return the ends of the spectrum of the Hessian at the objective's w."""
        product = partial(objective.curvature, objective.w)
        rounding = ROUNDING * torch.finfo(start.dtype).eps
        for T, beta in islice(lanczos(product, start), STEPS):
            values, vectors = torch.linalg.eigh(T)
            floor = rounding * values.abs().max()
            residuals = (beta * vectors[-1].abs()).clamp(min=floor)
            part = torch.full_like(values, TOLERANCE)
            part[0] = LOWEST
            converged = residuals <= (part * values.abs()).clamp(min=floor)
            enough = converged.clone()
            enough[0] = residuals[0] <= LOWEST * values.abs().max()  # it may be near zero
            tick(len(T), STEPS)
            # beta is 0 where the space was exhausted: what lies outside is still to come
            wanted = enough[[0, *range(-min(eigenvalues, len(T)), 0)]]
            if len(T) > 2 * eigenvalues + 1 and beta > 0 and wanted.all():
                break
        largest = slice(None, eigenvalues)
        return cls(
            values.flip(0)[largest].tolist(),
            residuals.flip(0)[largest].tolist(),
            converged.flip(0)[largest].tolist(),
            values[0].item(),
            residuals[0].item(),
            bool(converged[0]),
            len(T),
        )

    @property
    def ratio(self) -> float:
        """lambda_1 / lambda_5; NaN unless lambda_5 is above its residual."""
        return self.top[0] / self.top[4] if self.top[4] > self.residuals[4] else math.nan

    def scalars(self) -> dict[str, float]:
        """Return those that are named."""
        named = {"lambda_1": self.top[0], "lambda_min": self.lowest}
        return named | ({"lambda_5": self.top[4], RATIO: self.ratio} if len(self.top) > 4 else {})

    def errors(self) -> dict[str, float]:
        """Return how far each scalar may lie from that of an eigenvalue, by its residual."""
        named = {"lambda_1": self.residuals[0], "lambda_min": self.lowest_residual}
        if len(self.top) > 4:
            named["lambda_5"] = self.residuals[4]
            known = not math.isnan(self.ratio)
            parts = [self.residuals[i] / self.top[i] for i in (0, 4)] if known else []
            named[RATIO] = self.ratio * math.fsum(parts)
        return named

    def warnings(self) -> list[str]:
        """Return in words what has not converged."""
        missed, said = self.converged.count(False), []
        if missed:
            said.append(
                f"{missed} of {len(self.top)} eigenvalues have a residual above {TOLERANCE:.1%} "
                f"after {self.products} products"
            )
        if not self.lowest_converged:
            said.append(
                f"lambda_min has a residual of {self.lowest_residual:.2g} after {self.products} "
                "products: the lowest eigenvalue may lie lower"
            )
        return said


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
    until the residual ``|H v - lambda v|`` of each of the largest is at most 0.1 % of it, and that
    of the lowest 1 % of the largest ``|lambda|``, or for 80 products; ``converged`` says which are
    within 0.1 % of themselves, ``lowest_converged`` whether it is within 1 %: else it is an upper
    bound. There is an eigenvalue of H within the residual of each lambda, and in practice much
    nearer; eigenvalues nearer to each other than that may be found as one, and equal ones always
    are. ``lambda_1/lambda_5`` is NaN unless lambda_5 is above its residual.

    On a sample of the images the same is measured on four parts of it, for the error of sampling:
    the top eigenvalues of fewer images are larger.

    Passes: the products, each of some three times a gradient's time; about twice as many on a
    sample. Memory: a vector (P,) for each product.

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
    generator = torch_generator(subject.seed, "measure hessian")
    start = torch.randn(size, generator=generator).to(objective.w)
    whole = Spectrum.of(objective, start, eigenvalues, tick)
    parts = objective.parts(subject.seed)
    each = [whole] if parts == [objective] else [Spectrum.of(p, start, eigenvalues) for p in parts]
    scalars, of_parts = whole.scalars(), [one.scalars() for one in each]
    sizes = [len(part) for part in parts]
    how = {"eigenvalues": eigenvalues, "which": "largest algebraic", "tolerance": TOLERANCE}
    return {
        "scalars": scalars,
        "errors": {
            "images": errors_of_images(scalars, of_parts, sizes, objective.population),
            "residual": whole.errors(),
        },
        "warnings": whole.warnings(),
        "settings": objective_settings(objective, on)
        | how
        | {"products": whole.products, "most_products": STEPS},
        "eigenvalues": whole.top,
        "residuals": whole.residuals,
        "converged": whole.converged,
        "lowest_residual": whole.lowest_residual,
        "lowest_converged": whole.lowest_converged,
        "parts": of_parts,
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

    Passes: a product for each probe. Errors are the standard errors over probes and over images.

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
    parts = objective.parts(subject.seed)
    forms = torch.empty(probes, len(parts), dtype=torch.float64)
    for number in range(probes):
        z = signs(objective.w, subject.seed, number)
        for place, part in enumerate(parts):
            forms[number, place] = part.curvature(objective.w, z) @ z
        tick(number + 1, probes)
    sizes = [len(part) for part in parts]
    samples = (forms @ torch.tensor(sizes, dtype=torch.float64) / len(objective)).tolist()
    scalars = {"trace": mean(samples)}
    of_parts = [{"trace": value} for value in forms.mean(0).tolist()]
    return {
        "scalars": scalars,
        "errors": {
            "probes": errors_of_means({"trace": samples}),
            "images": errors_of_images(scalars, of_parts, sizes, objective.population),
        },
        "settings": objective_settings(objective, on)
        | {"probes": probes, "distribution": "random signs"},
        "samples": samples,
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

    Passes: probes x steps products, and twice as many on a sample of the images, for its error.
    Memory: a vector (P,) for each step.

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
    nodes, weights = quadrature(objective, subject.seed, probes, steps, tick)
    scalars = moments(nodes, weights, len(objective.w))
    parts = objective.parts(subject.seed)
    of_parts = [scalars]
    if parts != [objective]:
        each = [quadrature(part, subject.seed, probes, steps) for part in parts]
        of_parts = [moments(*one, len(objective.w)) for one in each]
    by_probe = [moments([a], [b], len(objective.w)) for a, b in zip(nodes, weights, strict=True)]
    sizes = [len(part) for part in parts]
    return {
        "scalars": scalars,
        "errors": {
            "probes": errors_of_means({name: [one[name] for one in by_probe] for name in scalars}),
            "images": errors_of_images(scalars, of_parts, sizes, objective.population),
        },
        "settings": objective_settings(objective, on) | {"probes": probes, "steps": steps},
        "nodes": [values.tolist() for values in nodes],
        "weights": [values.tolist() for values in weights],
    }


def quadrature(
    objective: Objective, seed: int, probes: int, steps: int, tick: Tick = silent
) -> tuple[list[Tensor], list[Tensor]]:
    """Return nodes and weights of each probe's quadrature, float64 (at most steps,)."""
    product = partial(objective.curvature, objective.w)
    nodes, weights = [], []
    for number in range(probes):
        z = signs(objective.w, seed, number)
        for T, _ in islice(lanczos(product, z), steps):
            tick(number * steps + len(T), probes * steps)
        values, vectors = torch.linalg.eigh(T)
        nodes.append(values)
        weights.append(vectors[0].square())
    return nodes, weights


def moments(nodes: list[Tensor], weights: list[Tensor], size: int) -> dict[str, float]:
    """Return what a density says of H (size, size): trace, Frobenius norm, negative part."""
    lambdas, share = torch.cat(nodes), torch.cat(weights) / len(weights)
    sizes = share @ lambdas.abs()
    return {
        "trace": size * (share @ lambdas).item(),
        "frobenius": math.sqrt(size * (share @ lambdas.square()).item()),
        "negative_part": (share @ lambdas.clamp(max=0).abs() / sizes).item(),
    }


def signs(w: Tensor, seed: int, number: int) -> Tensor:
    """Return random signs like ``w`` (P,)."""
    generator = torch_generator(seed, "measure signs", number)
    return torch.randint(0, 2, w.shape, generator=generator).mul_(2).sub_(1).to(w)
