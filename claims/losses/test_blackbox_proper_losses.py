"""Proper losses for discrete generative models (Kimpara, Frongillo, Waggoner, 2022, arXiv 2211.03761).

Exact expectations over all samples from an alphabet of three symbols. Degrees are those of functions on the simplex.
"""

import itertools
import math

import pytest
import torch

from paperclaims.fixtures.protocol import claim
from paperclaims.fixtures.statistics import mean_interval
from paperclaims.impl.losses.blackbox_proper_losses import (
    all_counts,
    count,
    count_probabilities,
    expected_loss,
    inverse_binomial_log_loss,
    monomial,
    plug_in_power_loss,
    poisson_log_loss,
    power_loss,
)


def distributions(rng, n, least=0.0, size=3):
    """n points (n, size) of the simplex, uniform where every probability is `least` or more."""
    return least + (1 - size * least) * torch.from_numpy(rng.dirichlet([1.0] * size, n))


def misfit(target, n, p):
    """Root mean square over p (points, size) by which the best of all losses of n draws misses target (points,)."""
    reached = count_probabilities(all_counts(n, p.shape[-1]), p)
    q = torch.linalg.qr(reached).Q
    return (target - q @ (q.T @ target)).square().mean().sqrt().item()


@claim(
    "A polynomial of degree d in the model's probabilities has an unbiased loss from d draws of the model, and none from fewer.",
    scale="paper",
    control="the frequencies of the draws in place of probabilities: the plug-in estimate, without falling factorials",
    control_breaks="largest bias, d draws",
)
def test_draws_and_degree(arm, rng, evidence):
    p, grid = distributions(rng, 20), distributions(rng, 200, least=0.05)
    biases, misfits = [], []
    for d in range(2, 7):
        draws = torch.tensor(list(itertools.product(range(3), repeat=d)))
        counts, probability = count(draws, 3), p[:, draws].prod(-1)
        for powers in all_counts(d, 3):
            if powers.max() < 2:
                continue  # products of distinct symbols in as many draws: there the rival is only off by a factor
            estimate = (counts / d).double().pow(powers).prod(-1) if arm.control else monomial(counts, powers)
            biases.append((probability @ estimate - p.pow(powers).prod(-1)).abs().max().item())
        misfits.append(misfit(grid.pow(d).sum(-1), d - 1, grid))
    evidence.require("largest bias, d draws", max(biases), below=1e-12)
    evidence.require("least misfit of all losses of d - 1 draws to sum p^d", min(misfits), above=1e-6)


@claim(
    "No loss of a fixed number of draws, here up to six, has the cross-entropy as its expectation.",
    scale="paper",
    control="the cross-entropy's series cut after as many terms as there are draws: a polynomial",
)
def test_no_cross_entropy_from_fixed_draws(arm, rng, evidence):
    p = distributions(rng, 400, least=0.05)
    draws, misfits = range(1, 7), []
    for n in draws:
        series = sum((1 - p[:, 0]).pow(k) / k for k in range(1, n + 1))
        misfits.append(misfit(series if arm.control else -p[:, 0].log(), n, p))
    evidence.curve("least misfit", draws, misfits, x_label="draws of the model", y_label="root mean square", log="y")
    evidence.require("least misfit of all losses of up to six draws", min(misfits), above=1e-3)


@claim(
    "With a Poisson number of draws of the model and one of the target, a loss has the cross-entropy as its expectation.",
    scale="paper",
    control="the same loss of a fixed number of draws, the Poisson's mean",
)
@pytest.mark.parametrize("lam", [2, 5, 20])
def test_cross_entropy_from_poisson_draws(arm, lam, rng, evidence):
    p, q = distributions(rng, 20, least=0.2), distributions(rng, 20)
    others = torch.arange(lam + 1 if arm.control else 161)  # draws of other symbols than the target's; 161 are all but 1e-11
    loss = poisson_log_loss(torch.stack([others, 0 * others], -1), torch.ones_like(others), lam)
    if arm.control:
        chance = count_probabilities(torch.stack([others, lam - others], -1), torch.stack([1 - p, p], -1))
    else:
        chance = poisson(others, lam * (1 - p))
    error = ((chance @ loss) * q).sum(-1) + (q * p.log()).sum(-1)
    evidence.require("largest error of the expectation", error.abs().max().item(), below=1e-10)
    if not arm.control:
        second = (poisson(others, torch.tensor(0.8 * lam)) * loss.square()).cumsum(-1)
        for most in (40, 80):
            evidence.record(f"log10 of the second moment at p = 0.2, up to {most} draws", second[most].log10())
        number = rng.poisson(0.8 * lam, 100_000)
        evidence.record("error of a mean of 100,000 Poisson losses at p = 0.2", loss[number].mean() + math.log(0.2))
        waiting = torch.from_numpy(rng.geometric(0.2, 100_000))
        one_by_one = mean_interval(inverse_binomial_log_loss(waiting).numpy() + math.log(0.2))
        evidence.record("the same, drawing one by one until the symbol comes", one_by_one)


def poisson(n, mean):
    """Probability of n (outcomes,) at every mean (...): shape (..., outcomes)."""
    mean = mean.double().unsqueeze(-1)
    return (torch.xlogy(n, mean) - mean - torch.lgamma(n.double() + 1)).exp()


def minimiser(loss, q, n):
    """Model (questions, 3) of least expected loss for every target q, by ever finer grids around the best model so far."""
    axis = torch.linspace(-1, 1, 11, dtype=torch.float64)
    best, moves = torch.full_like(q[:, None, :2], 1 / 3), torch.cartesian_prod(axis, axis)
    for step in range(70):
        first = (best + 0.8**step * moves).clamp(0, 1)
        p = torch.cat([first, 1 - first.sum(-1, keepdim=True)], -1)
        value = expected_loss(loss, p, q.unsqueeze(1), n).where(p[..., 2] >= 0, math.inf)
        place = value.argmin(-1)[:, None, None]
        best = p.gather(1, place.expand(-1, 1, 3))[..., :2]
    return p.gather(1, place.expand(-1, 1, 3)).squeeze(1)


@claim(
    "Unbiased losses are strictly proper: for every target the model of least expected loss is the target.",
    scale="paper",
    control="the plug-in loss: the frequencies of the model's draws in the same polynomial",
    control_breaks=(
        "best model's distance from the target, d draws",
        "best model's distance from the target, d + 3 draws",
    ),
)
@pytest.mark.parametrize("degree", [2, 3, 4])
def test_unbiased_losses_are_proper(arm, degree, rng, evidence):
    q = distributions(rng, 50, least=0.05)
    form = plug_in_power_loss if arm.control else power_loss
    for draws, name in ((degree, "d draws"), (degree + 3, "d + 3 draws")):
        distance = (minimiser(lambda p, y: form(p, y, degree), q, draws) - q).abs().amax(-1)
        evidence.require(f"best model's distance from the target, {name}", distance.max().item(), below=1e-6)
        evidence.record(f"median distance, {name}", distance.median())
