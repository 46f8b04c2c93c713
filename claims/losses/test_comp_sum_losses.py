"""Cross-Entropy Loss Functions: Theoretical Analysis and Applications (Mao, Mohri, Zhong, 2023, arXiv 2304.07288).

Chosen on other seeds. Clean comparison: learning rates 0.001, 0.003, 0.01 and 0.03 for every loss (0.03 is best for all but the
mean absolute error, where 0.01 is). Adversarial training: TRADES with beta in 0.5, 1, 2 and 3, the smooth loss with 22 settings
of tau, rho and nu, both at rates 0.01, 0.03 and 0.1.
"""

import functools
from itertools import combinations, permutations

import pytest
import torch
import torch.nn.functional as F

from paperclaims.fixtures.data.mnist1d import mnist1d
from paperclaims.fixtures.data.tabular import digits
from paperclaims.fixtures.models.classifiers import Draws, classify, train_classifiers
from paperclaims.fixtures.protocol import claim, not_reproduced
from paperclaims.fixtures.statistics import paired_difference
from paperclaims.impl.losses.comp_sum_losses import (
    comp_sum_loss,
    consistency_bound,
    consistency_transform,
    least_excess_risk,
    least_risk,
    margin_differences,
    perturb,
    smooth_adversarial_loss,
)

BETAS = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
EPSILON = 0.1  # of the pixel range, in the maximum norm


def worst_cases(n, beta):
    """Distributions (n,) with an excess 0-1 risk of beta for their last class: two classes left, and one class less likely."""
    two = torch.zeros(n, dtype=torch.float64)
    two[0], two[-1] = (1 + beta) / 2, (1 - beta) / 2
    rest = torch.full((n,), (1 + beta) / n, dtype=torch.float64)
    rest[-1] = (1 - (n - 1) * beta) / n
    return [two, rest] if rest[-1] >= 0 else [two]


def even_case(n, beta):
    """As `worst_cases`, every class but the first equally likely."""
    p = torch.full((n,), (1 - beta) / n, dtype=torch.float64)
    p[0] += beta
    return p


def closeness(tau, n, even):
    """Least ratio of the least excess surrogate risk to T_tau over those distributions and BETAS."""
    cases = [(beta, p) for beta in BETAS for p in ([even_case(n, beta)] if even else worst_cases(n, beta))]
    last = torch.tensor(n - 1)
    return min((least_excess_risk(p, last, tau) / consistency_transform(beta, tau, n)).item() for beta, p in cases)


@claim(
    "Whatever the distribution over classes, an excess of the 0-1 risk costs an excess of the comp-sum risk of at least T_tau, "
    "and no larger bound holds: two classes (the mean absolute error: all but one class equally likely) reach it.",
    scale="paper",
    control="the distribution that reaches the bound is left out: all classes but the best are equally likely",
    control_breaks="excess risk over the bound where it comes closest",
)
@pytest.mark.parametrize("n", [3, 10])
@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0])
def test_bound_is_tight(arm, tau, n, rng, evidence):
    p = torch.from_numpy(rng.dirichlet([1.0] * n, 5000))
    predicted = torch.from_numpy(rng.integers(n, size=5000))
    beta = p.amax(-1) - p.gather(-1, predicted[:, None]).squeeze(-1)
    slack = least_excess_risk(p, predicted, tau) - consistency_transform(beta, tau, n)
    evidence.require("least excess risk beyond the bound, random distributions", slack.min().item(), above=-1e-12)
    ratio = closeness(tau, n, arm.control)
    evidence.require("excess risk over the bound where it comes closest", ratio, below=1 + 1e-6)


@not_reproduced(
    "with three or more classes the least excess is the two-class value, (n / 2)^(tau - 1) times the bound; the bound holds, but "
    "n classes are not worse than two. Whether the paper's theorem of tightness covers tau in (1, 2) could not be checked"
)
@claim(
    "For generalised cross-entropy, tau in (1, 2), the bound is tight with three or more classes too.",
    scale="paper",
    control="all classes but the best are equally likely",
    control_breaks="excess risk over the bound where it comes closest",
    central=False,
    paper_value="the bounds are tight (abstract)",
)
@pytest.mark.parametrize("n", [3, 10])
def test_bound_of_generalised_cross_entropy_is_tight(arm, n, rng, evidence):
    p = torch.from_numpy(rng.dirichlet([0.5] * n, 5000))
    beta = p.amax(-1) - p[:, 0]
    ratios = least_excess_risk(p, torch.zeros(5000, dtype=torch.int64), 1.5) / consistency_transform(beta, 1.5, n)
    evidence.record("least ratio over random distributions", ratios[beta > 0.01].min().item())
    ratio = closeness(1.5, n, arm.control)
    evidence.require("excess risk over the bound where it comes closest", ratio, below=1 + 1e-6)


