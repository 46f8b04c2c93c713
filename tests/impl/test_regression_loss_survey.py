"""The 14 regression losses against their definitions, and every property that the table in their module states."""

import math

import mpmath
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from paperclaims.impl.losses import regression_loss_survey as losses

FEW = settings(derandomize=True, deadline=None, max_examples=40)
numbers = st.floats(-1e3, 1e3)
positive = st.floats(1e-3, 1e3)
# What each loss makes of one error and its actual value
SINGLE = {
    "absolute_error": lambda f, y: abs(y - f),
    "squared_error": lambda f, y: (y - f) ** 2,
    "bias_error": lambda f, y: y - f,
    "percentage_error": lambda f, y: abs((y - f) / y),
    "logarithmic_error": lambda f, y: (math.log1p(y) - math.log1p(f)) ** 2,
    "huber_loss": lambda f, y: (y - f) ** 2 / 2 if abs(y - f) <= 1 else abs(y - f) - 0.5,
    "log_cosh_loss": lambda f, y: float(mpmath.log(mpmath.cosh(mpmath.mpf(y) - mpmath.mpf(f)))),
    "quantile_loss": lambda f, y: abs(y - f) / 2,
}
WHOLE = (
    "relative_absolute_error",
    "relative_squared_error",
    "root_squared_error",
    "root_logarithmic_error",
    "normalised_root_error",
    "relative_root_error",
)
CONVEX = ("absolute_error", "squared_error", "bias_error", "percentage_error", "huber_loss", "log_cosh_loss", "quantile_loss")
CONVEX_WHOLE = ("relative_absolute_error", "relative_squared_error", "root_squared_error", "normalised_root_error")


