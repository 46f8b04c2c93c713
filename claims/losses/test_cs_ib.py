"""Cauchy-Schwarz Divergence Information Bottleneck for Regression (Yu et al., 2024, arXiv 2404.17951).

Three tables that ship with scikit-learn: diabetes; the alcohol of wines from their other measurements; the logarithm of the
largest area of cell nuclei from the means and errors of their measurements. Half of the rows train, half test, columns and
responses standardised. Every method has the same perceptrons, encoder to 16 dimensions and decoder, 500 steps of Adam on batches
of 64, and a decoupled weight decay (times the learning rate), which like beta was chosen by the error on other seeds.
"""

import functools
import math

import numpy as np
import torch

from paperclaims.fixtures.data import tabular
from paperclaims.fixtures.models.classifiers import Draws
from paperclaims.fixtures.protocol import claim, not_reproduced
from paperclaims.fixtures.statistics import mean_interval, ratio_interval
from paperclaims.impl.losses.cs_ib import conditional_cs_divergence, cs_ib_loss, cs_information

WIDTH, CODE, STEPS, BATCH, LR, ATTACK = 32, 16, 500, 64, 3e-3, 0.3


@functools.cache
def tables():
    """Inputs (n, d) and responses (n,) by name."""
    diabetes, wine, cells = tabular.diabetes(), tabular.wine(), tabular.breast_cancer()
    found = {
        "diabetes": (diabetes.x, diabetes.y),
        "wine": (wine.x[:, 1:], wine.x[:, 0]),
        "cells": (cells.x[:, :20], np.log(cells.x[:, 23])),
    }
    return {name: tuple(torch.tensor(part, dtype=torch.float32) for part in pair) for name, pair in found.items()}


def halves(name, draws):
    """Standardised inputs and responses of the training and the test rows, (seeds, n, d) and (seeds, n) each."""
    x, y = tables()[name]
    order, known = draws(torch.randperm, len(y)), len(y) // 2
    parts = []
    for part in (x, y.unsqueeze(1)):
        rows = part[order]
        mean, deviation = rows[:, :known].mean(1, keepdim=True), rows[:, :known].std(1, keepdim=True)
        rows = (rows - mean) / deviation
        parts.append((rows[:, :known], rows[:, known:]))
    (x, x_test), (y, y_test) = parts
    return x, y.squeeze(-1), x_test, y_test.squeeze(-1)


def predict(layers, x):
    """Code (seeds, n, CODE) and prediction (seeds, n) of inputs (seeds, n, d)."""
    weights, biases = layers[::2], layers[1::2]
    for place in (0, 1):
        x = torch.baddbmm(biases[place], x, weights[place]).relu()
    code = torch.baddbmm(biases[2], x, weights[2])
    hidden = torch.baddbmm(biases[3], code, weights[3]).relu()
    return code, torch.baddbmm(biases[4], hidden, weights[4]).squeeze(-1)


@functools.cache
def errors(name, method, beta, decay, seeds):
    """Root mean squared error on the test rows, as they are and under an attack by the sign of its gradient, (seeds,) each."""
    draws = Draws(seeds)
    x, y, x_test, y_test = halves(name, draws)
    layers = []
    for i, o in ((x.shape[-1], WIDTH), (WIDTH, WIDTH), (WIDTH, CODE), (CODE, WIDTH), (WIDTH, 1)):
        layers += [draws(torch.randn, (i, o)) * (2 / i) ** 0.5, torch.zeros(len(seeds), 1, o)]
    optimizer = torch.optim.AdamW([layer.requires_grad_() for layer in layers], weight_decay=decay)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = LR * (1 + math.cos(math.pi * step / STEPS)) / 2
        rows = draws(torch.randint, y.shape[1], (BATCH,))
        inputs, targets = x.gather(1, rows.unsqueeze(-1).expand(-1, -1, x.shape[-1])), y.gather(1, rows)
        code, guess = predict(layers, inputs)
        loss = (guess - targets).square().mean(1) if method == "squared" else cs_ib_loss(inputs, code, targets, guess, beta)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    attacked = x_test.clone().requires_grad_()
    clean = predict(layers, attacked)[1]
    (slope,) = torch.autograd.grad((clean - y_test).square().sum(), attacked)
    moved = predict(layers, x_test + ATTACK * slope.sign())[1]
    return tuple((guess - y_test).square().mean(1).sqrt().detach().double().numpy() for guess in (clean, moved))


