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


def asam_ascent(model, grads, rho, eta, all_parameters=False):
    scale = {}
    for name, p in model.named_parameters():
        stretched = all_parameters or "weight" in name
        scale[name] = p.detach().abs() + eta if stretched else torch.ones_like(p)
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
