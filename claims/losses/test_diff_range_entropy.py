"""Differentiable Entropy Regularization for Geometry and Neural Networks (Shihab, Akter, Sharma, 2025, arXiv 2509.03733).

Geometry: sets of 100 points, uniform in a square; eight anchors are their k-means. An EntropyNet is trained on 16 sets (150 steps
of Adam at 0.01 on four sets each, alpha = 20) and applied to eight others. Work is the number of orientation tests of quickhull,
which does less of them the more points lie within few triangles; its result is compared with the hull of the points as they were.

Attention: digits of 8 x 8 pixels as 16 patches, transformers of two layers and width 16, 200 steps of Adam at 0.01 on batches of
32. At the end only the three largest scores of a row are kept, so that 81 % of them are dropped. The weights of the penalties
(from 0.003 to 0.3 for the entropy, 0.001 to 1 for L1) had the best accuracy then, on other seeds, after 400 steps.
"""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F

from paperclaims.fixtures.data.tabular import digits
from paperclaims.fixtures.models.classifiers import Draws
from paperclaims.fixtures.protocol import claim, not_reproduced
from paperclaims.fixtures.statistics import mean_interval, paired_difference, ratio_interval
from paperclaims.impl.losses.diff_range_entropy import (
    EntropyNet,
    assignment_bound,
    attention_entropy,
    cell_entropy,
    cell_masses,
    margin,
    soft_masses,
)

TOKENS, WIDTH, KEPT, STEPS = 16, 16, 3, 200
PENALTIES = {"entropy": 0.03, "L1": 0.001, "entropy raised": -0.03}


def separated_points(rng, sets, n=200, k=8, least=0.05):
    """Points (sets, n, 2) and anchors (sets, k, 2), uniform where second and first squared distance differ by `least`."""
    anchors, points = (torch.from_numpy(rng.random((sets, count, 2))) for count in (k, 20 * n))
    kept = (margins(points, anchors) > least).int().argsort(dim=1, descending=True, stable=True)[:, :n]
    return points.gather(1, kept.unsqueeze(-1).expand(-1, -1, 2)), anchors


def margins(points, anchors):
    nearest = (points.unsqueeze(2) - anchors.unsqueeze(1)).square().sum(-1).topk(2, -1, largest=False).values
    return nearest[..., 1] - nearest[..., 0]


def halfway(points, anchors):
    """Points in the middle between their two nearest anchors."""
    pair = (points.unsqueeze(2) - anchors.unsqueeze(1)).square().sum(-1).topk(2, -1, largest=False).indices
    two = anchors.unsqueeze(1).expand(-1, points.shape[1], -1, -1).gather(2, pair.unsqueeze(-1).expand(-1, -1, -1, 2))
    return two.mean(2)


@claim(
    "The surrogate tends to the entropy of the hard cells: soft masses lie within (k - 1) exp(-alpha gamma) of the hard ones, "
    "and the distance falls as fast with alpha.",
    scale="paper",
    control="one point in ten lies halfway between its two nearest anchors; gamma is that of the others",
    control_breaks=(
        "largest error of a mass over its bound",
        "least slope of the logarithm of the error, over -gamma",
        "largest error of the entropy at the sharpest",
    ),
    paper_value="the bound is the paper's theorem",
)
def test_surrogate_tends_to_the_hard_cells(arm, rng, evidence):
    points, anchors = separated_points(rng, 100)
    gamma = margin(points, anchors)
    if arm.control:
        points = torch.cat([halfway(points[:, :20], anchors), points[:, 20:]], 1)
    sharpness = torch.linspace(5.0, 20.0, 6, dtype=torch.float64)  # alpha gamma; the bound is 0.047 at the first
    errors, entropies = [], []
    for value in sharpness:
        alphas = (value / gamma).tolist()
        soft = torch.stack([soft_masses(x, c, alpha) for x, c, alpha in zip(points, anchors, alphas, strict=True)])
        errors.append((soft - cell_masses(points, anchors)).abs().amax(-1))
        entropies.append((torch.special.entr(soft).sum(-1) - cell_entropy(points, anchors)).abs().max().item())
    errors = torch.stack(errors)
    bound = assignment_bound(1.0, sharpness, anchors.shape[1]).unsqueeze(1)
    slope = (errors[-1].clamp(min=1e-300).log() - errors[0].log()) / (sharpness[0] - sharpness[-1])
    evidence.curve("largest error of the entropy", sharpness.tolist(), entropies, x_label="alpha gamma", y_label="nats", log="y")
    evidence.require("largest error of a mass over its bound", (errors / bound).max().item(), below=1.0)
    evidence.require("least slope of the logarithm of the error, over -gamma", slope.min().item(), above=0.9)
    evidence.require("largest error of the entropy at the sharpest", entropies[-1], below=1e-4, unit="nats")