TUNED = {"squared": (0.0, 3.0), "divergence": (0.1, 3.0)}  # beta (of 0.1 and 1) and decay (of 0, 0.3, 1, 3 and 10)


@not_reproduced(
    "with the weight decay tuned for both, the error under attack is some 4 % larger than with squared error, with and without "
    "the compression term; it is compared with tuned weight decay, not with the paper's other bottlenecks, on three small tables"
)
@claim(
    "The bottleneck is as accurate as squared error with a tuned weight decay, and under an attack of 0.3 standard deviations "
    "its error is at least 3 % smaller.",
    scale="reduced",
    differs="small tables and perceptrons; the baseline is tuned weight decay instead of other bottlenecks; root mean squared "
    "error, geometric mean over three tables; two values of beta, kernel width and learning rate not tuned",
    control="beta = 0: the prediction term stays, nothing is compressed",
    control_breaks="error under attack over that of squared error",
    paper_value="smallest error on six tables, and under every strength of attack (tables and Figure 11)",
)
def test_accurate_and_robust(arm, seeds, evidence):
    seeds = tuple(seeds(8))
    beta, decay = TUNED["divergence"]
    ratios = []
    for name in tables():
        ours = errors(name, "divergence", 0.0 if arm.control else beta, decay, seeds)
        rival = errors(name, "squared", *TUNED["squared"], seeds)
        ratios.append([mine / theirs for mine, theirs in zip(ours, rival, strict=True)])
        for kind, mine, theirs in zip(("as they are", "attacked"), ours, rival, strict=True):
            evidence.record(f"error over that of squared error, {name}, {kind}", (mine / theirs).mean())
    clean, attacked = np.exp(np.log(ratios).mean(0))
    ones = np.ones(len(seeds))
    evidence.require("error over that of squared error", ratio_interval(clean, ones), below=1.02)
    evidence.require("error under attack over that of squared error", ratio_interval(attacked, ones), below=0.97)


def uneven(rng, n):
    """n inputs on [0, 1] with density 1/2 + x, as (n, 1)."""
    return torch.from_numpy(np.sqrt(0.25 + 2 * rng.random(n)) - 0.5).unsqueeze(1)


@claim(
    "The estimator of the prediction term tends to the divergence of conditional densities smoothed by the kernel: with 3,000 "
    "points it is within 5 % of the closed form for normal ones, though the inputs are unevenly spread.",
    scale="paper",
    control="the weighting of the authors' code, by sums of squared kernels, which counts regions by their density",
)
def test_prediction_term_is_consistent(arm, rng, evidence):
    noise, width, width_x = 0.3, 0.1, 0.05
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64)
    overlap = torch.exp(-((2 * grid.square()).square()) / (2 * (2 * noise**2 + width**2)))  # over that of equal densities
    true = -2 * torch.trapezoid(overlap, grid).log()
    found = []
    for _ in range(16):
        x = uneven(rng, 3000)
        y, guess = (mean + noise * torch.from_numpy(rng.standard_normal(3000)) for mean in (0, 2 * x.squeeze(1).square()))
        weighting = "released" if arm.control else "published"
        found.append((conditional_cs_divergence(x, y, guess, width, width_x, weighting=weighting) / true).item())
    evidence.require("estimate over the closed form", mean_interval(found), between=(0.95, 1.05))


@claim(
    "The compression term is in closed form the Cauchy-Schwarz divergence between the kernel density estimates of the pairs and "
    "of the product of their marginals, without any approximation.",
    scale="paper",
    control="the kernels are taken for those of the densities, not for the overlap of two of them",
)
def test_compression_term_is_exact(arm, rng, evidence):
    worst = 0.0
    for _ in range(20):
        x = torch.from_numpy(rng.standard_normal((12, 1)))
        t = x * float(rng.uniform(-1, 1)) + torch.from_numpy(rng.standard_normal((12, 1)))
        width = float(rng.uniform(0.3, 1.5))
        deviation = width if arm.control else width / 2**0.5
        grid = torch.linspace(-14, 14, 701, dtype=torch.float64)
        k, q = (torch.exp(-((grid[:, None] - z[:, 0]) ** 2) / (2 * deviation**2)) for z in (x, t))
        joint, product = k @ q.T / 12, k.mean(1)[:, None] * q.mean(1)
        true = (joint * joint).sum().log() + (product * product).sum().log() - 2 * (joint * product).sum().log()
        worst = max(worst, abs(cs_information(x, t, width) / true - 1).item())
    evidence.require("largest relative error against quadrature", worst, below=1e-6)