def linear_scores(theta, x):
    """Scores (..., points, classes) of theta (..., classes - 1, 2) at x (..., points): a line a class, the first one zero."""
    lines = theta[..., None, :, 0] + theta[..., None, :, 1] * x[..., None]
    return F.pad(lines, (1, 0))


def surrogate_risk(theta, x, joint, tau):
    """Expected loss (...) of linear scores; `joint` is the probability of point and class, (..., points, classes)."""
    scores = linear_scores(theta, x)
    n = scores.shape[-1]
    every = torch.arange(n).expand(*scores.shape[:-1], n)
    losses = comp_sum_loss(scores.unsqueeze(-2).expand(*scores.shape[:-1], n, n), every, tau, reduction="none")
    return (joint * losses).sum((-2, -1))


def best_linear(x, joint, tau):
    """Minimisers (problems, classes - 1, 2) by Newton's method, the step halved until it helps; tau is 0 or 1, so convex."""
    theta = torch.zeros(len(x), joint.shape[-1] - 1, 2, dtype=torch.float64)
    for _ in range(60):
        theta.requires_grad_()
        (slope,) = torch.autograd.grad(surrogate_risk(theta, x, joint, tau).sum(), theta, create_graph=True)
        rows = [torch.autograd.grad(part.sum(), theta, retain_graph=True)[0].flatten(1) for part in slope.flatten(1).unbind(1)]
        theta, slope = theta.detach(), slope.detach().flatten(1)
        direction = torch.linalg.solve(torch.stack(rows, 1), slope).view_as(theta)
        tries = torch.stack([theta - size * direction for size in (1, 0.5, 0.25, 0.1, 0.01, 0)])
        best = surrogate_risk(tries, x, joint, tau).nan_to_num(nan=torch.inf).argmin(0)
        theta = tries[best, torch.arange(len(x))]
    missing = (slope * direction.flatten(1)).sum(-1).max() / 2  # of the risk, to second order
    assert missing < 1e-9, f"Newton's method is {missing:.1e} above the least risk"
    return theta


def linear_labelings(points, classes):
    """Every labeling of sorted points on a line that linear scores give: intervals of different classes, (labelings, points)."""
    found = []
    for count in range(1, classes + 1):
        for order in permutations(range(classes), count):
            for cuts in combinations(range(1, points), count - 1):
                ends = [0, *cuts, points]
                found.append([order[i] for i in range(count) for _ in range(ends[i], ends[i + 1])])
    return torch.tensor(found)


@claim(
    "For a hypothesis set that cannot fit the Bayes classifier everywhere (lines over eight points, three classes) the 0-1 risk "
    "above the set's best plus its minimizability gap never exceeds Gamma_tau of the surrogate's risk above the set's best plus "
    "its gap.",
    scale="paper",
    control="the surrogate's minimizability gap is left out",
)
@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_consistency_within_a_hypothesis_set(arm, tau, rng, evidence):
    problems, points, n = 200, 8, 3
    x = torch.from_numpy(rng.uniform(-1, 1, (problems, points))).sort(-1).values
    weight = torch.from_numpy(rng.dirichlet([1.0] * points, problems))
    p = torch.from_numpy(0.06 / n + 0.94 * rng.dirichlet([1.0] * n, (problems, points)))
    joint = weight[..., None] * p
    labelings = linear_labelings(points, n).expand(problems, -1, -1)
    right = joint.unsqueeze(1).expand(-1, labelings.shape[1], -1, -1).gather(-1, labelings[..., None]).sum((-2, -1))
    best_01, best_tau = 1 - right.amax(-1), best_linear(x, joint, tau)
    least_tau = surrogate_risk(best_tau, x, joint, tau)
    gap_01 = best_01 - (1 - joint.amax(-1).sum(-1))
    gap_tau = least_tau - (weight * least_risk(p, tau)).sum(-1)
    others = 3 * torch.from_numpy(rng.standard_normal((20, *best_tau.shape)))
    excess_01, excess_tau = [], []
    for theta in (best_tau, *others):
        chosen = linear_scores(theta, x).argmax(-1, keepdim=True)
        excess_01.append(1 - joint.gather(-1, chosen).sum((-2, -1)) - best_01)
        excess_tau.append((surrogate_risk(theta, x, joint, tau) - least_tau).clamp(min=0))
    excess_01, excess_tau = torch.stack(excess_01), torch.stack(excess_tau)
    allowed = consistency_bound(excess_tau + (0 if arm.control else gap_tau), tau, n)
    violation = excess_01 + gap_01 - allowed
    evidence.record("distributions where the set misses the Bayes classifier", (gap_01 > 1e-9).double().mean())
    evidence.record("of those, bound broken at the surrogate's minimiser", (violation[0] > 1e-6)[gap_01 > 1e-9].double().mean())
    evidence.record("minimisers of the surrogate that are not the set's best", (excess_01[0] > 1e-9).double().mean())
    evidence.record("bounds at the surrogate's minimiser that say something (below 1)", (allowed[0] < 1).double().mean())
    evidence.require("largest excess of the left side over the right", violation.max().item(), below=1e-6)


