"""Loss Functions and Metrics in Deep Learning (Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, 2023).

A survey has no experiment of its own; these are the statements of its that say what a choice of loss or metric changes.
"""

from functools import partial

import numpy as np
import pytest
import scipy
import torch

from paperclaims.fixtures.models.classifiers import Draws
from paperclaims.fixtures.protocol import claim
from paperclaims.fixtures.statistics import mean_interval, proportion_interval, ratio_interval
from paperclaims.impl.losses import loss_metric_survey as survey

LEVEL = 0.9
# Mean, median, 0.9-quantile and deviation
POPULATIONS = {
    "lognormal": (np.exp(0.5), 1.0, np.exp(scipy.special.ndtri(LEVEL)), (np.exp(2) - np.exp(1)) ** 0.5),
    "exponential": (1.0, np.log(2), -np.log(1 - LEVEL), 1.0),
    "normal": (0.0, 0.0, scipy.special.ndtri(LEVEL), 1.0),
}


@claim(
    "On skewed data squared, absolute and quantile loss are drawn to different predictions: to the mean, the median and the "
    "quantile of the population.",
    scale="paper",
    control="normal data, whose mean is their median",
    control_breaks="target of the squared error less that of the absolute error",
)
@pytest.mark.parametrize("population", ["lognormal", "exponential"])
def test_each_loss_has_its_target(arm, population, seeds, evidence):
    population = "normal" if arm.control else population
    forms = (survey.squared_error, survey.absolute_error, partial(survey.quantile_loss, q=LEVEL))
    targets, off_sample = [], 0.0
    for seed in seeds(8):
        values = getattr(np.random.default_rng(seed), population)(size=50_001)
        y = torch.from_numpy(values)
        ends = np.quantile(values, (0.2, 0.99))
        own = (values.mean(), np.median(values), np.quantile(values, LEVEL))
        found = []
        for loss in forms:
            risk = lambda f, y=y, loss=loss: loss(torch.full_like(y, f), y).item()  # noqa: E731
            found.append(scipy.optimize.minimize_scalar(risk, bounds=ends, method="bounded", options={"xatol": 1e-8}).x)
        targets.append(found)
        off_sample = max(off_sample, np.abs(np.subtract(found, own)).max())
    *statistics, deviation = POPULATIONS[population]
    targets = np.array(targets) / deviation
    for name, column, true in zip(("mean", "median", "quantile"), targets.T, statistics, strict=True):
        off = mean_interval(column - true / deviation)
        evidence.require(f"target less the population's {name}, in deviations", off, between=(-0.05, 0.05))
    evidence.require("largest distance of a minimiser from its sample's statistic", off_sample, below=1e-3)
    gap = mean_interval(targets[:, 0] - targets[:, 1])
    evidence.require("target of the squared error less that of the absolute error", gap, above=0.2, unit="deviations")


def fit(x, y, loss, steps=40):
    """Coefficients (..., d) of least loss for points (..., n, d), by least squares with weights -loss'(e) / e."""
    coefficients = torch.linalg.lstsq(x, y.unsqueeze(-1)).solution
    for _ in range(steps):
        forecast = (x @ coefficients).squeeze(-1).requires_grad_()
        (slope,) = torch.autograd.grad(loss(forecast, y, reduction="sum"), forecast)
        error = forecast.detach() - y
        weight = (slope / error).where(error.abs() > 1e-4, slope.abs() / 1e-4 + 1e-9).unsqueeze(-1)
        scaled = x * weight
        coefficients = torch.linalg.solve(scaled.mT @ x, scaled.mT @ y.unsqueeze(-1))
    return coefficients.squeeze(-1)


def tuned_huber(x, y, unseen, unseen_y):
    """By the delta whose fit has the least absolute error on other points, contaminated likewise."""
    fits = torch.stack([fit(x, y, partial(survey.huber_loss, delta=delta)) for delta in (0.5, 1.0, 1.345, 2.0, 4.0)])
    forecasts = (unseen @ fits.unsqueeze(-1)).squeeze(-1)
    risk = survey.absolute_error(forecasts, unseen_y.expand_as(forecasts), reduction="none").mean(-1)
    best = risk.argmin(0, keepdim=True).unsqueeze(-1)
    return fits.gather(0, best.expand(1, *fits.shape[1:]))[0]


