"""LegendreTron: Uprising Proper Multiclass Loss Learning (Lam, Walder, Penev, Nock, 2023, arXiv 2301.11695).

Two handwritten digits side by side are one of 100 classes: 3000 pairs of 1200 digits to train on, 1000 pairs of the other 597 to
test on, with a linear model of the 128 pixels. As in the paper link and model are trained together by Adam, and the baseline is
multinomial logistic regression.
"""

import functools
import math

import pytest
import torch

from paperclaims.fixtures.data.tabular import digits
from paperclaims.fixtures.models.classifiers import Draws
from paperclaims.fixtures.protocol import claim, not_reproduced
from paperclaims.fixtures.statistics import paired_difference
from paperclaims.impl.losses.legendretron import LegendreLink, inverse_link_jacobian, log_softmax_plus

STEPS, BATCH = 400, 64


@functools.cache
def pairs(seeds):
    """Pixels (seeds, n, 128) in [-1, 1] and classes (seeds, n) of training and test pairs."""
    table, draws = digits(), Draws(seeds)
    x, y = torch.tensor(table.x, dtype=torch.float32) / 8 - 1, torch.tensor(table.y)
    order = draws(torch.randperm, len(y))
    parts = []
    for pool, n in ((order[:, :1200], 3000), (order[:, 1200:], 1000)):
        left, right = (pool.gather(1, draws(torch.randint, pool.shape[1], (n,))) for _ in range(2))
        parts += [torch.cat([x[left], x[right]], -1), 10 * y[left] + y[right]]
    return parts


