"""The intervals cover what their docstrings say they cover, agree with scipy, and refuse what they are not for.

`python -m paperclaims.tests.test_statistics` prints the docstrings' tables anew, from 200,000 data sets a figure (minutes).
"""

import inspect
import math
import re
import warnings
from functools import cache, partial

import numpy as np
import pytest
import scipy.stats

from paperclaims.fixtures import statistics
from paperclaims.fixtures.statistics import (
    LEVEL,
    Interval,
    exact,
    exponent_interval,
    mean_interval,
    median_interval,
    non_inferiority,
    paired_difference,
    proportion_interval,
    rank_correlation_interval,
    ratio_interval,
    required_distance,
    time_ratio,
)

# Coverage: a trial draws `sets` data sets of n values and says for each whether the interval holds the truth (or a warning came).

SIZES = (8, 12, 20, 50, 100)


def normal(rng, shape):
    return rng.normal(size=shape)


def exponential(rng, shape):
    return rng.exponential(size=shape)


def lognormal(rng, shape):
    return rng.lognormal(size=shape)


def student(rng, shape):
    return rng.standard_t(3, size=shape)


FAMILIES = {"normal": normal, "exponential": exponential, "lognormal": lognormal, "t(3)": student}
MEANS = {"normal": 0, "exponential": 1, "lognormal": math.exp(0.5), "t(3)": 0}
MEDIANS = {"normal": 0, "exponential": math.log(2), "lognormal": 1, "t(3)": 0}


def within(bounds, truth):
    return (bounds[1] <= truth) & (truth <= bounds[2])


def mean_trial(family, rng, sets, n):
    return within(statistics._t(FAMILIES[family](rng, (sets, n)), LEVEL), MEANS[family])


def warned_trial(family, rng, sets, n):
    return statistics._skewed(FAMILIES[family](rng, (sets, n)))[1]


def median_trial(family, rng, sets, n):
    return within(statistics._order_statistics(FAMILIES[family](rng, (sets, n)), LEVEL), MEDIANS[family])


def paired_trial(family, rng, sets, n):
    method, baseline = FAMILIES[family](rng, (2, sets, n))
    return within(statistics._t(method - baseline, LEVEL), 0)


def ratio_trial(draw, truth, rng, sets, n):
    return within(statistics._t(np.log(draw(rng, (sets, n))), LEVEL), math.log(truth))


def same_family(draw):
    def ratio(rng, shape):
        return draw(rng, shape) / draw(rng, shape)

    return ratio


def time_trial(draw, rng, sets, n):
    times, base_times = draw(rng, (2, sets, n))
    return within(statistics._order_statistics(times / base_times, LEVEL), 1)


def stalls(rng, shape):
    return 1 + 0.1 * rng.exponential(size=shape) + 10 * (rng.random(shape) < 0.1)


@cache
def proportion_bounds(n):
    return np.array([(i.estimate, i.low, i.high) for i in (proportion_interval(k, n) for k in range(n + 1))]).T


def proportion_trial(p, rng, sets, n):
    return within(proportion_bounds(n)[:, rng.binomial(n, p, sets)], p)


def elliptical(correlation, degrees, rng, shape):
    x, y = rng.normal(size=(2, *shape))
    scale = np.sqrt(rng.chisquare(degrees, shape) / degrees) if degrees else 1
    return x / scale, (correlation * x + math.sqrt(1 - correlation**2) * y) / scale


@cache
def elliptical_truth(correlation, degrees):
    """Spearman's correlation: 6 / pi E asin(correlation s1 / sqrt((s1 + s2)(s1 + s3))) over the variances s of three points."""
    s1, s2, s3 = degrees / np.random.default_rng(0).chisquare(degrees, (3, 1_000_000)) if degrees else np.ones((3, 1))
    return 6 / math.pi * np.arcsin(correlation * s1 / np.sqrt((s1 + s2) * (s1 + s3))).mean()


def clayton(theta, rng, shape):
    u, w = rng.random((2, *shape))
    return u, ((w ** (-theta / (1 + theta)) - 1) * u**-theta + 1) ** (-1 / theta)


@cache
def clayton_truth(theta):
    """12 times the integral of the copula over the unit square, less 3."""
    nodes, weights = np.polynomial.legendre.leggauss(400)
    u, w = (nodes + 1) / 2, weights / 2
    return 12 * w @ (u[:, None] ** -theta + u**-theta - 1) ** (-1 / theta) @ w - 3


def rank_trial(draw, truth, rng, sets, n):
    return within(statistics._spearman(*draw(rng, (sets, n)), LEVEL), truth())


