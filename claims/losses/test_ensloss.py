"""EnsLoss: Stochastic Calibrated Loss Ensembles for Preventing Overfitting in Classification (Dai, 2024, arXiv 2409.00908).

Nine pairs of digits of 8 x 8 pixels, 200 points of each to train on, a fifth of their labels wrong, and up to 140 others, with
right labels, to score; perceptrons with 64 hidden units, 200 steps of Adam on batches of 32. A seed gives one figure, the mean
over its pairs, each with its own split. Learning rate (from 0.0003, 0.001, 0.003 and 0.01) and decoupled weight decay (times the
learning rate; from 0, 1, 4, 12 and 36) of every loss were chosen by its errors on other seeds: 0.003 and 4 for all. "Untuned" is
a learning rate of 0.01 without decay. lam is drawn anew every ten batches.
"""

import functools
import itertools

import torch
import torch.nn.functional as F

from paperclaims.fixtures.data.tabular import digits
from paperclaims.fixtures.models.classifiers import Draws, classify, train_classifiers
from paperclaims.fixtures.protocol import claim, not_reproduced
from paperclaims.fixtures.statistics import mean_interval, median_interval, paired_difference
from paperclaims.impl.losses.ensloss import calibrated_derivatives

PAIRS = list(itertools.combinations(range(10), 2))[::5]
KNOWN, ROWS, NOISE, STEPS, BATCH, PERIOD, SEEDS = 200, 340, 0.2, 200, 32, 10, 12
FIXED = {"cross-entropy": lambda z: F.softplus(-z), "hinge": lambda z: (1 - z).relu(), "exponential": lambda z: (-z).exp()}
LOSSES = (*FIXED, "EnsLoss", "one draw")
HOW = {"tuned": (0.003, 4.0), "untuned": (0.01, 0.0)}  # learning rate and decay
DIFFERS = (
    "pairs of digits of 8 x 8 pixels with wrong labels and small perceptrons for CIFAR-10, tables and deep networks; lam is "
    "drawn anew, where the authors' scripts mostly keep 0"
)


def problem(seeds):
    """Points, given and true labels (-1 or 1) of every (seed, pair), a row each: (rows, ROWS, 64) and (rows, ROWS) twice."""
    table, parts = digits(), []
    x, y = torch.tensor(table.x).float() / 16, torch.tensor(table.y)
    for seed, (a, b) in itertools.product(seeds, PAIRS):
        generator = torch.Generator().manual_seed(seed + 10 * a + b)
        rows = ((y == a) | (y == b)).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)][:ROWS]
        true = 2.0 * (y[rows] == a) - 1
        wrong = torch.rand(ROWS, generator=generator) < NOISE
        parts.append((x[rows], torch.where(wrong, -true, true), true))
    return (torch.stack(column) for column in zip(*parts, strict=True))


@functools.cache
def study(seeds):
    """Errors on new points, and share of the wrong labels that were learned, in per cent: by (training, loss), (seeds,)."""
    x, given, true = problem(seeds)
    rows, settings = len(x), list(itertools.product(HOW, LOSSES))
    generator = torch.Generator().manual_seed(seeds[0])
    frozen = torch.randn(rows, BATCH, generator=generator), 2 * torch.rand(rows, 1, generator=generator) - 1
    steps, lam = itertools.count(), torch.zeros(rows, 1)

    def loss(layers, points, labels):
        nonlocal lam
        margins = classify(layers, points).squeeze(-1) * labels
        if next(steps) % PERIOD == 0:
            lam = 2 * torch.rand(rows, 1, generator=generator) - 1
        draws = {"EnsLoss": (torch.randn(rows, BATCH, generator=generator), lam), "one draw": frozen}
        values = []
        for z, (_, kind) in zip(margins.unbind(1), settings, strict=True):
            values.append((FIXED[kind](z) if kind in FIXED else calibrated_derivatives(z, *draws[kind]) * z).mean(-1))
        return torch.stack(values, 1)

    lr, decay = (torch.tensor([HOW[training][place] for training, _ in settings]) for place in (0, 1))
    how = {"hidden": (64,), "classes": 1, "steps": STEPS, "batch": BATCH, "settings": len(settings)}
    layers = train_classifiers(
        x[:, :KNOWN], given[:, :KNOWN], range(seeds[0], seeds[0] + rows), loss, lr=lr, weight_decay=decay, **how
    )
    scores = classify(layers, x.unsqueeze(1)).squeeze(-1)
    error = (scores[..., KNOWN:] * true[:, None, KNOWN:] <= 0).double().mean(-1)
    noisy = (given != true)[:, None, :KNOWN]
    learned = ((scores[..., :KNOWN] * given[:, None, :KNOWN] > 0) & noisy).sum(-1) / noisy.sum(-1)
    error, learned = (100 * part.double().view(len(seeds), len(PAIRS), -1).mean(1).T.numpy() for part in (error, learned))
    return dict(zip(settings, error, strict=True)), dict(zip(settings, learned, strict=True))