def coefficient_errors(seeds, sizes, where="targets", n=100):
    """Distance of fits by four losses from the true coefficients where a tenth of the points is off, {loss: (sizes, seeds)}.

    Means over four data sets a seed, which takes the skew out.
    """
    draws = Draws(seeds)
    x = draws(torch.randn, 4, 2 * n, 4).double()
    x[..., 0] = 1
    true, noise = draws(torch.randn, 4, 4, 1).double(), draws(torch.randn, 4, 2 * n).double()
    y = ((x @ true).squeeze(-1) + noise).expand(len(sizes), -1, -1, -1)
    x = x.expand(len(sizes), *x.shape)
    sizes = torch.tensor(sizes, dtype=torch.float64).view(-1, 1, 1, 1) * (torch.arange(2 * n) % 10 == 0)
    if where == "targets":
        y = y + sizes * draws(torch.randn, 4, 2 * n).sign()
    else:
        x = torch.cat([x[..., :1], x[..., 1:] * (1 + sizes).unsqueeze(-1)], -1)
    known, unseen = (x[..., :n, :], y[..., :n]), (x[..., n:, :], y[..., n:])
    fits = {
        "squared": torch.linalg.lstsq(known[0], known[1].unsqueeze(-1)).solution.squeeze(-1),
        "absolute": fit(*known, survey.absolute_error),
        "log-cosh": fit(*known, survey.log_cosh_loss),
        "Huber": tuned_huber(*known, *unseen),
    }
    return {name: (found - true.squeeze(-1)).norm(dim=-1).mean(-1).numpy() for name, found in fits.items()}


@claim(
    "Huber, log-cosh and absolute loss bound what outliers do: with a tenth of the targets off by 20 deviations a linear fit's "
    "coefficients are less than half as wrong as with the squared error.",
    scale="mechanism",
    differs="the survey states it without an experiment: data, size of the outliers and the factor of two are ours",
    control="the same data without outliers",
    control_breaks=tuple(f"error by {name} loss over that by squared error" for name in ("absolute", "log-cosh", "Huber")),
)
def test_bounded_slopes_resist_outliers(arm, seeds, evidence):
    seeds = seeds(20)
    sizes = [0.0, 2.0, 3.0, 4.0, 5.0, 7.0, 10.0, 20.0]
    errors = coefficient_errors(seeds, sizes)
    place = 0 if arm.control else -1
    inputs = coefficient_errors(seeds, sizes[-1:], "inputs")
    for name in ("absolute", "log-cosh", "Huber"):
        ratio = ratio_interval(errors[name][place], errors["squared"][place])
        evidence.require(f"error by {name} loss over that by squared error", ratio, below=0.5)
        means = (errors[name] / errors["squared"]).mean(1)
        evidence.curve("error over that by squared error", sizes, means, series=name, x_label="size of outliers in the targets")
        evidence.record(f"the same with outliers in the inputs, {name}", (inputs[name] / inputs["squared"]).mean())


@claim(
    "Resistance has its price: on clean normal data the absolute loss estimates as well as the squared error from 2 / pi of the "
    "points, Huber's with delta 1.345 from 95 %.",
    scale="paper",
    control="Laplace noise, of which the absolute loss is the likelihood",
    control_breaks=("efficiency of the absolute loss", "efficiency of Huber's"),
    central=False,
)
def test_price_of_resistance(arm, seeds, evidence):
    u = Draws(seeds(32))(partial(torch.rand, dtype=torch.float64), (200, 101))
    y = (0.5 - u).sign() * torch.log1p(-(2 * u - 1).abs()) if arm.control else torch.special.ndtri(u)
    x = torch.ones_like(y).unsqueeze(-1)
    wrong = {"squared": y.mean(-1), "absolute": fit(x, y, survey.absolute_error)[..., 0]}
    wrong["Huber"] = fit(x, y, partial(survey.huber_loss, delta=1.345))[..., 0]
    squares = {name: estimate.square().mean(1).numpy() for name, estimate in wrong.items()}
    absolute, huber = (ratio_interval(squares["squared"], squares[name]) for name in ("absolute", "Huber"))
    evidence.require("efficiency of the absolute loss", absolute, between=(2 / np.pi - 0.06, 2 / np.pi + 0.06))
    evidence.require("efficiency of Huber's", huber, between=(0.92, 0.98))


