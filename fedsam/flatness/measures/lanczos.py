"""Lanczos' iteration with full reorthogonalisation: a symmetric matrix, seen through products."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fedsam.base.errors import UsageError
from fedsam.base.randomness import torch_generator


def lanczos(product: Callable[[Tensor], Tensor], start: Tensor) -> Iterator[tuple[Tensor, float]]:
    """Yield the tridiagonal T_j of a symmetric H in the Krylov space of ``start``, from j = 1 on.

    With the basis Q, every step orthogonalised against all others: H Q = Q T + beta q e_j^T. Where
    the space is exhausted it is gone on with in another direction, until it is the whole.

    Parameters
    ----------
    product : callable
        From v (P,) to H v.
    start : Tensor
        (P,), not zero.

    Yields
    ------
    T : Tensor
        (j, j), float64 on the CPU.
    beta : float
        Times the last entry of an eigenvector of T it is the residual of its Ritz pair.

    Raises
    ------
    UsageError
        If a product is not finite.

    References
    ----------
    Golub and Van Loan, Matrix Computations (4th ed., 2013), chapter 10.
    """
    basis: list[Tensor] = []
    q = start / start.norm()
    diagonal: list[float] = []
    beside: list[float] = []
    while len(basis) < len(start):
        basis.append(q)
        Hq = product(q)
        diagonal.append((q @ Hq).item())
        r = _orthogonal(Hq, basis)
        beta = r.norm().item()
        T = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        off = torch.tensor(beside, dtype=torch.float64)
        T = T + torch.diag(off, 1) + torch.diag(off, -1)
        if not bool(T.isfinite().all()):
            raise UsageError("the Hessian is not finite there: has the run diverged?")
        if beta <= 10 * torch.finfo(q.dtype).eps * Hq.norm().item():  # the rest is rounding
            beta = 0.0
            generator = torch_generator(len(basis), "lanczos")
            r = _orthogonal(torch.randn(len(q), generator=generator).to(q), basis)
        yield T, beta
        beside.append(beta)
        q = r / r.norm()


def _orthogonal(v: Tensor, basis: list[Tensor]) -> Tensor:
    """Return ``v`` without its parts along the basis: twice, as once leaves rounding."""
    for _ in range(2):
        for q in basis:
            v = v - (q @ v) * q
    return v
