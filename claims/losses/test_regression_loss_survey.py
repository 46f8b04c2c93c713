"""A Comprehensive Survey of Regression Based Loss Functions for Time Series Forecasting (Jadon, Patil, Jadon, 2022)."""

from functools import partial

import numpy as np
import scipy
import torch

from paperclaims.fixtures.protocol import claim, not_reproduced
from paperclaims.impl.losses import regression_loss_survey as losses

# Median (P50) quantile risk of a Temporal Fusion Transformer trained with each loss, on electricity, traffic and retail data: the
# authors' repository, X_experiments/X_experiments.json for X electricity, traffic and favorita
RELEASED = {
    "absolute": (0.21814, 0.26000, 0.59068),
    "percentage": (0.41595, 0.43102, 0.60796),
    "squared": (0.14978, 0.31214, 0.44725),
    "logarithmic": (0.86861, 0.48552, 0.66438),
    "bias": (579.251, 792.310, 616.917),
    "relative absolute": (0.19803, 0.32831, 0.37608),
    "relative squared": (0.34052, 0.61969, 0.62529),
    "relative root": (0.19295, 1.19388, 0.55252),
    "Huber": (0.20305, 0.35444, 0.58428),
    "quantile": (0.17356, 0.31513, 0.58169),
    "log-cosh": (0.22745, 0.24874, 0.37473),
    "root logarithmic": (1.53572, 2.07756, 0.70827),
    "root squared": (0.23429, 0.33983, 0.46226),
    "normalised root": (0.42409, 0.68548, 0.52425),
}


def root(function, low, high):
    return scipy.optimize.brentq(function, low, high, xtol=1e-13)


@claim(
    "Each loss has a best constant forecast of its own: mean, median, quantile, geometric mean, a median weighted by 1 / |y|, "
    "or one above the mean; those of Huber and log-cosh balance clipped errors.",
    scale="paper",
    control="the squared error in place of every loss",
)
def test_best_constant_forecasts(arm, rng, evidence):
    values = np.sort(rng.lognormal(size=1001))
    y, mean = torch.from_numpy(values), values.mean()
    by_weight = values[np.searchsorted(np.cumsum(1 / values), (1 / values).sum() / 2)]
    expected = {
        **dict.fromkeys(("squared_error", "root_squared_error", "relative_squared_error", "normalised_root_error"), mean),
        **dict.fromkeys(("absolute_error", "relative_absolute_error"), np.median(values)),
        **dict.fromkeys(("logarithmic_error", "root_logarithmic_error"), np.expm1(np.log1p(values).mean())),
        "percentage_error": by_weight,
        "relative_root_error": (values**2).mean() / mean,
        "huber_loss": root(lambda f: np.clip(values - f, -1, 1).mean(), values[0], values[-1]),
        "log_cosh_loss": root(lambda f: np.tanh(values - f).mean(), values[0], values[-1]),
        "quantile_loss": values[int(0.8 * 1001)],
    }
    distances = {}
    for name, statistic in expected.items():
        loss = losses.squared_error if arm.control else getattr(losses, name)
        if name == "quantile_loss" and not arm.control:
            loss = partial(loss, q=0.8)
        risk = lambda f, loss=loss: loss(torch.full_like(y, f), y).item()  # noqa: E731
        found = scipy.optimize.minimize_scalar(risk, bounds=(values[0], values[-1]), method="bounded", options={"xatol": 1e-9}).x
        distances[name] = abs(found - statistic) / values.std()
        evidence.record(f"best constant, {name}", found)
    evidence.require("largest distance of a minimiser from its statistic, in deviations", max(distances.values()), below=1e-5)


@not_reproduced(
    "by the authors' released figures no loss is within five per cent of the best on all three data sets; the squared error "
    "comes closest, a quarter above the best on traffic"
)
@claim(
    "Quantile loss, squared error and relative root squared error do well on all data: one of them is within five per cent of "
    "the best on each.",
    scale="paper",
    control="the mean bias error, in which errors cancel, in their place",
    paper_value="certain categories perform well across all data sets (abstract)",
)
def test_a_category_does_well_everywhere(arm, evidence):
    table = {name: np.array(row) for name, row in RELEASED.items()}
    best = np.min(list(table.values()), axis=0)
    regret = {name: (row / best - 1).max() for name, row in table.items()}
    for name, value in sorted(regret.items(), key=lambda item: item[1]):
        evidence.record(f"largest regret, {name}", 100 * value, unit="%")
    category = ["bias"] if arm.control else ["quantile", "squared", "relative root"]
    evidence.require("largest regret of the best of them", 100 * min(regret[name] for name in category), below=5, unit="%")