@claim(
    "Under imbalance precision-recall and ROC curves say different things: with the scores of both classes unchanged, average "
    "precision falls by more than 0.1 for each tenfold rarer positives, the area under the ROC curve stays within 0.015.",
    scale="mechanism",
    differs="the survey states it without an experiment: normal scores 1.5 deviations apart, and both bounds, are ours",
    control="as many negatives as positives, however rare: no imbalance",
    control_breaks="average precision lost for each decade",
)
def test_areas_under_imbalance(arm, seeds, evidence):
    n, shares = 20_000, np.geomspace(0.5, 0.005, 8)
    areas = np.empty((2, 20, 8))
    for row, seed in enumerate(seeds(20)):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randn(n, generator=generator)
        for column, share in enumerate(shares):
            positives = round(n * share)
            y = torch.arange(n) < positives
            used = slice(2 * positives if arm.control else n)
            for area, function in zip(areas, (survey.roc_auc, survey.average_precision), strict=True):
                area[row, column] = function((scores + 1.5 * y)[used], y[used]).item()
    roc, precision = areas
    decades = -np.log10(shares)
    falls = [-np.polyfit(decades, area.T, 1)[0] for area in (roc, precision)]
    evidence.require("area under the ROC curve lost for each decade", mean_interval(falls[0]), between=(-0.015, 0.015))
    evidence.require("average precision lost for each decade", mean_interval(falls[1]), above=0.1)
    for name, area in (("ROC", roc), ("precision-recall", precision)):
        evidence.curve("area", shares, area.mean(0), series=name, x_label="share of positives", log="x")


def overlap_after(kind, start, goal, lr=0.1, steps=500):
    """IoU of boxes with their goals after descent on their centres and logarithms of their sizes by Adam, (pairs,)."""
    centre, size = ((start[:, 2:] + start[:, :2]) / 2).requires_grad_(), (start[:, 2:] - start[:, :2]).log().requires_grad_()
    optimizer = torch.optim.Adam([centre, size], lr=lr)

    def boxes():
        return torch.cat([centre - size.exp() / 2, centre + size.exp() / 2], 1)

    for _ in range(steps):
        optimizer.zero_grad()
        survey.box_loss(boxes(), goal, kind, reduction="sum").backward()
        optimizer.step()
    return 1 - survey.box_loss(boxes().detach(), goal, "iou", reduction="none")


BOX_SHARES = tuple(f"share that {name} brings to an IoU above one half" for name in ("GIoU", "DIoU", "CIoU"))


@claim(
    "GIoU, DIoU and CIoU train boxes that do not overlap, where IoU is flat: of boxes that start apart from their goal most come "
    "to an IoU above one half.",
    scale="mechanism",
    differs="free boxes in place of a detector's: the survey states it without an experiment",
    control="IoU in their place, with the same steps and learning rate (its gradient is 0 at any)",
    control_breaks=BOX_SHARES,
)
def test_boxes_apart_find_their_goal(arm, rng, evidence):
    pairs = 300
    corners = rng.uniform(0, 10, (2, 4 * pairs, 2))
    boxes = torch.from_numpy(np.concatenate([corners, corners + rng.uniform(0.5, 3, corners.shape)], -1))
    apart = survey.box_loss(*boxes, "iou", reduction="none") == 1
    start, goal = (part[apart][:pairs] for part in boxes)
    kinds = dict.fromkeys(BOX_SHARES, "iou") if arm.control else dict(zip(BOX_SHARES, ("giou", "diou", "ciou"), strict=True))
    found = {kind: int((overlap_after(kind, start, goal) > 0.5).sum()) for kind in dict.fromkeys(kinds.values())}
    for quantity, kind in kinds.items():
        evidence.require(quantity, proportion_interval(found[kind], pairs), above=0.5)
