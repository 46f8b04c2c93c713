"""Weight Compander: A Simple Weight Reparameterization for Regularization (Cakaj, Mehnert, Yang, 2023, arXiv 2306.16993).

MNIST-1D, 500 points to train on, a fifth of their labels drawn at random, and the other 4,500 to test on; perceptrons with two
hidden layers of 100 units, 300 steps of Adam on batches of 64, a decoupled weight decay (times the learning rate). Every method
starts from the same weights. Learning rate (from 0.003, 0.01, 0.03 and 0.1) and decay (from 0, 1, 2, 4, 8, 12, 36 and 100) were
chosen for each by its accuracy on other seeds; so were reach (from 1.2, 1.5, 2 and 3) and slope (from 0.75, 1, 1.5 and 3), of
which, at decays of 2, 4 and 8, none gained more than 0.1 points over plain weights on 24 of them.
"""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from paperclaims.fixtures.data.mnist1d import mnist1d
from paperclaims.fixtures.models.classifiers import Draws, classify
from paperclaims.fixtures.protocol import claim, not_reproduced
from paperclaims.fixtures.statistics import mean_interval, paired_difference
from paperclaims.impl.losses.weight_compander import compand, expand, near_zero_share, participation

SIZES, KNOWN, NOISE, STEPS, BATCH = (40, 100, 100, 10), 500, 0.2, 300, 64
LR, REACH, SLOPE = 0.03, 1.5, 1.5
DECAY = {"plain": 4.0, "linear": 4.0, "companded": 4.0, "learned": 8.0}
DIFFERS = (
    "small perceptrons on MNIST-1D for residual networks on images; weight decay for all standard regularisers; the form of the "
    "function is reconstructed"
)


def problem(draws):
    """Points and labels to train on, (seeds, KNOWN, 40) and (seeds, KNOWN), and to test on."""
    train, test = mnist1d()
    x, y = (torch.tensor(np.concatenate(parts)) for parts in zip(train, test, strict=True))
    order = draws(torch.randperm, len(y))
    x, y = x.float()[order], y[order]
    noisy = torch.where(draws(torch.rand, KNOWN) < NOISE, draws(torch.randint, 10, (KNOWN,)), y[:, :KNOWN])
    return x[:, :KNOWN], noisy, x[:, KNOWN:], y[:, KNOWN:]


def start(method, draws):
    """Parameters v (seeds, in, out), bias, log a and log b of every layer, from which all methods compute the same weights."""
    layers = []
    for i, o in itertools.pairwise(SIZES):
        size = (2 / i) ** 0.5
        w, a = (2 * draws(torch.rand, i, o) - 1) * 3**0.5 * size, REACH * size
        v = {"plain": w, "linear": w / SLOPE}.get(method)
        v = expand(w, a, a / SLOPE) if v is None else v
        scales = (torch.full((len(w), 1, 1), math.log(value)) for value in (a, a / SLOPE))
        layers.append([v, torch.zeros(len(w), 1, o), *scales])
    return layers


def effective(method, layers):
    """Weights (seeds, in, out) and biases that the network computes with."""
    if method in ("plain", "linear"):
        return [((SLOPE if method == "linear" else 1) * v, bias) for v, bias, *_ in layers]
    return [(compand(v, log_a.exp(), log_b.exp()), bias) for v, bias, log_a, log_b in layers]


@functools.cache
def trained(method, decay, seeds):
    """Test accuracy in per cent, share of weights near zero in per cent, and participation, means over the hidden layers."""
    draws = Draws(seeds)
    x, y, x_test, y_test = problem(draws)
    layers = start(method, draws)
    weights = [layer[0].requires_grad_() for layer in layers]
    others = [part.requires_grad_() for layer in layers for part in layer[1 : 4 if method == "learned" else 2]]
    groups = [{"params": weights, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 + math.cos(math.pi * step / STEPS)) / 2
        rows = draws(torch.randint, KNOWN, (BATCH,))
        logits = classify(effective(method, layers), x.gather(1, rows.unsqueeze(-1).expand(-1, -1, SIZES[0])))
        optimizer.zero_grad()
        (F.cross_entropy(logits.flatten(0, 1), y.gather(1, rows).flatten(), reduction="sum") / BATCH).backward()
        optimizer.step()
    with torch.no_grad():
        found = effective(method, layers)
        right = 100 * (classify(found, x_test).argmax(-1) == y_test).double().mean(-1)
        hidden = [w.double() for w, _ in found[:-1]]
        zero, part = (torch.stack([form(w, (1, 2)) for w in hidden]).mean(0) for form in (near_zero_share, participation))
    return right.numpy(), 100 * zero.numpy(), part.numpy()


@not_reproduced(
    "with the decay tuned for both, companded weights are as accurate as plain ones within a point, and learned scales a point "
    "worse; small noisy sets and perceptrons instead of deep networks on images"
)
@claim(
    "Companded weights generalise better than plain ones with the same regulariser, tuned for both: by more than a point.",
    scale="reduced",
    differs=DIFFERS,
    control="the function is linear with the slope that it has at zero: nothing saturates",
    paper_value="improves networks in addition to standard regularisation (abstract)",
)
@pytest.mark.parametrize("scales", ["companded", "learned"])
def test_generalises_better(arm, scales, seeds, evidence):
    seeds, method = tuple(seeds(32)), "linear" if arm.control else scales
    (ours, zero, part), (baseline, zero_plain, part_plain) = (trained(m, DECAY[m], seeds) for m in (method, "plain"))
    evidence.record("accuracy of plain weights", mean_interval(baseline), "%")
    evidence.record("weights near zero less those of plain ones, under decay", paired_difference(zero, zero_plain), "points")
    evidence.record("participation less that of plain ones, under decay", paired_difference(part, part_plain))
    evidence.require("accuracy gained", paired_difference(ours, baseline), above=1, unit="points")


@claim(
    "Without another regulariser companding keeps weights away from zero and shares the decision among more of them: at least 3 "
    "points fewer lie within a tenth of their root mean square, and a share larger by at least 0.1 takes part.",
    scale="reduced",
    differs=f"{DIFFERS}; thresholds are ours",
    control="the function is linear with the slope that it has at zero: nothing saturates",
    control_breaks=("weights near zero, fewer", "participation gained"),
    paper_value="forces weights away from zero, restricts their magnitude (abstract)",
)
def test_more_weights_take_part(arm, seeds, evidence):
    seeds, method = tuple(seeds(12)), "linear" if arm.control else "companded"
    (right, zero, part), (right_plain, zero_plain, part_plain) = (trained(m, 0.0, seeds) for m in (method, "plain"))
    evidence.record("weights near zero, plain", mean_interval(zero_plain), "%")
    evidence.record("participation, plain", mean_interval(part_plain))
    evidence.record("accuracy gained without another regulariser", paired_difference(right, right_plain), "points")
    evidence.require("weights near zero, fewer", paired_difference(zero_plain, zero), above=3, unit="points")
    evidence.require("participation gained", paired_difference(part, part_plain), above=0.1)
