"""Norm Loss: An efficient yet effective regularization method for deep neural networks (Georgiou, Schmitt, Bäck, Chen, Lew, 2021,
arXiv 2103.06583).

MNIST-1D, 1,000 points to train on and 4,000 to score; perceptrons with two hidden layers of 64 units under batch normalisation,
every unit's weights of length 1 at the start, twenty epochs of gradient descent with momentum 0.9 on batches of 64, the learning
rate falling to zero along a cosine. Weight decay is the same penalty with the target 0. Learning rate (from 0.03, 0.05, 0.1, 0.2
and 0.4) and factor (from 0.01, 0.03, 0.1, 0.3 and 1; for weight decay from 0.006, 0.01, 0.015, 0.02 and 0.03) of both were chosen
by their accuracy on other seeds.
"""

import functools
import itertools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from paperclaims.fixtures.data.mnist1d import mnist1d
from paperclaims.fixtures.models.classifiers import Draws
from paperclaims.fixtures.models.convnets import resnet50
from paperclaims.fixtures.protocol import claim, not_reproduced
from paperclaims.fixtures.statistics import mean_interval, non_inferiority, paired_difference
from paperclaims.impl.losses.norm_loss import norm_loss_gradient

SIZES, KNOWN, EPOCHS, MOMENTUM = (40, 64, 64, 10), 1000, 20, 0.9
FACTORS = tuple(10 ** (step / 2) for step in range(-3, 4))  # about the best: three decades
BATCHES = (32, 64, 128, 256, 500)
DIFFERS = "small perceptrons on MNIST-1D for residual networks on CIFAR and ImageNet"


class Method(NamedTuple):
    """Length to which the weights of a unit are pulled, factor of the penalty, learning rate."""

    target: float
    lam: float
    lr: float


NORM, DECAY, NONE = Method(1.0, 0.1, 0.2), Method(0.0, 0.015, 0.05), Method(0.0, 0.0, 0.1)


def forward(weights, x, statistics=None):
    """Logits (..., n, 10), and mean and variance of every hidden layer, of these points or as given."""
    *hidden, last, bias = weights
    used = []
    for place, w in enumerate(hidden):
        x = x @ w
        mean, variance = statistics[place] if statistics else (x.mean(-2, keepdim=True), x.var(-2, keepdim=True, correction=0))
        used.append((mean, variance))
        x = ((x - mean) / (variance + 1e-5).sqrt()).relu()
    return x @ last + bias, used


def slope(weights, target):
    """Of the penalty, for matrices (seeds, methods, in, out) whose columns are the units; a target for each method."""
    units = weights.transpose(2, 3)
    rows = units.flatten(0, 2)
    return norm_loss_gradient(rows, target.expand(units.shape[:3]).flatten()).view_as(units).transpose(2, 3)


@functools.cache
def trained(methods, seeds, batch=64):
    """Test accuracy in per cent (seeds, methods), and lengths of the hidden units' weights (times, seeds, methods, units)."""
    draws = Draws(seeds)
    x, y = (torch.tensor(np.concatenate(parts)) for parts in zip(*mnist1d(), strict=True))
    order = draws(torch.randperm, len(y))
    x, y = x.float()[order].unsqueeze(1), y[order]
    start = [draws(torch.randn, *shape) for shape in itertools.pairwise(SIZES)]
    start = [w / w.norm(dim=1, keepdim=True) for w in start] + [torch.zeros(len(seeds), 1, SIZES[-1])]
    weights = [w.unsqueeze(1).repeat(1, len(methods), 1, 1).requires_grad_() for w in start]
    target, lam, lr = (torch.tensor(column).view(-1, 1, 1) for column in zip(*methods, strict=True))
    velocity, steps, lengths = [torch.zeros_like(w) for w in weights], EPOCHS * KNOWN // batch, []
    for step in range(steps):
        rows = draws(torch.randint, KNOWN, (batch,))
        points, labels = x.gather(2, rows[:, None, :, None].expand(-1, -1, -1, x.shape[-1])), y.gather(1, rows)
        logits, _ = forward(weights, points)
        labels = labels.unsqueeze(1).expand(logits.shape[:-1])
        loss = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction="sum") / batch
        rate = lr * (1 + math.cos(math.pi * step / steps)) / 2
        with torch.no_grad():
            for place, gradient in enumerate(torch.autograd.grad(loss, weights)):
                if place < len(SIZES) - 1:
                    gradient = gradient + lam * slope(weights[place], target.view(-1, 1))
                velocity[place].mul_(MOMENTUM).add_(gradient)
                weights[place] -= rate * velocity[place]
            lengths.append(torch.cat([w.norm(dim=-2) for w in weights[:2]], -1))
    with torch.no_grad():
        _, statistics = forward(weights, x[:, :, :KNOWN])
        logits, _ = forward(weights, x[:, :, KNOWN:], statistics)
    right = logits.argmax(-1) == y[:, None, KNOWN:]
    return (100 * right.double().mean(-1)).numpy(), torch.stack(lengths)


def drop(method, seeds):
    """Accuracy lost from the best factor, a mean over factors within a decade and a half of it, (seeds,), in points."""
    methods = tuple(method._replace(lam=method.lam * factor) for factor in FACTORS)
    accuracy, _ = trained(methods, seeds)
    return accuracy[:, FACTORS.index(1.0)] - accuracy.mean(1)