def slope_trial(family, growth, rng, sets, n):
    x = np.linspace(0, 5, n)
    noise = FAMILIES[family](rng, (sets, n)) * growth ** (x / 5)
    return within(statistics._slope(x, 1.5 * x + noise, LEVEL), 1.5)


TRIALS = {
    (mean_interval, "covered"): {family: partial(mean_trial, family) for family in FAMILIES},
    (mean_interval, "warned"): {family: partial(warned_trial, family) for family in FAMILIES},
    (median_interval, "covered"): {family: partial(median_trial, family) for family in FAMILIES},
    (paired_difference, "covered"): {family: partial(paired_trial, family) for family in FAMILIES},
    (ratio_interval, "covered"): {
        "normal (10, 1)": partial(ratio_trial, same_family(lambda rng, shape: 10 + normal(rng, shape)), 1),
        "exponential": partial(ratio_trial, same_family(exponential), 1),
        "lognormal": partial(ratio_trial, same_family(lognormal), 1),
        "|t(3)|": partial(ratio_trial, same_family(lambda rng, shape: abs(student(rng, shape))), 1),
        "exponential / 1": partial(ratio_trial, exponential, math.exp(-np.euler_gamma)),
    },
    (time_ratio, "covered"): {
        "lognormal": partial(time_trial, lognormal),
        "1 + exponential": partial(time_trial, lambda rng, shape: 1 + exponential(rng, shape)),
        "stalls": partial(time_trial, stalls),
    },
    (proportion_interval, "covered"): {f"p = {p}": partial(proportion_trial, p) for p in (0.5, 0.1, 0.01)},
    (rank_correlation_interval, "covered"): {
        "normal, 0": partial(rank_trial, partial(elliptical, 0, 0), lambda: 0),
        "normal, 0.5": partial(rank_trial, partial(elliptical, 0.5, 0), partial(elliptical_truth, 0.5, 0)),
        "normal, 0.9": partial(rank_trial, partial(elliptical, 0.9, 0), partial(elliptical_truth, 0.9, 0)),
        "t(3), 0.9": partial(rank_trial, partial(elliptical, 0.9, 3), partial(elliptical_truth, 0.9, 3)),
        "Clayton, 8": partial(rank_trial, partial(clayton, 8), partial(clayton_truth, 8)),
    },
    (exponent_interval, "covered"): {family: partial(slope_trial, family, 1) for family in FAMILIES}
    | {"growing": partial(slope_trial, "normal", 10)},
}