@functools.cache
def clean_accuracy(groups, seeds):
    """Per cent of MNIST-1D's test points that are right, (seeds,) for every tau; labels in `groups` groups of classes."""
    rates = {0.0: 0.03, 0.5: 0.03, 1.0: 0.03, 1.5: 0.03, 2.0: 0.01}
    data = mnist1d()
    x, y, x_test, y_test = (torch.tensor(part) for part in (*data.train, *data.test))
    y, y_test = y * groups // 10, y_test * groups // 10

    def loss(layers, points, targets):
        scores = zip(classify(layers, points).unbind(1), rates, strict=True)
        return torch.stack([comp_sum_loss(h, targets.squeeze(1), tau, reduction="none").mean(-1) for h, tau in scores], 1)

    how = {"hidden": (32,), "classes": groups, "lr": torch.tensor(list(rates.values())), "steps": 600, "batch": 64, "settings": 5}
    layers = train_classifiers(x.float(), y, seeds, loss, **how)
    right = classify(layers, x_test.float()).argmax(-1) == y_test
    return dict(zip(rates, (100 * right.double().mean(-1)).T.numpy(), strict=True))


@claim(
    "The logistic loss trains better classifiers than both ends of the family, and the mean absolute error's penalty, "
    "n^(tau - 1) in its bound, is that of many classes: with ten it is over ten points behind.",
    scale="reduced",
    differs="MNIST-1D, a perceptron with 32 hidden units and 600 steps of Adam, for CIFAR-10, CIFAR-100, SVHN and residual nets",
    control="two classes: the same images in two groups of five digits, where the penalty is smallest",
    control_breaks="accuracy gained over the mean absolute error",
)
def test_logistic_loss_is_best(arm, seeds, evidence):
    accuracy = clean_accuracy(2 if arm.control else 10, tuple(seeds(12)))
    for tau, found in accuracy.items():
        evidence.record(f"accuracy, tau = {tau}", found.mean(), unit="%")
    exponential = paired_difference(accuracy[1.0], accuracy[0.0], "median")  # now and then one of its runs goes astray
    evidence.require("accuracy gained over the sum-exponential loss", exponential, above=0.0, unit="points")
    gain = paired_difference(accuracy[1.0], accuracy[2.0])
    evidence.require("accuracy gained over the mean absolute error", gain, above=10.0, unit="points")


@functools.cache
def split_digits(seeds):
    """Pixels in [0, 1] and labels of 1197 digits to train on and 600 to test on, a split a seed."""
    table = digits()
    order = Draws(seeds)(torch.randperm, len(table.y))
    x, y = torch.tensor(table.x, dtype=torch.float32)[order] / 16, torch.tensor(table.y)[order]
    return x[:, :1197], y[:, :1197], x[:, 1197:], y[:, 1197:]


def attack(objective, x, steps, size, start=None):
    return perturb(objective, x, EPSILON, steps=steps, step_size=size, start=start, low=0.0, high=1.0)