@claim(
    "Norm loss is less sensitive to its factor than weight decay: over three decades about the factor that is best for each, it "
    "loses at least half a percentage point less of its best accuracy, in the mean.",
    scale="reduced",
    differs=f"{DIFFERS}; half a point is ours",
    control="the same penalty with the target 0, which is weight decay",
    control_breaks="accuracy lost beyond weight decay's",
    paper_value="CIFAR: flat where weight decay's accuracy falls (figure of the regularisation factor)",
)
def test_less_sensitive_to_the_factor(arm, seeds, evidence):
    seeds = tuple(seeds(8))
    ours, decay = (drop(method, seeds) for method in (DECAY if arm.control else NORM, DECAY))
    evidence.record("accuracy lost by weight decay", mean_interval(decay), unit="points")
    evidence.require("accuracy lost beyond weight decay's", paired_difference(ours, decay), below=-0.5, unit="points")


@claim(
    "Norm loss is less sensitive to the size of the batches than weight decay: from 32 to 500 points, with the factor and "
    "learning rate that are best for 64, it loses at least half a percentage point less of its accuracy there, in the mean.",
    scale="reduced",
    differs=f"{DIFFERS}; half a point is ours; the same epochs for every size, learning rates kept",
    control="the same penalty with the target 0, which is weight decay",
    control_breaks="accuracy lost beyond weight decay's",
    paper_value="less sensitive to the batch size (CIFAR-10 and CIFAR-100)",
)
def test_less_sensitive_to_the_batch(arm, seeds, evidence):
    seeds = tuple(seeds(8))
    by_size = np.stack([trained((NORM, DECAY), seeds, batch)[0] for batch in BATCHES])
    for name, accuracy in zip(("norm loss", "weight decay"), by_size.mean(1).T, strict=True):
        evidence.curve("accuracy", BATCHES, accuracy, series=name, x_label="points of a batch", y_label="%", log="x")
    norm, decay = (by_size[BATCHES.index(64)] - by_size.mean(0)).T
    beyond = paired_difference(decay if arm.control else norm, decay)
    evidence.require("accuracy lost beyond weight decay's", beyond, below=-0.5, unit="points")


@not_reproduced(
    "tuned, weight decay is a percentage point or two better on this task; it shortens the weights to a third and so raises the "
    "effective step in the course of training, which a fixed length forgoes"
)
@claim(
    "Norm loss is as accurate as weight decay: it loses at most half a percentage point against it, each tuned.",
    scale="reduced",
    differs=f"{DIFFERS}; half a point is ours",
    control="no penalty, with its own learning rate",
    control_breaks="accuracy lost against weight decay",
    paper_value="competitive with weight decay, weight normalisation and others on CIFAR and ImageNet",
)
def test_as_accurate_as_weight_decay(arm, seeds, evidence):
    accuracy, _ = trained((NORM, DECAY, NONE), tuple(seeds(32)))
    norm, decay, none = accuracy.T
    for name, values in (("norm loss", norm), ("weight decay", decay), ("no penalty", none)):
        evidence.record(f"accuracy of {name}", mean_interval(values), unit="%")
    lost = non_inferiority(none if arm.control else norm, decay)
    evidence.require("accuracy lost against weight decay", lost, below=0.5, unit="points")


@claim(
    "Norm loss holds the units' weights within 0.05 of length 1, in the mean, so that the effective step, which goes with the "
    "inverse square of the length, varies less over units and time than under weight decay, by at least 0.2 of its mean.",
    scale="reduced",
    differs=f"{DIFFERS}; 0.05 and 0.2 are ours",
    control="the same penalty with the target 0, which is weight decay",
    control_breaks=("distance from length 1 at the end", "variation of the effective step beyond weight decay's"),
    paper_value="weights are steered to the oblique manifold (section III)",
)
def test_lengths_and_the_effective_step(arm, seeds, evidence):
    _, lengths = trained((NORM, DECAY, NONE), tuple(seeds(32)))
    place = 1 if arm.control else 0
    distance = (lengths[-1] - 1).abs().mean(-1).double().numpy()
    step = lengths.double() ** -2
    variation = (step.std((0, 3)) / step.mean((0, 3))).numpy()
    for name, value in zip(("norm loss", "weight decay", "no penalty"), variation.mean(0), strict=True):
        evidence.record(f"variation of the effective step, {name}", value)
    evidence.require("distance from length 1 at the end", mean_interval(distance[:, place]), below=0.05)
    beyond = paired_difference(variation[:, place], variation[:, 1])
    evidence.require("variation of the effective step beyond weight decay's", beyond, below=-0.2)


class Work(TorchDispatchMode):
    """Counts elements that go into or come out of operations: an upper bound of what arithmetic on single numbers costs."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.elements += max(part.numel() for part in (*args, out) if isinstance(part, torch.Tensor))
        return out


@claim(
    "Norm loss costs next to nothing: on ResNet-50 its gradient takes less than a thousandth of the arithmetic of a step on 128 "
    "images.",
    scale="paper",
    control="a penalty that makes the rows orthogonal, |W W' - I|^2",
    control_breaks="arithmetic of the penalty over that of a step",
    paper_value="negligible computational overhead",
)
def test_costs_nothing(arm, evidence):
    step = 128 * 3 * 2 * sum(layer.macs for layer in resnet50())  # backward is two passes as dear as forward
    work, flops = Work(), FlopCounterMode(display=False)
    with work, flops:
        for layer in resnet50():
            weight = torch.empty(layer.weight, device="meta")
            if arm.control:
                rows = weight.flatten(1)
                (rows @ rows.T - torch.eye(len(rows), device="meta")) @ rows
            else:
                norm_loss_gradient(weight)
    evidence.record("elements that operations touch, per weight", work.elements / sum(layer.parameters for layer in resnet50()))
    evidence.require(
        "arithmetic of the penalty over that of a step", (work.elements + flops.get_total_flops()) / step, below=1e-3
    )