@not_reproduced(
    "tuned, the hinge loss makes as few errors, and so does one draw of a loss that is kept; only cross-entropy and the "
    "exponential loss make more, by some 0.4 to 0.6 points. The paper's networks have one learning rate for all losses"
)
@claim(
    "Where a fifth of the labels is wrong EnsLoss makes at least half a percentage point fewer errors than "
    "cross-entropy, than the exponential loss and than the hinge loss, each tuned.",
    scale="reduced",
    differs=f"{DIFFERS}; every loss tuned; half a point is ours",
    control="one draw of a loss, kept for the whole training",
    control_breaks="errors beyond those of hinge",
    paper_value="better than each on most of 45 pairs of CIFAR-10 classes, with labels as they are",
)
def test_fewer_errors_than_fixed_losses(arm, seeds, evidence):
    error, _ = study(tuple(seeds(SEEDS)))
    ours = error["tuned", "one draw" if arm.control else "EnsLoss"]
    evidence.record("errors", mean_interval(ours), unit="%")
    for kind in FIXED:
        gain = paired_difference(ours, error["tuned", kind])
        evidence.require(f"errors beyond those of {kind}", gain, below=-0.5, unit="points")


@not_reproduced(
    "one draw that is kept for the whole training does as well: what protects is a slope bounded by 1, as the hinge's is"
)
@claim(
    "Drawing the loss anew, and not its form alone, prevents overfitting: EnsLoss learns at least three percentage points fewer "
    "of the wrong labels than one draw that is kept, untuned, and makes at least half a point fewer errors, tuned.",
    scale="reduced",
    differs=f"{DIFFERS}; the paper draws no loss that is kept; margins are ours",
    control="the kept draw on both sides",
    control_breaks=("wrong labels learned beyond one draw's", "errors beyond those of one draw"),
    paper_value="the ensemble acts as dropout does, over losses (section 3)",
)
def test_drawing_anew_prevents_overfitting(arm, seeds, evidence):
    error, learned = study(tuple(seeds(SEEDS)))
    kind = "one draw" if arm.control else "EnsLoss"
    more = paired_difference(learned["untuned", kind], learned["untuned", "one draw"])
    evidence.require("wrong labels learned beyond one draw's", more, below=-3.0, unit="points")
    gain = paired_difference(error["tuned", kind], error["tuned", "one draw"])
    evidence.require("errors beyond those of one draw", gain, below=-0.5, unit="points")


@claim(
    "In the same training, tuned for none, EnsLoss learns at least four percentage points fewer of the wrong labels than "
    "cross-entropy, and makes fewer errors.",
    scale="reduced",
    differs=f"{DIFFERS}; margins are ours",
    control="a fixed loss, the exponential, in its place",
    control_breaks=("wrong labels learned beyond cross-entropy's", "errors beyond those of cross-entropy"),
    central=False,
    paper_value="less of a gap between training and test accuracy",
)
def test_overfits_less_than_cross_entropy(arm, seeds, evidence):
    error, learned = study(tuple(seeds(SEEDS)))
    for kind in LOSSES:
        evidence.record(f"wrong labels learned by {kind}", mean_interval(learned["untuned", kind]), unit="%")
    kind = "exponential" if arm.control else "EnsLoss"
    more = paired_difference(learned["untuned", kind], learned["untuned", "cross-entropy"])
    evidence.require("wrong labels learned beyond cross-entropy's", more, below=-4.0, unit="points")
    gain = paired_difference(error["untuned", kind], error["untuned", "cross-entropy"])
    evidence.require("errors beyond those of cross-entropy", gain, below=0, unit="points")


@claim(
    "EnsLoss is consistent: where the score of every cell is free, 10,000 points bring its error to less than half a percentage "
    "point above that of the Bayes rule.",
    scale="mechanism",
    differs="20 cells, each with its own chance of a label, for the theorem's general case; half a point is ours",
    control="1 added to every derivative: convex still, but phi'(0) > 0, so not calibrated",
    control_breaks="error above the Bayes rule's",
    paper_value="consistent for the Bayes rule (theorem 6)",
)
def test_consistent(arm, seeds, evidence):
    seeds = seeds(32)
    shift = 1.0 + 2e-6 if arm.control else 0.0
    few, many = (excess_risk(seeds, n, shift) for n in (100, 10_000))
    evidence.record("error above the Bayes rule's, 100 points", median_interval(few), unit="points")
    evidence.require("error above the Bayes rule's", median_interval(many), below=0.5, unit="points")


def excess_risk(seeds, n, shift, cells=20, steps=3000, batch=64):
    """Error above the Bayes rule's, in percentage points, (seeds,), of a score for every cell, learned from n points.

    P(y = 1) of a cell is at least 0.02 away from a half.
    """
    draws = Draws(seeds)
    p = 0.96 * draws(torch.rand, cells)
    p = torch.where(p < 0.48, p, p + 0.04)
    weight = 0.3 - (1 - draws(torch.rand, cells)).log()
    weight = weight / weight.sum(-1, keepdim=True)
    pairs = zip(weight, draws.generators, strict=True)
    cell = torch.stack([torch.multinomial(w, n, replacement=True, generator=generator) for w, generator in pairs])
    label = 2.0 * (draws(torch.rand, n) < p.gather(1, cell)) - 1
    score = torch.zeros(len(seeds), cells)
    for step in range(steps):
        if step % PERIOD == 0:
            lam = 2 * draws(torch.rand, 1) - 1
        rows = draws(torch.randint, n, (batch,))
        where, y = cell.gather(1, rows), label.gather(1, rows)
        g = calibrated_derivatives(score.gather(1, where) * y, draws(torch.randn, batch), lam) + shift
        gradient = torch.zeros_like(score).scatter_add_(1, where, g * y) / batch
        score -= 10 * (1 - step / steps) * gradient
    wrong = (score > 0) != (p > 0.5)
    return (100 * (weight * (2 * p - 1).abs() * wrong).sum(-1)).double().numpy()