@functools.cache
def robustness(method, seeds, tau=1.5, nu=0.1, beta=1.0):
    """Per cent right of clean and of attacked test digits, (seeds,) each: 20 steps on cross-entropy and on the margin."""
    x, y, x_test, y_test = split_digits(seeds)
    noise = torch.Generator().manual_seed(seeds[0])

    def loss(layers, points, targets):
        fixed = [(weight.detach(), bias.detach()) for weight, bias in layers]
        clean = classify(layers, points)
        base = clean.detach().softmax(-1) if method == "trades" else margin_differences(clean.detach(), targets)

        def moved(z):
            if method == "trades":
                return divergence(classify(fixed, z), base)
            return (margin_differences(classify(fixed, z), targets) - base).norm(dim=-1)

        start = points + 0.001 * torch.randn(points.shape, generator=noise)
        perturbed = classify(layers, attack(moved, points, 5 if nu else 0, EPSILON / 4, start))
        if method == "trades":
            values = comp_sum_loss(clean, targets, reduction="none") + beta * divergence(perturbed, clean.softmax(-1))
        else:
            values = smooth_adversarial_loss(clean, perturbed, targets, tau, nu=nu)
        return values.mean(-1)

    layers = train_classifiers(x, y, seeds, loss, hidden=(64,), classes=10, lr=0.03, steps=300, batch=64)
    points, targets = x_test.unsqueeze(1), y_test.unsqueeze(1)
    right = classify(layers, points).argmax(-1) == targets
    robust = right.clone()
    attacks = (
        lambda z: comp_sum_loss(classify(layers, z), targets, reduction="none"),
        lambda z: margin(layers, z, targets),
    )
    for objective in attacks:
        robust &= classify(layers, attack(objective, points, 20, EPSILON / 8)).argmax(-1) == targets
    return tuple(100 * share.double().mean((1, 2)).numpy() for share in (right, robust))


def divergence(logits, base):
    """Kullback-Leibler divergence from `base` to the softmax of the logits, over the last axis."""
    return F.kl_div(logits.log_softmax(-1), base, reduction="none").sum(-1)


def margin(layers, points, targets):
    """Largest other score less the target's."""
    scores, own = classify(layers, points), targets.unsqueeze(-1)
    return (scores.scatter(-1, own, -torch.inf).amax(-1, keepdim=True) - scores.gather(-1, own)).squeeze(-1)


ADVERSARIAL = "8 x 8 digits, a perceptron with 64 hidden units, 300 steps, PGD-20, for CIFAR-10, CIFAR-100, SVHN and ResNets"


@claim(
    "The smooth term of the adversarial comp-sum loss makes a classifier robust: over twenty points more attacked digits right.",
    scale="reduced",
    differs=ADVERSARIAL,
    control="nu = 0: the comp-sum loss of clean digits alone",
)
def test_smooth_term_makes_robust(arm, seeds, evidence):
    seeds = tuple(seeds(16))
    plain = robustness("smooth", seeds, nu=0.0)
    trained = plain if arm.control else robustness("smooth", seeds)
    evidence.record("clean accuracy gained", paired_difference(trained[0], plain[0]), unit="points")
    evidence.require("robust accuracy gained", paired_difference(trained[1], plain[1]), above=20.0, unit="points")


@not_reproduced("TRADES keeps about three points more under attack here and is as clean, after a search smaller than our loss's")
@claim(
    "Training on the smooth adversarial comp-sum loss is more robust than TRADES.",
    scale="reduced",
    differs=ADVERSARIAL,
    control="nu = 0: the comp-sum loss of clean digits alone",
    control_breaks="robust accuracy gained over TRADES",
    paper_value="better robust and clean accuracy than TRADES (abstract)",
)
def test_smooth_loss_is_more_robust_than_trades(arm, seeds, evidence):
    seeds = tuple(seeds(16))
    ours, trades = robustness("smooth", seeds, nu=0.0 if arm.control else 0.1), robustness("trades", seeds)
    for name, (clean, robust) in {"smooth": ours, "TRADES": trades}.items():
        evidence.record(f"clean accuracy, {name}", clean.mean(), unit="%")
        evidence.record(f"robust accuracy, {name}", robust.mean(), unit="%")
    evidence.record("clean accuracy gained over TRADES", paired_difference(ours[0], trades[0]), unit="points")
    evidence.require("robust accuracy gained over TRADES", paired_difference(ours[1], trades[1]), above=0.0, unit="points")
