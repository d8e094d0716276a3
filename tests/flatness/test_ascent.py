"""The ascent of worst-case sharpness against exact maxima of quadratics in a ball and in a box."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedsam.flatness.measures.sharpness import sharpness
from fedsam.flatness.subject import subject_of_network


class Quadratic(nn.Module):
    """Its output is g^T (w - w_0) + 1/2 (w - w_0)^T diag(lambda) (w - w_0), whatever the image."""

    def __init__(self, lambdas, g, w0):
        super().__init__()
        self.weight = nn.Parameter(w0.clone())
        for name, tensor in (("lambdas", lambdas), ("g", g), ("w0", w0)):
            self.register_buffer(name, tensor)

    def forward(self, images):
        u = self.weight - self.w0
        return (self.g @ u + 0.5 * (self.lambdas * u * u).sum()).expand(len(images))


class Output:
    """The task whose loss is the output."""

    def loss(self, output, targets):
        return output

    def statistics(self, output, targets):
        return torch.stack([output.new_tensor(len(targets)), output.sum()]).double()

    def metrics(self, total):
        return {"accuracy": 0.5, "loss": float(total[1] / total[0])}


def subject_of(lambdas, g, w0):
    pixels, labels = torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    module = Quadratic(lambdas, g, w0)
    return subject_of_network(module, (pixels, labels), mean=(0.0,), std=(1.0,), task=Output())


def exact_in_ball(lambdas, g, rho):
    """Return max g^T u + 1/2 u^T diag(lambda) u over |u|_2 <= rho, by the secular equation."""
    low = max(lambdas.max().item(), 0.0)
    high = low + g.norm().item() / rho + 1e-12

    def u_at(mu):
        return g / (mu - lambdas)

    low += 1e-12 * max(low, 1)
    if u_at(low).norm() < rho:  # the hard case: what is missing lies along the top eigenvector
        u = u_at(low)
        top = lambdas.argmax()
        rest = math.sqrt(rho**2 - (u.norm() ** 2).item())
        u[top] += math.copysign(rest, u[top].item()) if lambdas[top] > 0 else 0.0
    else:
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if u_at(middle).norm() > rho else (low, middle)
        u = u_at(high)
    return (g @ u + 0.5 * (lambdas * u * u).sum()).item()


def exact_in_box(lambdas, g, rho):
    """Return the same over |u|_inf <= rho, which is a sum of parabolas."""
    inner = (g / -lambdas.clamp(max=-1e-300)).clamp(-rho, rho)
    u = torch.where(lambdas < 0, inner, rho * torch.where(g < 0, -1.0, 1.0).double())
    return (g @ u + 0.5 * (lambdas * u * u).sum()).item()


EXACT = {2: exact_in_ball, "inf": exact_in_box}


def spectrum(kind, size):
    """Return eigenvalues (size,) with lambda_1 = 48: as of a network, or denser at the top."""
    rank = torch.arange(1, size + 1, dtype=torch.float64)
    if kind == "outliers":  # ten above a bulk, a third of it negative
        bulk = 4 * rank[: size - 10] ** -0.8
        bulk[-size // 3 :] *= -0.5
        return torch.cat([torch.tensor([48.0, 25, 20, 18, 15, 10, 8, 7, 6, 5]).double(), bulk])
    if kind == "close":  # ten within 20 % of the largest
        near = torch.linspace(48, 40, 10, dtype=torch.float64)
        return torch.cat([near, 30 * rank[: size - 10] ** -0.5])
    return torch.linspace(-5, 48, size, dtype=torch.float64)  # "flat": no gap anywhere


def reached(lambdas, g, w0, p, adaptive, rho, **how):
    """Return the part of the exact maximum that is reached."""
    subject = subject_of(lambdas, g, w0)
    found = sharpness(subject, p=p, adaptive=adaptive, rho=rho, batch=0, **how)["scalars"]["worst"]
    T = w0.abs() if adaptive else torch.ones_like(w0)
    best = EXACT[p](T * lambdas * T, T * g, rho)
    assert found <= best * (1 + 1e-9) + 1e-15
    return found / best


@pytest.mark.parametrize(("kind", "least"), [("outliers", 0.99), ("close", 0.99), ("flat", 0.98)])
@pytest.mark.parametrize("slope", [0.05, 0.5, 5.0])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("p", [2, "inf"])
def test_the_ascent_reaches_99_percent_of_the_exact_maximum(kind, least, slope, adaptive, p):
    size = 20_000
    generator = torch.Generator().manual_seed(1)
    lambdas = spectrum(kind, size)
    g = torch.randn(size, generator=generator, dtype=torch.float64)
    g *= slope / g.norm()
    w0 = torch.rand(size, generator=generator, dtype=torch.float64) + 0.5
    rho = {2: 0.05, "inf": 0.0005}[p]
    assert reached(lambdas, g, w0, p, adaptive, rho) > least


def test_five_steps_of_rho_reached_half_of_what_twenty_reach():
    """The ascent before: 43 % where the gradient is spread over 20,000 directions."""
    lambdas = spectrum("outliers", 20_000)
    g = torch.randn(20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    g *= 0.5 / g.norm()
    rho, u, best = 0.05, torch.zeros_like(g), 0.0
    for _ in range(5):
        slope = g + lambdas * u
        u = u + rho * slope / slope.norm()
        u *= min(1.0, rho / u.norm().item())
        best = max(best, (g @ u + 0.5 * (lambdas * u * u).sum()).item())
    assert 0.3 < best / exact_in_ball(lambdas, g, rho) < 0.6
    assert reached(lambdas, g, torch.ones_like(g), 2, False, rho) > 0.99


@pytest.mark.parametrize(("kind", "least"), [("outliers", 0.99), ("close", 0.97), ("flat", 0.99)])
def test_at_a_minimum_where_the_first_direction_is_drawn(kind, least):
    lambdas = spectrum(kind, 200)
    zero, w0 = torch.zeros_like(lambdas), torch.ones_like(lambdas)
    assert reached(lambdas, zero, w0, 2, False, 0.05) > least


@settings(max_examples=40, deadline=None)
@given(
    lambdas=st.lists(st.floats(-10, 50), min_size=2, max_size=30),
    slope=st.floats(0.1, 10),
    rho=st.floats(0.01, 1.0),
    p=st.sampled_from([2, "inf"]),
    seed=st.integers(0, 1000),
)
def test_any_quadratic_with_a_slope(lambdas, slope, rho, p, seed):
    values = torch.tensor(lambdas, dtype=torch.float64)
    g = torch.randn(len(values), generator=torch.Generator().manual_seed(seed)).double()
    g = slope * g.sign() * (0.1 + g.abs())
    assert reached(values, g, torch.ones_like(g), p, False, rho) > 0.97


def test_twice_the_ball_or_more_steps_never_find_less():
    lambdas = spectrum("flat", 300)
    g = torch.linspace(-1, 1, 300, dtype=torch.float64) ** 3
    shares = [
        reached(lambdas, g, torch.ones_like(g), 2, False, 0.05, steps=n) for n in (1, 3, 9, 27)
    ]
    assert shares == sorted(shares)
    assert shares[-1] > 0.999


def test_where_the_loss_only_falls_the_worst_point_is_the_model_itself():
    lambdas, zero = torch.full((5,), -3.0, dtype=torch.float64), torch.zeros(5).double()
    found = sharpness(subject_of(lambdas, zero, zero + 1), rho=0.3, batch=0)["scalars"]
    assert found["worst"] == 0.0
    assert found["one_step"] < 0