def make(*shape, seed=0):
    """Forecasts and actual values, both positive."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(*shape, dtype=torch.float64, generator=generator) * 3 + 0.2 for _ in range(2))


def tensors(*values):
    return tuple(torch.tensor([value], dtype=torch.float64) for value in values)


def test_all_fourteen_are_here():
    assert sorted([*SINGLE, *WHOLE]) == sorted(losses.__all__)
    assert len(losses.__all__) == 14


@pytest.mark.parametrize("name", SINGLE)
def test_losses_of_single_errors_are_their_definitions(name):
    forecast, actual = make(3, 4)
    loss = getattr(losses, name)
    expected = [SINGLE[name](f, y) for f, y in zip(forecast.flatten().tolist(), actual.flatten().tolist(), strict=True)]
    expected = torch.tensor(expected, dtype=torch.float64).view(3, 4)
    torch.testing.assert_close(loss(forecast, actual, reduction="none"), expected, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(loss(forecast, actual), expected.mean(), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(loss(forecast, actual, reduction="sum"), expected.sum(), rtol=1e-13, atol=1e-15)


def test_parameters():
    forecast, actual = make(3, 4)
    for delta in (0.3, 1.0, 7.0):
        torch.testing.assert_close(
            losses.huber_loss(forecast, actual, delta), F.huber_loss(forecast, actual, delta=delta), rtol=1e-13, atol=0
        )
    for q in (0.1, 0.5, 0.8):
        expected = metrics.mean_pinball_loss(actual.flatten(), forecast.flatten(), alpha=q)
        assert losses.quantile_loss(forecast, actual, q).item() == pytest.approx(expected, rel=1e-13)


def test_losses_of_series_are_their_definitions():
    forecast, actual = make(5, 7)
    for dim, f, y in ((1, forecast[2], actual[2]), (None, forecast.flatten(), actual.flatten())):
        e, mean = (y - f).tolist(), y.mean().item()
        spread = [value - mean for value in y.tolist()]
        squares = sum(value**2 for value in e) / len(e)
        logs = [math.log1p(a) - math.log1p(b) for a, b in zip(y.tolist(), f.tolist(), strict=True)]
        expected = {
            "relative_absolute_error": sum(map(abs, e)) / sum(map(abs, spread)),
            "relative_squared_error": sum(v**2 for v in e) / sum(v**2 for v in spread),
            "root_squared_error": squares**0.5,
            "root_logarithmic_error": (sum(v**2 for v in logs) / len(logs)) ** 0.5,
            "normalised_root_error": squares**0.5 / mean,
            "relative_root_error": (squares / sum(v**2 for v in f.tolist())) ** 0.5,
        }
        for name, value in expected.items():
            found = getattr(losses, name)(forecast, actual, dim=dim)
            assert found.shape == (() if dim is None else (5,))
            assert (found if dim is None else found[2]).item() == pytest.approx(value, rel=1e-12)
        by_range = losses.normalised_root_error(forecast, actual, by="range", dim=dim)
        by_range = (by_range if dim is None else by_range[2]).item()
        assert by_range == pytest.approx(squares**0.5 / (y.max() - y.min()).item(), rel=1e-12)
        assert losses.root_squared_error(forecast, actual, dim=(0, 1)).shape == ()


def test_agreement_with_scikit_learn():
    forecast, actual = make(40)
    pairs = [
        (losses.absolute_error, metrics.mean_absolute_error),
        (losses.squared_error, metrics.mean_squared_error),
        (losses.percentage_error, metrics.mean_absolute_percentage_error),
        (losses.logarithmic_error, metrics.mean_squared_log_error),
        (losses.root_squared_error, metrics.root_mean_squared_error),
        (losses.root_logarithmic_error, metrics.root_mean_squared_log_error),
        (losses.relative_squared_error, lambda y, f: 1 - metrics.r2_score(y, f)),
    ]
    for ours, theirs in pairs:
        assert ours(forecast, actual).item() == pytest.approx(theirs(actual, forecast), rel=1e-12)


@pytest.mark.parametrize("name", CONVEX)
@FEW
@given(numbers, numbers, positive, st.floats(0, 1))
def test_convex_in_the_forecast(name, a, b, y, share):
    loss = getattr(losses, name)
    (a,), (b,), (y,) = tensors(a), tensors(b), tensors(y)
    between = loss(share * a + (1 - share) * b, y, reduction="sum")
    chord = share * loss(a, y, reduction="sum") + (1 - share) * loss(b, y, reduction="sum")
    assert between <= chord + 1e-9 * (1 + chord.abs())


@pytest.mark.parametrize("name", CONVEX_WHOLE)
@FEW
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_convex_in_the_forecasts(name, seed, share):
    loss = getattr(losses, name)
    (a, y), (b, _) = make(6, seed=seed), make(6, seed=seed + 1)
    assert loss(share * a + (1 - share) * b, y) <= share * loss(a, y) + (1 - share) * loss(b, y) + 1e-12


def test_logarithmic_losses_are_convex_up_to_e_times_and_no_further():
    y = torch.tensor([1.0], dtype=torch.float64)

    def curvature(f):
        f = torch.tensor([f], dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(losses.logarithmic_error(f, y), f, create_graph=True)
        return torch.autograd.grad(slope.sum(), f)[0].item()

    turn = math.e * 2 - 1
    assert curvature(turn - 0.01) > 0 > curvature(turn + 0.01)
    assert curvature(-0.9) > 0
    far = [torch.tensor([f], dtype=torch.float64) for f in (2.0, 6.0, 10.0)]
    values = [losses.root_logarithmic_error(f, y).item() for f in far]
    assert values[1] > (values[0] + values[2]) / 2


def test_relative_root_error_is_not_convex():
    y = torch.tensor([1.0, 3.0], dtype=torch.float64)
    values = [losses.relative_root_error(torch.full_like(y, f), y).item() for f in (5.0, 15.0, 25.0)]
    assert values[1] > (values[0] + values[2]) / 2


@FEW
@given(numbers, numbers, st.sampled_from([0.1, 1.0, 5.0]), st.sampled_from([0.1, 0.5, 0.7]))
def test_slopes_are_bounded_and_the_bounds_are_reached(f, y, delta, q):
    (f,), (y,) = tensors(f), tensors(y)
    bounds = {
        losses.absolute_error: 1,
        losses.bias_error: 1,
        losses.log_cosh_loss: 1,
        lambda a, b: losses.huber_loss(a, b, delta): delta,
        lambda a, b: losses.quantile_loss(a, b, q): max(q, 1 - q),
    }
    for loss, bound in bounds.items():
        for point in (f, y + 50, y - 50):
            point = point.clone().requires_grad_()
            (slope,) = torch.autograd.grad(loss(point, y), point)
            assert slope.abs().item() <= bound + 1e-12
        steepest = max(abs((loss(y + side * 51, y) - loss(y + side * 50, y)).item()) for side in (-1, 1))
        assert steepest == pytest.approx(bound, rel=1e-9)
    point = f.clone().requires_grad_()
    (slope,) = torch.autograd.grad(losses.squared_error(point, y), point)
    torch.testing.assert_close(slope, 2 * (f - y))
    (slope,) = torch.autograd.grad(losses.log_cosh_loss(point, y), point)
    torch.testing.assert_close(slope, torch.tanh(f - y))


def test_slopes_of_the_relative_losses():
    forecast, actual = make(6)
    forecast.requires_grad_()
    (slope,) = torch.autograd.grad(losses.percentage_error(forecast, actual, reduction="sum"), forecast)
    torch.testing.assert_close(slope.abs(), 1 / actual)
    (slope,) = torch.autograd.grad(losses.relative_absolute_error(forecast, actual), forecast)
    torch.testing.assert_close(slope.abs(), torch.ones(6).double() / (actual - actual.mean()).abs().sum())
    (slope,) = torch.autograd.grad(losses.root_squared_error(1e6 * forecast, actual), forecast)
    assert slope.norm() <= 1e6 / 6**0.5 + 1e-6


@FEW
@given(st.floats(-30, 30))
def test_limits(e):
    f, y = tensors(0.0, e)
    huge, tiny = losses.huber_loss(f, y, 1e6), losses.huber_loss(f, y, 1e-9) / 1e-9
    torch.testing.assert_close(huge, losses.squared_error(f, y) / 2)
    torch.testing.assert_close(tiny, losses.absolute_error(f, y), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(losses.quantile_loss(f, y, 0.5), losses.absolute_error(f, y) / 2)
    cosh = losses.log_cosh_loss(f, y).item()
    assert abs(e) - math.log(2) - 1e-12 <= cosh <= min(e * e / 2, abs(e)) + 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_log_cosh_keeps_its_digits(dtype):
    sizes = [0.0, 1e-12, 1e-6, 1e-3, 0.999, 1.0, 1.001, 20.0, 700.0, 1e4]
    y = torch.tensor(sizes, dtype=dtype, requires_grad=True)
    found = losses.log_cosh_loss(torch.zeros_like(y), y, reduction="none")
    with mpmath.workdps(60):
        expected = [float(mpmath.log(mpmath.cosh(mpmath.mpf(v)))) for v in y.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=dtype), rtol=8 * torch.finfo(dtype).eps, atol=0)
    (slope,) = torch.autograd.grad(found.sum(), y)
    torch.testing.assert_close(slope, torch.tanh(y.detach()), rtol=1e-5 if dtype == torch.float32 else 1e-14, atol=0)


@pytest.mark.parametrize("name", [*SINGLE, *WHOLE])
def test_gradients(name):
    forecast, actual = make(5)
    loss = getattr(losses, name)
    assert torch.autograd.gradcheck(loss, (forecast.requires_grad_(), actual.requires_grad_()))
    assert torch.autograd.gradgradcheck(loss, (forecast, actual))


def test_scale():
    """What happens to each loss when actual values and forecasts are measured in another unit."""
    forecast, actual = make(30)
    same = (
        "percentage_error",
        "relative_absolute_error",
        "relative_squared_error",
        "normalised_root_error",
        "relative_root_error",
    )
    once = ("absolute_error", "bias_error", "quantile_loss", "root_squared_error")
    for name, power in [*((n, 0) for n in same), *((n, 1) for n in once), ("squared_error", 2)]:
        loss = getattr(losses, name)
        torch.testing.assert_close(loss(7 * forecast, 7 * actual), 7**power * loss(forecast, actual))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_perfect_and_extreme_forecasts(dtype):
    y = torch.tensor([1.0, 2.0, 4.0], dtype=dtype)
    for name in [*SINGLE, *WHOLE]:
        loss, forecast = getattr(losses, name), y.clone().requires_grad_()
        value = loss(forecast, y)
        assert value.dtype == dtype
        assert value == 0
        assert torch.autograd.grad(value, forecast)[0].isfinite().all()
    for name in ("absolute_error", "huber_loss", "log_cosh_loss", "quantile_loss"):
        far = getattr(losses, name)(y - 1e4, y)
        expected = 1e4 / 2 if name == "quantile_loss" else 1e4
        assert far.item() == pytest.approx(expected, rel=max(2e-4, 4 * torch.finfo(dtype).eps))


def test_empty_and_single():
    empty, one = torch.zeros(0, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    for name in SINGLE:
        loss = getattr(losses, name)
        assert loss(empty, empty).isnan()
        assert loss(empty, empty, reduction="sum") == 0
        assert loss(empty, empty, reduction="none").shape == (0,)
        assert loss(one, one + 1).shape == ()
    for name in WHOLE:
        loss = getattr(losses, name)
        assert loss(empty, empty).isnan()
        assert loss(one, one + 1).shape == ()
    assert losses.relative_squared_error(one, one + 1) == math.inf
    assert losses.logarithmic_error(one - 4, one).isnan()


def test_bad_input_is_refused():
    forecast, actual = make(6)
    for name in [*SINGLE, *WHOLE]:
        loss = getattr(losses, name)
        for f, y in (
            (forecast[:5], actual),
            (forecast.float(), actual),
            (forecast.long(), actual.long()),
            (forecast[:, None], actual),
        ):
            with pytest.raises(ValueError, match="share a shape and a floating-point dtype"):
                loss(f, y)
    for name in SINGLE:
        with pytest.raises(ValueError, match="reduction is"):
            getattr(losses, name)(forecast, actual, reduction="max")
    for delta in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="delta is"):
            losses.huber_loss(forecast, actual, delta)
    for q in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="q is"):
            losses.quantile_loss(forecast, actual, q)
    actual[2] = 0
    with pytest.raises(ValueError, match="other than 0"):
        losses.percentage_error(forecast, actual)
    for low in (-1.0, -2.0, math.nan):
        actual[2] = low
        for loss in (losses.logarithmic_error, losses.root_logarithmic_error):
            with pytest.raises(ValueError, match="above -1"):
                loss(forecast, actual)
    with pytest.raises(ValueError, match="by is"):
        losses.normalised_root_error(forecast, actual, by="sum")