@functools.cache
def trained(method, lr, decay, seeds):
    """Per cent right and log-loss of test pairs, (seeds,) each; all seeds in one stack."""
    x, y, x_test, y_test = pairs(seeds)
    draws = Draws(seeds)
    weight = (draws(torch.randn, (128, 99)) * 128**-0.5).requires_grad_()
    bias = torch.zeros(len(seeds), 1, 99, requires_grad=True)
    link = LegendreLink(100, blocks=0)
    log_scale = torch.zeros(len(seeds), 1, 1, requires_grad=True)
    if method in ("LegendreTron", "frozen link"):
        link = LegendreLink(100, copies=(len(seeds),), generator=torch.Generator().manual_seed(seeds[0]))
        with torch.no_grad():
            link.normalise(x[:, :BATCH] @ weight + bias)
        link.requires_grad_(method == "LegendreTron")
    learned = [weight, bias, *(part for part in link.parameters() if part.requires_grad)]
    learned += [log_scale] if method == "learned scale" else []
    optimizer = torch.optim.Adam(learned, weight_decay=decay)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / STEPS)) / 2
        rows = draws(torch.randint, y.shape[1], (BATCH,))
        log_p = link(log_scale.exp() * (x.gather(1, rows.unsqueeze(-1).expand(-1, -1, 128)) @ weight + bias))
        loss = -log_p.gather(-1, y.gather(1, rows).unsqueeze(-1)).mean((1, 2)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        log_p = link(log_scale.exp() * (x_test @ weight + bias))
    assert log_p.isfinite().all(), f"{method} has diverged"
    right = 100 * (log_p.argmax(-1) == y_test).double().mean(-1)
    return right.numpy(), -log_p.gather(-1, y_test.unsqueeze(-1)).double().mean((1, 2)).numpy()


# Learning rate and L2 of the paper's code, and what was best on other seeds among 0.003 to 0.1 and 0 to 0.01, 9 to 16 trials each
CODE = (0.01, 0.01)
TUNED = {"LegendreTron": (0.01, 0.01), "frozen link": (0.1, 0.0), "logistic": (0.03, 0.001)}
DIFFERS = "pairs of 8 x 8 digits for letter, aloi, sector and news20, and 400 steps for 240 epochs"
PAPER = "better at 99 % significance on all data sets of more than 10 classes (abstract)"


def gain(found, rival, evidence):
    evidence.record("accuracy", found[0].mean(), unit="%")
    evidence.record("accuracy of logistic regression", rival[0].mean(), unit="%")
    evidence.record("log-loss gained", paired_difference(rival[1], found[1], "median"))
    return paired_difference(found[0], rival[0], "median")


@claim(
    "With 100 classes, and learning rate and L2 of the paper's code for both, learning the link gains over two points of "
    "accuracy on multinomial logistic regression; so does a learned scale of the scores alone.",
    scale="reduced",
    differs=DIFFERS,
    central=False,
    control="the link stays the identity before softmax+, which is the baseline",
    paper_value=PAPER,
)
def test_beats_logistic_regression(arm, seeds, evidence):
    seeds = tuple(seeds(12))
    found, rival = (trained(method, *CODE, seeds) for method in ("logistic" if arm.control else "LegendreTron", "logistic"))
    evidence.require("accuracy gained", gain(found, rival, evidence), above=2.0, unit="points")
    if not arm.control:
        scaled = paired_difference(trained("learned scale", *CODE, seeds)[0], rival[0], "median")
        evidence.record("accuracy gained by a learned scale of the scores alone", scaled, unit="points")


@not_reproduced(
    "the L2 of 0.01 in the paper's code holds back logistic regression alone, as a link can undo it by its scale: with a tuned "
    "L2 logistic regression is as accurate"
)
@claim(
    "With 100 classes, and learning rate and L2 tuned for each, learning the link gains over two points of accuracy on "
    "multinomial logistic regression.",
    scale="reduced",
    differs=DIFFERS,
    control="the link stays at its random start, tuned as well; architecture, scores and training are the same",
    paper_value=PAPER,
)
def test_beats_tuned_logistic_regression(arm, seeds, evidence):
    seeds, ours = tuple(seeds(12)), "frozen link" if arm.control else "LegendreTron"
    found, rival = (trained(method, *TUNED[method], seeds) for method in (ours, "logistic"))
    evidence.require("accuracy gained", gain(found, rival, evidence), above=2.0, unit="points")


def learned_link(rng, classes=4, steps=150):
    """A link of four classes in float64, trained on labels from a softmax of scores with noise, and the scores."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    link = LegendreLink(classes, copies=(8,), generator=generator, dtype=torch.float64)
    scores = 2 * torch.randn(8, 512, classes - 1, generator=generator, dtype=torch.float64)
    uniform = torch.rand(8, 512, classes, generator=generator, dtype=torch.float64)
    labels = (log_softmax_plus(scores).exp() ** 2 - 0.1 * uniform.log()).argmax(-1)
    link.normalise(scores)
    optimizer = torch.optim.Adam(link.parameters(), lr=0.02)
    for _ in range(steps):
        loss = -link(scores).gather(-1, labels.unsqueeze(-1)).mean((1, 2)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return link.requires_grad_(False), scores


@not_reproduced(
    "softmax+ after gradient maps is a composition of gradients, whose Jacobian, a product of symmetric matrices, is not "
    "symmetric; the loss is proper, as the log-loss is with every invertible link, but the link is not canonical"
)
@claim(
    "The learned inverse link is the gradient of a convex function: its Jacobian is symmetric.",
    scale="paper",
    control="scores turned by a rotation of their space before the link, which keeps it invertible",
    control_breaks="largest asymmetry over the largest entry",
)
@pytest.mark.parametrize("steps", [0, 150])
def test_learned_link_is_canonical(arm, steps, rng, evidence):
    link, scores = learned_link(rng, steps=steps)
    jacobian = inverse_link_jacobian(link, scores)
    if arm.control:
        jacobian = jacobian @ torch.linalg.qr(torch.from_numpy(rng.standard_normal((3, 3)))).Q
    asymmetry = (jacobian - jacobian.mT).abs().amax((-2, -1)) / jacobian.abs().amax((-2, -1))
    evidence.record("median asymmetry", asymmetry.median())
    evidence.record("least real part of the eigenvalues", torch.linalg.eigvals(jacobian).real.min())
    evidence.require("largest asymmetry over the largest entry", asymmetry.max().item(), below=1e-6)