def quickhull(points):
    """Area of the convex hull of points (n, 2), and how many times a point was held against a line."""
    tests = 0

    def beyond(a, b, candidates):
        nonlocal tests
        tests += len(candidates)
        sides = (b[0] - a[0]) * (candidates[:, 1] - a[1]) - (b[1] - a[1]) * (candidates[:, 0] - a[0])
        outside = candidates[sides > 1e-12]
        if not len(outside):
            return []
        farthest = candidates[sides.argmax()]
        return [*beyond(a, farthest, outside), farthest, *beyond(farthest, b, outside)]

    left, right = points[points[:, 0].argmin()], points[points[:, 0].argmax()]
    x, y = np.array([left, *beyond(left, right, points), right, *beyond(right, left, points)]).T
    return abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2, tests


@functools.cache
def reshaped(seed, weight):
    """Of new sets: entropy of the cells before and after, tests before over after, and relative error of the hull's area."""
    from scipy.cluster.vq import kmeans2

    generator = torch.Generator().manual_seed(seed)
    train, new = (torch.rand(count, 100, 2, generator=generator) for count in (16, 8))
    anchors = torch.from_numpy(kmeans2(train.flatten(0, 1).numpy(), 8, iter=30, minit="points", seed=seed)[0])
    net = EntropyNet(2, generator=generator)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        net.objective(train[torch.randint(16, (4,), generator=generator)], anchors, 20.0, weight).mean().backward()
        optimizer.step()
    with torch.no_grad():
        moved = net(new)
    (area, tests), (area_moved, tests_moved) = (
        np.array([quickhull(part.double().numpy()) for part in points]).T for points in (new, moved)
    )
    entropies = (cell_entropy(points, anchors).mean().item() for points in (new, moved))
    return *entropies, tests.sum() / tests_moved.sum(), (abs(area_moved - area) / area).mean()


@claim(
    "The surrogate can be trained: at a weight of 0.3 an EntropyNet moves new points so that the entropy of their hard cells "
    "falls by at least one nat.",
    scale="reduced",
    differs="networks and sets of ours; one nat of the 2.1 there are is ours",
    control="weight 0, the distance from the points as they were alone",
    control_breaks="entropy of the cells lost",
)
def test_surrogate_can_be_trained(arm, seeds, evidence):
    before, after, _, errors = np.array([reshaped(seed, 0.0 if arm.control else 0.3) for seed in seeds(8)]).T
    evidence.record("error of the hull's area", 100 * errors.mean(), unit="%")
    evidence.require("entropy of the cells lost", paired_difference(before, after), above=1.0, unit="nats")


@not_reproduced(
    "one weight leaves the points where they are, the other draws them together and changes the hull's area by most of it, and "
    "at neither does quickhull do less; to move a point takes two thousand operations where a test takes five"
)
@claim(
    "Moved so that the area of the hull changes by at most 0.2 %, points take a third fewer tests of orientation in quickhull.",
    scale="reduced",
    differs="quickhull, uniform points and networks of ours; tests in place of time; the cost of moving the points not counted",
    control="weight 0",
    control_breaks="tests before over tests after",
    paper_value="up to 4.1 times faster at an error below 0.2 %",
)
def test_hulls_become_cheaper(arm, seeds, evidence):
    gains, errors = [], []
    for seed in seeds(8):
        tried = [reshaped(seed, weight) for weight in ((0.0,) if arm.control else (0.03, 0.3))]
        gains.append(max([gain for *_, gain, error in tried if error <= 0.002], default=1.0))
        errors.append(100 * tried[-1][-1])
    evidence.record("error of the hull's area at the largest weight", float(np.mean(errors)), unit="%")
    evidence.require("tests before over tests after", ratio_interval(gains, np.ones(8)), above=1.5)


def split_digits(seeds):
    """Patches (seeds, n, 16, 4) and labels of 1197 digits to train on and 600 to test on, a split a seed."""
    table = digits()
    order = Draws(seeds)(torch.randperm, len(table.y))
    x = torch.tensor(table.x, dtype=torch.float32).view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, TOKENS, 4)[order] / 8 - 1
    y = torch.tensor(table.y)[order]
    return x[:, :1197], y[:, :1197], x[:, 1197:], y[:, 1197:]


