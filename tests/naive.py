"""Slow, independent references in float64: the papers' formulas, a parameter at a time.

Nothing of fedsam is used here. A model is a module; its parameters are changed in place as the
official codes do, with PyTorch's own optimiser.
"""

import math

import torch
from torch import nn


def gradients(model, x, y):
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def total_norm(tensors):
    return math.sqrt(sum(float(t.square().sum()) for t in tensors))


def sam_ascent(model, grads, rho):
    norm = total_norm(grads.values())
    return {name: rho * g / (norm + 1e-16) for name, g in grads.items()}


def asam_ascent(model, grads, rho, eta, all_parameters=False, filterwise=False, p_is_inf=False):
    scale = {}
    for name, p in model.named_parameters():
        stretched = all_parameters or "weight" in name
        size = p.detach().abs()
        if filterwise and p.dim() == 4:
            size = torch.stack([torch.full_like(f, float(f.norm())) for f in p.detach()])
        scale[name] = size + eta if stretched else torch.ones_like(p)
    if p_is_inf:
        return {name: rho * scale[name] * g.sign() for name, g in grads.items()}
    norm = total_norm(scale[name] * g for name, g in grads.items())
    return {name: rho * scale[name] ** 2 * g / (norm + 1e-16) for name, g in grads.items()}


@torch.no_grad()
def add(model, step, factor=1.0):
    for name, p in model.named_parameters():
        p.add_(factor * step[name])


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@torch.no_grad()
def assign(model, new):
    for name, p in model.named_parameters():
        p.copy_(new[name])


def use(model, grads):
    for name, p in model.named_parameters():
        p.grad = grads[name].clone()


def train(model, batches, *, lr, momentum=0.0, weight_decay=0.0, ascent=None, mu=0.0):
    """SGD, or SAM and ASAM by their ``ascent(model, grads)``, with FedProx's term if mu > 0."""
    optimiser = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay
    )
    start = values(model)
    for x, y in batches:
        grads = gradients(model, x, y)
        if ascent is not None:
            before = values(model)
            add(model, ascent(model, grads))
            grads = gradients(model, x, y)
            assign(model, before)
        now = values(model)
        use(model, {name: g + mu * (now[name] - start[name]) for name, g in grads.items()})
        optimiser.step()


def lookbehind(model, batches, *, lr, k, slow, ascent, momentum=0.0, weight_decay=0.0, mu=0.0):
    """The official way: 2 k passes a mini-batch, fast and perturbed weights kept apart.

    With mu > 0 FedProx's term acts where the optimiser steps, at the fast weights.
    """
    optimiser = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay
    )
    start = values(model)
    for x, y in batches:
        slow_weights = values(model)
        fast, perturbed = values(model), values(model)
        for j in range(k):
            assign(model, perturbed)
            add(model, ascent(model, gradients(model, x, y)))
            perturbed = values(model)
            descent = gradients(model, x, y)
            assign(model, fast)
            use(model, {name: g + mu * (fast[name] - start[name]) for name, g in descent.items()})
            optimiser.step()
            fast = values(model)
            if j == 0:
                first = values(model)
        new = {}
        for name, phi in slow_weights.items():
            alpha = slow
            if slow < 0:
                a, b = (first[name] - phi).flatten(), (fast[name] - phi).flatten()
                lengths = float(a.norm() * b.norm())
                cosine = float(a @ b) / lengths if lengths > 0 else 0.0
                alpha = (cosine + 1) / 2
            new[name] = phi + alpha * (fast[name] - phi)
        assign(model, new)


def federate(model, clients, step, *, rounds, optimiser, decay_in_loss=0.0, **options):
    """FedAvg: ``clients(round)`` yields each one's mini-batches, ``step`` returns what descends.

    ``step(model, gradient, batch, memory, t, **options)``: memory is empty at each round's start.
    """
    for round in range(1, rounds + 1):
        start, ends, sizes = values(model), [], []
        for batches in clients(round):
            assign(model, start)
            torch_optimiser = optimiser(model.parameters())
            memory: dict[str, object] = {}
            for t, batch in enumerate(batches):
                now = values(model)

                def gradient(x, y):
                    here = values(model)
                    return {
                        name: g + decay_in_loss * here[name]
                        for name, g in gradients(model, x, y).items()
                    }

                descent = step(model, gradient, batch, memory, t, round=round, **options)
                assign(model, now)
                use(model, descent)
                torch_optimiser.step()
            ends.append(values(model))
            sizes.append(sum(len(y) for _, y in batches))
        total = sum(sizes)
        mean = {
            name: sum(n / total * end[name] for n, end in zip(sizes, ends, strict=True))
            for name in start
        }
        assign(model, mean)


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors.values()])


