"""How far the clients of a round walk, and how far from each other."""

from collections.abc import Sequence

import torch
from torch import Tensor


def drift(before: Tensor, clients: Sequence[Tensor], after: Tensor) -> dict[str, float]:
    """Return the lengths of a round's updates.

    With u_k = w_k - w the update of client k and m the plain mean of all K of them::

        client_norm   sqrt(mean_k |u_k|^2)        how far a client walks
        client_drift  sqrt(mean_k |u_k - m|^2)    how far from each other they end
        update_norm   |w_new - w|                 how far the server goes

    client_norm^2 = |m|^2 + client_drift^2, and with FedAvg over equal clients update_norm = |m|.

    Parameters
    ----------
    before, after : Tensor
        The global parameters (P,) before and after the round.
    clients : sequence of Tensor
        The clients' parameters, K times (P,).
    """
    updates = [w_k - before for w_k in clients]
    mean = sum(updates[1:], updates[0]) / len(updates)
    walked = torch.stack([u.norm() for u in updates])
    apart = torch.stack([(u - mean).norm() for u in updates])
    lengths = walked.square().mean().sqrt(), apart.square().mean().sqrt(), (after - before).norm()
    names = "client_norm", "client_drift", "update_norm"
    return dict(zip(names, torch.stack(lengths).tolist(), strict=True))