def start(draws):
    """Parameters of the transformers, each with the seeds in front: patches, places, two layers of four, and the head."""
    shapes = [((4, WIDTH), 0.5), ((TOKENS, WIDTH), 0.3)]
    for _ in range(2):
        shapes += [((WIDTH, 3 * WIDTH), WIDTH**-0.5), ((WIDTH, WIDTH), WIDTH**-0.5)]
        shapes += [((WIDTH, 2 * WIDTH), (2 / WIDTH) ** 0.5), ((2 * WIDTH, WIDTH), (2 * WIDTH) ** -0.5)]
    return [draws(torch.randn, *shape) * size for shape, size in [*shapes, ((WIDTH, 10), WIDTH**-0.5)]]


def transformer(parameters, x, sparse=False):
    """Logits (..., n, 10), and every layer's scores and weights (..., n, 16, 16), of patches (..., n, 16, 4)."""
    embed, place, *layers, head = (part.unsqueeze(-3) for part in parameters)
    tokens, scores, weights = x @ embed + place, [], []
    for qkv, out, up, down in zip(*(layers[part::4] for part in range(4)), strict=True):
        q, k, v = (F.layer_norm(tokens, (WIDTH,)) @ qkv).chunk(3, -1)
        score = q @ k.mT * WIDTH**-0.5
        if sparse:
            score = score.where(score >= score.topk(KEPT, -1).values[..., -1:], -math.inf)
        weight = score.softmax(-1)
        scores.append(score)
        weights.append(weight)
        tokens = tokens + weight @ v @ out
        tokens = tokens + (F.layer_norm(tokens, (WIDTH,)) @ up).relu() @ down
    return F.layer_norm(tokens, (WIDTH,)).mean(-2) @ head.squeeze(-3), scores, weights


@functools.cache
def trained(seeds):
    """Accuracy in per cent, of all scores and of the kept ones, by penalty: (seeds,) each."""
    x, y, x_new, y_new = split_digits(seeds)
    draws, count = Draws([seed + 1 for seed in seeds]), len(PENALTIES)
    parameters = [part.unsqueeze(1).repeat(1, count, 1, 1).requires_grad_() for part in start(draws)]
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / STEPS)) / 2)
    weight = {kind: torch.tensor([w if kind in name else 0.0 for name, w in PENALTIES.items()]) for kind in ("entropy", "L1")}

    def expanded(points):
        return points.unsqueeze(1).expand(-1, count, *[-1] * (points.ndim - 1))

    for _ in range(STEPS):
        rows = draws(torch.randint, x.shape[1], (32,))
        points, labels = x.gather(1, rows[:, :, None, None].expand(-1, -1, TOKENS, 4)), y.gather(1, rows)
        logits, scores, weights = transformer(parameters, expanded(points))
        labels = expanded(labels)
        entropy = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction="none").view(labels.shape).mean(-1)
        spread = sum(attention_entropy(part).mean(-1) for part in weights)
        size = sum(part.abs().mean((2, 3, 4)) for part in scores)
        optimizer.zero_grad()
        (entropy + weight["entropy"] * spread + weight["L1"] * size).sum().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        logits = [transformer(parameters, expanded(x_new), sparse)[0] for sparse in (False, True)]
    right = [100 * (part.argmax(-1) == y_new.unsqueeze(1)).double().mean(-1).T.numpy() for part in logits]
    return tuple(dict(zip(PENALTIES, part, strict=True)) for part in right)


@not_reproduced(
    "tuned, the entropy gains about a point over L1, whose best weight was the smallest tried, nearly none, as it pulls all "
    "scores together; larger ones did worse on other seeds, by any margin"
)
@claim(
    "With 81 % of the scores dropped, attention trained with the entropy penalty is at least six percentage points more "
    "accurate than with a tuned L1 penalty.",
    scale="reduced",
    differs="a small transformer on digits; L1 acts on the scores before the softmax, as rows of weights sum to one",
    control="the entropy raised in place of lowered",
    control_breaks="accuracy gained over L1",
    paper_value="6 % higher accuracy at 80 % sparsity",
)
def test_sparse_attention_is_more_accurate(arm, seeds, evidence):
    full, sparse = trained(tuple(seeds(22)))
    for name in PENALTIES:
        evidence.record(f"accuracy of all scores, {name}", mean_interval(full[name]), unit="%")
        evidence.record(f"accuracy of the kept scores, {name}", mean_interval(sparse[name]), unit="%")
    gained = paired_difference(sparse["entropy raised" if arm.control else "entropy"], sparse["L1"])
    evidence.require("accuracy gained over L1", gained, above=6.0, unit="points")
