"""Multi-Sample Dropout for Accelerated Training and Better Generalization (Inoue, 2019, arXiv 1905.09788).

Digits of 8 x 8 pixels, 600 to train on and 1,197 to score; perceptrons with 128 hidden units, whose activations are dropped
before the last layer; 400 steps of gradient descent on batches of 32, one seed one start and one order of batches for all. An
"iteration" is an update of the weights; the training is over at the first of every tenth where the cross-entropy of all training
points, without masks, is at most 0.05. For every method and rate of dropout the learning rate (from 0.1, 0.2, 0.4, 0.8, 1 and
1.2) is the one that got there first on other seeds, and so is the rate itself (from 0.1, 0.3, 0.5 and 0.7) where it is called
tuned.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from paperclaims.fixtures.data.tabular import digits
from paperclaims.fixtures.models.classifiers import Draws
from paperclaims.fixtures.models.convnets import resnet50, vgg16
from paperclaims.fixtures.protocol import claim, not_reproduced
from paperclaims.fixtures.statistics import mean_interval, paired_difference, ratio_interval
from paperclaims.impl.losses.multi_sample_dropout import dropout_samples, mean_loss

KNOWN, HIDDEN, STEPS, BATCH, EVERY, TARGET, SEEDS = 600, 128, 400, 32, 10, 0.05, 32
DIFFERS = "digits of 8 x 8 pixels and a small perceptron for CIFAR, ImageNet and convolutional networks"


class Method(NamedTuple):
    """Masks of a step, rate of dropout, learning rate, and whether all masks are one."""

    samples: int
    p: float
    lr: float
    same: bool = False


ONE, EIGHT, COPIES = Method(1, 0.5, 0.8), Method(8, 0.5, 1.0), Method(8, 0.5, 0.8, same=True)
ONE_TUNED, EIGHT_TUNED = Method(1, 0.1, 1.0), Method(8, 0.1, 1.0)
METHODS = (ONE, EIGHT, COPIES, ONE_TUNED, EIGHT_TUNED)


def hidden(parts, x):
    """Activations (seeds, n, 128) of points (seeds, n, 64)."""
    return (x @ parts[0] + parts[1]).relu()


def head(parts, h):
    """Logits (..., seeds, n, 10) of activations (..., seeds, n, 128)."""
    return h @ parts[2] + parts[3]


@functools.cache
def trained(seeds):
    """Iterations until the target (all, where it was not reached), and errors at the end in per cent: by method, (seeds,)."""
    table, draws, generator = digits(), Draws(seeds), torch.Generator().manual_seed(seeds[0])
    x, y = torch.tensor(table.x).float() / 16, torch.tensor(table.y)
    order = draws(torch.randperm, len(y))
    x, y = x[order], y[order]
    first, last = draws(torch.randn, 64, HIDDEN) * (2 / 64) ** 0.5, draws(torch.randn, HIDDEN, 10) * HIDDEN**-0.5
    start = [first, torch.zeros(len(first), 1, HIDDEN), last, torch.zeros(len(last), 1, 10)]
    networks = {method: [part.clone().requires_grad_() for part in start] for method in METHODS}
    iterations = {method: torch.full((len(seeds),), STEPS) for method in METHODS}

    def entropy(scores, labels):
        """Mean cross-entropy over points, (seeds,)."""
        return F.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).mean(1)

    for step in range(1, STEPS + 1):
        rows = draws(torch.randint, KNOWN, (BATCH,))
        points, labels = x.gather(1, rows.unsqueeze(-1).expand(-1, -1, 64)), y.gather(1, rows)
        for (samples, p, lr, same), parts in networks.items():
            masked = dropout_samples(hidden(parts, points), p, 1 if same else samples, generator=generator)
            outputs = head(parts, masked.expand(samples, -1, -1, -1))
            loss = mean_loss(lambda scores, targets: entropy(scores, targets).sum(), outputs, labels)
            for part, slope in zip(parts, torch.autograd.grad(loss, parts), strict=True):
                part.data -= lr * slope
        if step % EVERY == 0:
            for method, parts in networks.items():
                with torch.no_grad():
                    there = entropy(head(parts, hidden(parts, x[:, :KNOWN])), y[:, :KNOWN]) <= TARGET
                iterations[method] = torch.where(there, iterations[method].clamp(max=step), iterations[method])
    with torch.no_grad():
        scores = {method: head(parts, hidden(parts, x[:, KNOWN:])) for method, parts in networks.items()}
    errors = {method: 100 * (part.argmax(-1) != y[:, KNOWN:]).double().mean(1).numpy() for method, part in scores.items()}
    return {method: part.double().numpy() for method, part in iterations.items()}, errors


def record(evidence, seeds):
    iterations, errors = trained(seeds)
    for samples, p, lr, same in METHODS:
        name = f"{samples} {'copies of one mask' if same else 'masks'}, rate {p}"
        method = Method(samples, p, lr, same)
        evidence.record(f"iterations, {name}", np.median(iterations[method]))
        evidence.record(f"errors, {name}", mean_interval(errors[method]), unit="%")
    return iterations, errors


@claim(
    "At the usual rate of one half, eight masks take at most four fifths of the iterations of ordinary dropout to the same "
    "training loss.",
    scale="reduced",
    differs=f"{DIFFERS}; four fifths are ours",
    control="eight copies of one mask",
    control_breaks="iterations over those of ordinary dropout",
    paper_value="fewer epochs on ImageNet and CIFAR (figures 3 and 4)",
)
def test_fewer_iterations(arm, seeds, evidence):
    iterations, _ = record(evidence, tuple(seeds(SEEDS)))
    ratio = ratio_interval(iterations[COPIES if arm.control else EIGHT], iterations[ONE])
    evidence.require("iterations over those of ordinary dropout", ratio, below=0.8)


@claim(
    "At the usual rate of one half, eight masks make fewer errors than ordinary dropout after as many iterations.",
    scale="reduced",
    differs=DIFFERS,
    control="ordinary dropout on both sides",
    control_breaks="errors beyond those of ordinary dropout",
    paper_value="lower errors on CIFAR-10, CIFAR-100 and SVHN (table 1)",
)
def test_fewer_errors(arm, seeds, evidence):
    _, errors = record(evidence, tuple(seeds(SEEDS)))
    beyond = paired_difference(errors[ONE if arm.control else EIGHT], errors[ONE])
    evidence.require("errors beyond those of ordinary dropout", beyond, below=-0.1, unit="points")


@not_reproduced(
    "what slows ordinary dropout at a rate of one half is the noise of its mask, and a smaller rate is rid of most of it, too, "
    "at the cost of one mask; the paper keeps its rates"
)
@claim(
    "The gain is none that a better rate would give: with the rate tuned for either, eight masks take at most four fifths of the "
    "iterations of ordinary dropout.",
    scale="reduced",
    differs=f"{DIFFERS}; the paper tunes no rate; four fifths are ours",
    control="ordinary dropout on both sides",
    control_breaks="iterations over those of ordinary dropout, rates tuned",
)
def test_fewer_iterations_with_the_rate_tuned(arm, seeds, evidence):
    iterations, _ = record(evidence, tuple(seeds(SEEDS)))
    ratio = ratio_interval(iterations[ONE_TUNED if arm.control else EIGHT_TUNED], iterations[ONE_TUNED])
    evidence.require("iterations over those of ordinary dropout, rates tuned", ratio, below=0.8)


@claim(
    "In deep convolutional networks eight masks cost almost nothing: less than 1 % more arithmetic for ResNet-50, whose last "
    "layer alone is repeated, and for VGG-16 less than 6 % with all three linear layers and less than 1 % with two repeated.",
    scale="paper",
    control="the whole network repeated for every mask",
    control_breaks=(
        "arithmetic added, ResNet-50",
        "arithmetic added, VGG-16, three layers",
        "arithmetic added, VGG-16, two layers",
    ),
    paper_value="not significant, as most time goes to the convolutions (section 2)",
)
def test_costs_little_in_deep_networks(arm, evidence):
    for name, layers, repeated, most in (
        ("ResNet-50", resnet50(), 1, 0.01),
        ("VGG-16, three layers", vgg16(), 3, 0.06),
        ("VGG-16, two layers", vgg16(), 2, 0.01),
    ):
        macs = [layer.macs for layer in layers]
        added = 7 * sum(macs if arm.control else macs[-repeated:]) / sum(macs)
        evidence.require(f"arithmetic added, {name}", added, below=most)