def step_sgd(model, gradient, batch, memory, t, round):
    return gradient(*batch)


def step_sam(model, gradient, batch, memory, t, round, *, ascent):
    add(model, ascent(model, gradient(*batch)))
    return gradient(*batch)


def step_multistep(model, gradient, batch, memory, t, round, *, k, ascent):
    for _ in range(k):
        add(model, ascent(model, gradient(*batch)))
    return gradient(*batch)


def step_late(model, gradient, batch, memory, t, round, *, after, ascent):
    if round <= after:
        return gradient(*batch)
    return step_sam(model, gradient, batch, memory, t, round, ascent=ascent)


def step_friendly(model, gradient, batch, memory, t, round, *, rho, sigma, lam):
    g = gradient(*batch)
    if t == 0:
        along, memory["m"] = g, g
    else:
        along = {name: g[name] - sigma * memory["m"][name] for name in g}
        memory["m"] = {name: lam * memory["m"][name] + (1 - lam) * g[name] for name in g}
    add(model, along, rho / total_norm(along.values()))
    return gradient(*batch)


def step_vasso(model, gradient, batch, memory, t, round, *, rho, theta):
    g = gradient(*batch)
    old = memory.get("d", g)
    memory["d"] = d = {name: (1 - theta) * old[name] + theta * g[name] for name in g}
    add(model, d, rho / total_norm(d.values()))
    return gradient(*batch)


def step_gsam(model, gradient, batch, memory, t, round, *, rho, alpha):
    g = gradient(*batch)
    add(model, g, rho / total_norm(g.values()))
    p = gradient(*batch)
    # g = g_parallel + v by least squares along p
    share = float(flat(g) @ flat(p)) / float(flat(p) @ flat(p))
    return {name: p[name] - alpha * (g[name] - share * p[name]) for name in g}


def step_looksam(model, gradient, batch, memory, t, round, *, rho, k, alpha):
    g = gradient(*batch)
    if t % k:
        scale = alpha * total_norm(g.values()) / total_norm(memory["v"].values())
        return {name: g[name] + scale * memory["v"][name] for name in g}
    add(model, g, rho / total_norm(g.values()))
    s = gradient(*batch)
    share = float(flat(s) @ flat(g)) / float(flat(g) @ flat(g))
    memory["v"] = {name: s[name] - share * g[name] for name in g}
    return s


def step_msam(model, gradient, batch, memory, t, round, *, rho, m):
    before, (x, y) = values(model), batch
    total = {name: torch.zeros_like(p) for name, p in before.items()}
    for start in range(0, len(y), m):
        part = x[start : start + m], y[start : start + m]
        assign(model, before)
        g = gradient(*part)
        add(model, g, rho / total_norm(g.values()))
        for name, p in gradient(*part).items():
            total[name] += p * len(part[1]) / len(y)
    return total


def scaffold(model, batches, *, lr, c_i, c):
    """One client's round of Algorithm 1 with option II; returns its new control variate."""
    start = values(model)
    for x, y in batches:
        grads = gradients(model, x, y)
        add(model, {name: g - c_i[name] + c[name] for name, g in grads.items()}, -lr)
    end = values(model)
    return {
        name: c_i[name] - c[name] + (start[name] - end[name]) / (len(batches) * lr) for name in c
    }


def hardest_mean(losses, share):
    """Return the mean of the largest losses, that share of them and at least one: by a sort."""
    count = max(1, math.floor(share * len(losses)))
    return sum(sorted(losses, reverse=True)[:count]) / count


def confusion_of(truths, answers, classes, ignore):
    """Return how many pixels of each true class (row) had which answer (column)."""
    counts = [[0] * classes for _ in range(classes)]
    for truth, answer in zip(truths, answers, strict=True):
        if truth != ignore:
            counts[truth][answer] += 1
    return counts


def iou_of(confusion, epsilon=0.0):
    """Return the mean intersection over union of the classes that the truth holds."""
    found = []
    for c, row in enumerate(confusion):
        if sum(row):
            union = sum(row) + sum(other[c] for other in confusion) - row[c]
            found.append(row[c] / (union + epsilon))
    return sum(found) / len(found)
