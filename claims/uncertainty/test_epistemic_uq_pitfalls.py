"""Pitfalls of Epistemic Uncertainty Quantification through Loss Minimisation (Bengs, Hüllermeier, Waegeman, 2022,
arXiv 2203.06102).

Three classes. Dirichlets are fitted to labels by 3,000 steps of Adam at 0.1 on log alpha, in double precision.
"""

import numpy as np
import torch

from paperclaims.fixtures.protocol import claim
from paperclaims.impl.uncertainty.epistemic_uq_pitfalls import (
    kl_to_uniform,
    outer_loss,
    posterior,
    regularized_minimum,
    total_variance,
)

K, NUMBERS, LAM, REPEATS = 3, (1, 10, 100, 1000), 0.1, 16


def expected(alpha, theta, form, lam=0.0):
    """Expected loss, over classes drawn from theta, of Dirichlets (..., K) plus lam times the divergence from the uniform one."""
    classes = torch.arange(K).expand(*alpha.shape[:-1], K)
    losses = outer_loss(alpha.unsqueeze(-2).expand(*alpha.shape, K), classes, form=form)
    return (theta * losses).sum(-1) + lam * kl_to_uniform(alpha)


@claim(
    "No distribution over probabilities has a smaller expected loss than the point mass on the true ones: not one of 10,000 "
    "Dirichlets and as many mixtures of two, for the logarithmic and for the Brier loss.",
    scale="paper",
    control="the same losses plus 0.1 times the divergence from the uniform distribution",
    control_breaks=("least loss beyond the point mass, log", "least loss beyond the point mass, brier"),
    paper_value="theorem 1: the minimiser is a Dirac measure",
)
def test_point_mass_is_best(arm, rng, evidence):
    theta = torch.from_numpy(rng.dirichlet(np.ones(K), 10_000))
    alphas = torch.from_numpy(np.exp(rng.uniform(-2, 6, (2, 10_000, K))))
    share = torch.from_numpy(rng.random(10_000))
    # A point mass of the divergence that the control adds is a Dirichlet so narrow that its own loss is reached to 1e-5.
    point = 1e5 * theta + 1e-9
    for form in ("log", "brier"):
        lam = LAM if arm.control else 0.0
        single = expected(alphas[0], theta, form, lam)
        mixed = share * single + (1 - share) * expected(alphas[1], theta, form, lam)  # linear in Q; the divergence is convex
        best = expected(point, theta, form, lam) if arm.control else exact_loss(theta, form)
        evidence.require(f"least loss beyond the point mass, {form}", (torch.stack([single, mixed]) - best).min().item(), above=0)


def exact_loss(theta, form):
    """Expected loss of the point mass on theta itself."""
    return torch.special.entr(theta).sum(-1) if form == "log" else (theta * (1 - theta)).sum(-1)


def labels(seed, n, repeats=REPEATS):
    """Frequencies (repeats, K) of n labels, each time from other probabilities."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([rng.multinomial(n, rng.dirichlet(np.ones(K))) for _ in range(repeats)]) / n)


def fitted(frequencies, lam, weight=1.0, steps=3000):
    """Dirichlets (..., K) of the least weight * mean outer loss + lam * divergence, found by gradient descent.

    lam and weight are numbers or of shape (...).
    """
    log_alpha = torch.zeros_like(frequencies).requires_grad_()
    optimizer = torch.optim.Adam([log_alpha], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / steps)))
    for _ in range(steps):
        optimizer.zero_grad()
        alpha = log_alpha.exp()
        losses = outer_loss(alpha.unsqueeze(-2).expand(*alpha.shape, K), torch.arange(K).expand(*alpha.shape[:-1], K))
        (weight * (frequencies * losses).sum(-1) + lam * kl_to_uniform(alpha)).sum().backward()
        optimizer.step()
        schedule.step()
    return log_alpha.detach().exp()


@claim(
    "Fitted to labels, the distribution collapses, whatever their number: from one label to a thousand its variance ends below a "
    "thousandth, where Bayes' falls like 1 / n.",
    scale="paper",
    control="the divergence from the uniform distribution added, 0.1 times",
    control_breaks=tuple(f"largest variance after {n} labels" for n in NUMBERS),
    paper_value="the empirical minimiser is a Dirac measure, for any sample (theorem 2)",
)
def test_collapse(arm, seeds, evidence):
    seed = seeds(1)[0]
    frequencies = torch.stack([labels(seed, n) for n in NUMBERS])
    widths = total_variance(fitted(frequencies, LAM if arm.control else 0.0)).amax(1)
    for n, width in zip(NUMBERS, widths.tolist(), strict=True):
        evidence.require(f"largest variance after {n} labels", width, below=1e-3)
    counts = frequencies * torch.tensor(NUMBERS).view(-1, 1, 1)
    bayes = total_variance(posterior(counts)).mean(1)
    evidence.curve("variance of Bayes' posterior", NUMBERS, bayes.tolist(), x_label="labels", log="xy")


@claim(
    "With the divergence from the uniform distribution added, its weight sets the width and the number of labels does not: "
    "alpha_0 less K goes with the weight to the power of -1 and with the number to the power of 0.",
    scale="paper",
    control="the loss summed over the labels, with weight 1: variational inference",
    control_breaks="exponent of the number of labels",
    paper_value="the width depends on the regularisation only (section 4)",
)
def test_weight_sets_the_width(arm, seeds, evidence):
    seed = seeds(1)[0]
    weights, numbers = (0.1, 0.3, 1.0, 3.0), (10, 30, 100)
    frequencies = torch.stack([labels(seed, n) for n in numbers]).expand(len(weights), -1, -1, -1)
    lam, n = torch.tensor(weights).view(-1, 1, 1), torch.tensor(numbers).view(1, -1, 1)
    alpha = fitted(frequencies.contiguous(), lam, weight=n if arm.control else 1.0)
    if not arm.control:
        best = torch.stack([regularized_minimum(frequencies[0], value) for value in weights])
        evidence.require("largest relative distance from 1 + p / lam", ((alpha - best).abs() / best).max().item(), below=0.01)
    width = (alpha.sum(-1) - K).mean(-1).log().numpy()
    evidence.require("exponent of the weight", np.polyfit(np.log(weights), width[:, 0], 1)[0], between=(-1.02, -0.98))
    by_number = np.polyfit(np.log(numbers), width[-1], 1)[0]
    evidence.require("exponent of the number of labels", by_number, between=(-0.02, 0.02))