def share(trial, n, sets, seed=0):
    """Share of the data sets for which the trial says yes, in chunks of 10,000."""
    rng = np.random.default_rng([seed, n])
    return float(np.mean([trial(rng, 10_000, n).mean() for _ in range(sets // 10_000)]))


def documented(function, title):
    """The docstring's table as {row: [per cent at each size]}."""
    lines = iter(inspect.getdoc(function).splitlines())
    sizes = next(match for match in (re.fullmatch(rf"{title}, % at n =([\d ]+)", line) for line in lines) if match)
    assert tuple(map(int, sizes[1].split())) == SIZES
    table = {}
    for line in lines:
        if not line:
            return table
        row, *figures = re.split(r"\s{2,}", line.strip())
        table[row] = [float(figure) for figure in figures]


@pytest.mark.parametrize(
    ("function", "title", "row"),
    [pytest.param(*key, row, id=f"{key[0].__name__}-{key[1]}-{row}") for key, rows in TRIALS.items() for row in rows],
)
def test_docstring_states_the_measured_share(function, title, row):
    for n, stated in zip(SIZES, documented(function, title)[row], strict=True):
        sets = 10_000
        measured = 100 * share(TRIALS[function, title][row], n, sets, seed=1)
        deviation = 100 * math.sqrt(max(measured, 0.1) / 100 * max(100 - measured, 0.1) / 100 / sets)
        assert abs(measured - stated) <= 4 * deviation + 0.05, f"n = {n}: {measured:.2f} % of {sets} data sets, not {stated} %"


@pytest.mark.parametrize("key", TRIALS, ids=lambda key: f"{key[0].__name__}-{key[1]}")
def test_docstring_states_every_row(key):
    assert list(documented(*key)) == list(TRIALS[key])


def test_median_covers_exactly_what_it_says():
    """The median lies between the k-th values from both ends unless fewer than k of n coin flips fall on one side."""
    for n in (8, 9, 12, 20, 21, 50, 100, 1001):
        values = np.random.default_rng(n).normal(size=n)
        interval, ordered = median_interval(values), np.sort(values)
        k = int(np.flatnonzero(ordered == interval.low)[0])
        assert interval.high == ordered[n - 1 - k]
        covers = [1 - 2 * sum(math.comb(n, j) for j in range(i + 1)) / 2**n for i in (k, k + 1)]
        assert interval.level == pytest.approx(covers[0], abs=1e-12)
        assert covers[0] >= LEVEL > covers[1]
        assert interval.estimate == pytest.approx(np.median(values))


@pytest.mark.parametrize("n", [1, 8, 23])
def test_proportion_never_covers_less_than_its_level(n):
    p = np.linspace(0.001, 0.999, 499)
    _, low, high = proportion_bounds(n)
    chance = scipy.stats.binom.pmf(np.arange(n + 1), n, p[:, None])
    assert (chance * ((low <= p[:, None]) & (p[:, None] <= high))).sum(-1).min() >= LEVEL


# Agreement with scipy, which forms the same intervals by other code.


@pytest.fixture
def pair():
    shared = np.random.default_rng(3).normal(size=13)
    return 5 + shared, 6 + shared + 0.3 * np.random.default_rng(4).normal(size=13)


def bounds(interval):
    return interval.low, interval.high


def test_means_are_those_of_scipy(pair):
    a, b = pair
    assert bounds(mean_interval(a)) == pytest.approx(scipy.stats.ttest_1samp(a, 0).confidence_interval(LEVEL))
    assert mean_interval(a).estimate == pytest.approx(a.mean())
    assert bounds(mean_interval(a, level=0.9)) == pytest.approx(scipy.stats.ttest_1samp(a, 0).confidence_interval(0.9))
    assert bounds(paired_difference(a, b)) == pytest.approx(scipy.stats.ttest_rel(a, b).confidence_interval(LEVEL))
    assert paired_difference(a, b).estimate == pytest.approx(-1, abs=0.3)


def test_ratios_are_those_of_scipy(pair):
    a, b = pair
    logs = scipy.stats.ttest_rel(np.log(a), np.log(b)).confidence_interval(LEVEL)
    assert bounds(ratio_interval(a, b)) == pytest.approx(np.exp(logs))
    assert ratio_interval(a, b).estimate == pytest.approx(scipy.stats.gmean(a / b))
    assert ratio_interval(a, b).level == ratio_interval(b, a).level == LEVEL


def test_medians_of_pairs(pair):
    a, b = pair
    assert paired_difference(a, b, "median", level=0.95).estimate == pytest.approx(np.median(a - b))
    assert bounds(paired_difference(a, b, "median")) == pytest.approx(bounds(median_interval(a - b)))
    assert bounds(time_ratio(a, b)) == pytest.approx(bounds(median_interval(a / b)))


def test_proportions_are_those_of_scipy():
    for successes, trials in [(0, 7), (3, 10), (10, 10), (412, 1000)]:
        theirs = scipy.stats.binomtest(successes, trials).proportion_ci(LEVEL, method="exact")
        interval = proportion_interval(successes, trials)
        assert bounds(interval) == pytest.approx((theirs.low, theirs.high))
        assert (interval.estimate, interval.n) == (successes / trials, trials)


def test_exponents_are_those_of_scipy(pair):
    x, y = pair[0], pair[0] ** 1.5 * pair[1]
    fit = scipy.stats.linregress(np.log(x), np.log(y))
    half = scipy.stats.t.ppf((1 + LEVEL) / 2, x.size - 2) * fit.stderr
    assert bounds(exponent_interval(x, y)) == pytest.approx((fit.slope - half, fit.slope + half))
    assert exponent_interval(x, y).estimate == pytest.approx(fit.slope)


def test_rank_correlation_with_ties_is_that_of_scipy():
    rng = np.random.default_rng(5)
    x, y = rng.integers(0, 5, (2, 40))
    y = x + y
    interval = rank_correlation_interval(x, y)
    assert interval.estimate == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    assert interval.n == 40


def test_rank_correlation_takes_the_larger_of_two_standard_errors():
    """That of Bonett and Wright, or that of the influence of every point, here by its definition, pair by pair."""
    rng = np.random.default_rng(6)
    larger = []
    for n in (9, 30, 200):
        x, y = np.round(elliptical(0.9, 2, rng, (n,)), 1)
        above_x, above_y = (np.sign(v - v[:, None]) / 2 + 0.5 for v in (x, y))  # [i, j]: 1 if j is above i, 1/2 if they tie
        u, v = (0.5 - above.mean(1) for above in (above_x, above_y))
        spread = u.std() * v.std()
        influence = (u * v + above_x @ v / n + above_y @ u / n) / spread
        r = scipy.stats.spearmanr(x, y).statistic
        errors = math.sqrt((1 + r**2 / 2) / (n - 3)), influence.std(ddof=1) / math.sqrt(n) / (1 - r**2)
        half = scipy.stats.norm.ppf((1 + LEVEL) / 2) * max(errors)
        expected = math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)
        assert bounds(rank_correlation_interval(x, y)) == pytest.approx(expected)
        larger.append(errors[1] > errors[0])
    assert len(set(larger)) == 2, "both must have been the larger once"


def test_rank_correlation_depends_on_order_alone():
    x, y = np.random.default_rng(7).normal(size=(2, 25))
    y = x + y
    interval, mirrored = rank_correlation_interval(x, np.exp(y)), rank_correlation_interval(x, -y)
    assert bounds(interval) == pytest.approx(bounds(rank_correlation_interval(x, y)))
    assert bounds(interval) == pytest.approx((-mirrored.high, -mirrored.low))


def test_perfect_order_is_not_certainty():
    x = np.arange(8.0)
    up, down = rank_correlation_interval(x, x), rank_correlation_interval(x, -x)
    assert up.estimate == up.high == pytest.approx(1)
    assert up.low < 0.8
    assert down.estimate == down.low == pytest.approx(-1)
    assert down.high == pytest.approx(-up.low)
    assert rank_correlation_interval(np.arange(50), np.arange(50)).low > 0.95


# Planning and the sign of a loss.


@pytest.mark.parametrize("n", [8, 12, 20, 50, 100])
def test_required_distance_keeps_the_verdict(n):
    distance = required_distance(n)
    assert f"{distance:.2f} at n = {n}" in required_distance.__doc__ or f"{distance:.2f} at {n}" in required_distance.__doc__
    values = np.random.default_rng(n).normal(distance, size=(20_000, n))
    kept = (statistics._t(values, LEVEL)[1] > 0).mean()
    assert kept == pytest.approx(0.99, abs=4 * math.sqrt(0.99 * 0.01 / 20_000))
    assert scipy.stats.nct.sf(scipy.stats.t.ppf(0.995, n - 1), n - 1, distance * math.sqrt(n)) == pytest.approx(0.99, abs=1e-6)
    assert required_distance(n, keep=0.9) < distance < required_distance(n, level=0.999)


def test_non_inferiority_is_a_loss(pair):
    worse, better = pair
    assert non_inferiority(worse, better) == paired_difference(better, worse)
    assert non_inferiority(worse, better, higher_is_better=False) == paired_difference(worse, better)
    assert non_inferiority(worse, better).low > 0
    assert non_inferiority(worse, better, statistic="median").method == "paired order statistics"


# Values that all agree.


@pytest.mark.parametrize("function", [mean_interval, median_interval])
@pytest.mark.parametrize("value", [0.1, -3e10, 0.0, 7])
def test_identical_values_keep_a_width(function, value):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        interval = function([value] * 50)
        measured = function([value] * 50, resolution=0.5)
    assert interval.low < interval.estimate < interval.high
    assert interval.high - interval.low <= 4 * np.spacing(abs(float(value)))
    assert measured.high - measured.low == pytest.approx(0.5, abs=1e-5)


def test_identical_pairs_keep_a_width():
    values = np.linspace(1, 2, 10)
    for function in (paired_difference, ratio_interval, time_ratio, partial(paired_difference, statistic="median")):
        interval = function(values, values)
        assert 0 < interval.high - interval.low < 1e-14
        assert interval.low < interval.estimate < interval.high
        coarse = function(values, values, resolution=0.2)
        assert coarse.high - coarse.low == pytest.approx(0.2, rel=0.01)
    line = exponent_interval(values, values**2)
    assert line.low <= 2 <= line.high
    assert 0 < line.high - line.low < 1e-13


def test_resolution_is_a_least_width_only():
    values = np.random.default_rng(8).normal(size=20)
    assert mean_interval(values, resolution=1e-3) == mean_interval(values)


# Data that a function is not for.

GOOD = np.linspace(1, 2, 9)
OF_ONE = [mean_interval, median_interval]
OF_TWO = [paired_difference, non_inferiority, ratio_interval, time_ratio, rank_correlation_interval, exponent_interval]


def spoiled(value):
    return [*GOOD[:3], value, *GOOD[4:]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_every_function_names_the_value_that_is_not_finite(bad):
    for function in OF_ONE:
        with pytest.raises(ValueError, match=rf"values\[3\] is {bad}"):
            function(spoiled(bad))
    for function in OF_TWO:
        for arguments in [(spoiled(bad), GOOD), (GOOD, spoiled(bad))]:
            with pytest.raises(ValueError, match=rf"\[3\] is {bad}"):
                function(*arguments)


def test_five_values_are_too_few():
    skewed = [1.0, 1.1, 1.2, 1.3, 40.0]
    for function in OF_ONE:
        with pytest.raises(ValueError, match="5 values: an interval needs at least 8"):
            function(skewed)
    for function in OF_TWO:
        with pytest.raises(ValueError, match="at least 8"):
            function(skewed, skewed)
    with pytest.raises(ValueError, match="at least 8"):
        required_distance(5)


def test_eight_values_are_too_few_for_a_higher_level():
    with pytest.raises(ValueError, match=r"8 values are too few: .* 99\.22%"):
        median_interval(np.arange(8) + 2, level=0.995)
    assert median_interval(np.arange(9) + 2, level=0.995).level == pytest.approx(1 - 2**-8)


@pytest.mark.parametrize("function", OF_TWO)
def test_pairs_must_match(function):
    with pytest.raises(ValueError, match=r"9 and 8 values|8 and 9 values"):
        function(GOOD, GOOD[:8])
    with pytest.raises(ValueError, match="flat list"):
        function(GOOD[:, None], GOOD)


@pytest.mark.parametrize("function", [ratio_interval, time_ratio, exponent_interval])
@pytest.mark.parametrize("bad", [0.0, -1.0])
def test_logarithms_need_positive_values(function, bad):
    for arguments in [(spoiled(bad), GOOD), (GOOD, spoiled(bad))]:
        with pytest.raises(ValueError, match=rf"\[3\] is {bad}: .* positive"):
            function(*arguments)


def test_constants_have_no_correlation_and_no_exponent():
    for arguments in [(GOOD, np.ones(9)), (np.ones(9), GOOD)]:
        with pytest.raises(ValueError, match="is constant"):
            rank_correlation_interval(*arguments)
    with pytest.raises(ValueError, match="x is constant"):
        exponent_interval(np.ones(9), GOOD)


def test_unknown_statistic():
    with pytest.raises(ValueError, match="'mode'"):
        paired_difference(GOOD, GOOD, "mode")


@pytest.mark.parametrize(("successes", "trials"), [(3, 2), (-1, 2), (0, 0), (1.5, 3), (math.nan, 3), (3, math.inf)])
def test_impossible_counts(successes, trials):
    with pytest.raises(ValueError, match="whole numbers"):
        proportion_interval(successes, trials)


@pytest.mark.parametrize(
    ("low", "estimate", "high"), [(1, 0, 2), (0, 3, 2), (math.nan, 0, 1), (0, math.nan, 1), (0, 1, math.nan)]
)
def test_interval_holds_its_estimate(low, estimate, high):
    with pytest.raises(ValueError, match="low <= estimate <= high"):
        Interval(estimate, low, high)


def test_exact_has_no_width():
    assert exact(3) == Interval(3.0, 3.0, 3.0, n=1, level=1.0, method="exact")
    with pytest.raises(ValueError, match="nan"):
        exact(math.nan)


@pytest.mark.parametrize(
    "call",
    [
        lambda skewed: mean_interval(skewed),
        lambda skewed: paired_difference(skewed, np.ones(8)),
        lambda skewed: ratio_interval(np.exp(skewed), np.ones(8)),
    ],
)
def test_skewed_values_warn_where_they_were_given(call):
    with pytest.warns(UserWarning, match="8 values with skewness 2.3: .* take a median") as caught:
        call(np.array([1.0, 1.1, 0.9, 1.0, 1.2, 1.1, 1.0, 40.0]))
    assert caught[0].filename == __file__


def test_successes_warn():
    for function in OF_ONE:
        for values in ([1.0] * 8, [0, 1] * 6):
            with pytest.warns(UserWarning, match="proportion_interval") as caught:
                function(values)
            assert caught[0].filename == __file__


def test_ordinary_values_do_not_warn(pair):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for function in OF_TWO:
            function(*pair)
        mean_interval(pair[0])
        mean_interval([0.1] * 50)
        median_interval([1.0, 1.1, 0.9, 1.0, 1.2, 1.1, 1.0, 40.0])


if __name__ == "__main__":
    for (function, title), rows in TRIALS.items():
        print(f"\n{function.__name__}\n    {title}, % at n = " + "".join(f"{n:7}" for n in SIZES))
        for row, trial in rows.items():
            print(f"        {row:16}" + "".join(f"{100 * share(trial, n, 200_000):7.1f}" for n in SIZES), flush=True)
