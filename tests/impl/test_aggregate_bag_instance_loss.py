"""Bag and instance losses against loops, the linear fit against normal equations, the risk against known special cases."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from paperclaims.impl.losses.aggregate_bag_instance_loss import (
    bag_loss,
    best_private_bag_size,
    fit_linear,
    instance_loss,
    interpolating_loss,
    predicted_risk,
    private_means,
    within_bag_variance,
)

FEW = settings(derandomize=True, deadline=None, max_examples=30)
ABSOLUTE = partial(F.l1_loss, reduction="none")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_losses_are_their_loops():
    f, means = normal(2, 3, 4), normal(2, 3, seed=1)
    for loss in (torch.nn.functional.mse_loss, torch.nn.functional.l1_loss):
        form = partial(loss, reduction="none")
        for row in range(2):
            bags = [loss(f[row, a].mean(), means[row, a]).item() for a in range(3)]
            samples = [loss(f[row, a, i], means[row, a]).item() for a in range(3) for i in range(4)]
            assert bag_loss(f, means, form)[row].item() == pytest.approx(sum(bags) / 3, rel=1e-13)
            assert instance_loss(f, means, form)[row].item() == pytest.approx(sum(samples) / 12, rel=1e-13)
    torch.testing.assert_close(bag_loss(f, means), bag_loss(f, means, partial(F.mse_loss, reduction="none")))
    torch.testing.assert_close(instance_loss(f, means), instance_loss(f, means, partial(F.mse_loss, reduction="none")))
    deviations = [(f[0, a, i] - f[0, a].mean()).item() ** 2 for a in range(3) for i in range(4)]
    assert within_bag_variance(f)[0].item() == pytest.approx(sum(deviations) / 12, rel=1e-13)
    for rho in (0.0, 0.3, 1.0, 2.0):
        expected = (1 - rho) * bag_loss(f, means) + rho * instance_loss(f, means)
        torch.testing.assert_close(interpolating_loss(f, means, rho), expected)


@FEW
@given(st.integers(0, 10**6), st.integers(1, 5), st.floats(0.1, 1e4))
def test_penalty(seed, k, scale):
    f, means = scale * normal(6, k, seed=seed), scale * normal(6, seed=seed + 1)
    extra = instance_loss(f, means) - bag_loss(f, means)
    torch.testing.assert_close(extra, within_bag_variance(f), rtol=1e-9, atol=1e-12 * scale**2)
    assert instance_loss(f, means, ABSOLUTE) >= bag_loss(f, means, ABSOLUTE) - 1e-12 * scale


def test_gradients_dtypes_and_edges():
    f, means = normal(2, 3, 2).requires_grad_(), normal(2, 3, seed=1).requires_grad_()
    for form in (bag_loss, instance_loss, lambda f, y: interpolating_loss(f, y, 0.4)):
        assert torch.autograd.gradcheck(form, (f, means))
        assert form(f.half(), means.half()).dtype == torch.float16
        assert form(f[:, :0], means[:, :0]).isnan().all()
        assert form(f[:0], means[:0]).shape == (0,)
    assert torch.autograd.gradcheck(within_bag_variance, f)
    one = normal(3, 1)
    assert within_bag_variance(one) == 0
    far = torch.tensor([[-300.0, 300.0], [1.0, 1.0]], dtype=torch.float16)
    assert within_bag_variance(far).item() == pytest.approx(45_000, rel=1e-3)
    assert bag_loss(one, one.squeeze(1)) == 0
    assert instance_loss(1e4 * torch.ones(1, 1), -1e4 * torch.ones(1)) == 4e8


@pytest.mark.parametrize("k", [1, 2, 5])
def test_fit_is_the_minimum(k):
    x, means = normal(2, 20, k, 4), normal(2, 20, 3, seed=1)
    center = x.mean(2, keepdim=True)
    between = center.squeeze(2).mT @ center.squeeze(2) / 20
    within = (x - center).flatten(1, 2)
    within = within.mT @ within / (20 * k)
    for rho, ridge in ((0.0, 0.0), (0.5, 0.0), (1.0, 0.2), (0.0, 3.0)):
        theta = fit_linear(x, means, rho, ridge)
        gram = between + rho * within + ridge * torch.eye(4, dtype=torch.float64)
        torch.testing.assert_close(theta, torch.linalg.solve(gram, center.squeeze(2).mT @ means / 20))

        def objective(theta, row=0, rho=rho, ridge=ridge):
            return interpolating_loss((x[row] @ theta).squeeze(-1), means[row, :, 0], rho) + ridge * theta.square().sum()

        at_minimum = theta[0, :, :1].clone().requires_grad_()
        (slope,) = torch.autograd.grad(objective(at_minimum), at_minimum)
        assert slope.abs().max() < 1e-12
    assert fit_linear(x[0].float(), means[0].float(), 0.5).dtype == torch.float32
    torch.testing.assert_close(fit_linear(x, means, 0.5), fit_linear(x, means, 0.5, 0.0))


def test_fit_of_least_norm():
    x, means = normal(3, 2, 8), normal(3, 1, seed=1)
    torch.testing.assert_close(fit_linear(x, means, 0.0), torch.linalg.pinv(x.mean(1)) @ means)
    limit = fit_linear(x, means, 0.5, 1e-9)
    torch.testing.assert_close(fit_linear(x, means, 0.5), limit, rtol=1e-5, atol=1e-6)
    assert fit_linear(torch.zeros(0, 4, 2, 3), torch.zeros(0, 4, 1), 0.5, 0.1).shape == (0, 3, 1)


def test_risk_of_known_cases():
    # Bags of one are ordinary least squares, a bag loss has n / k rows of the same noise: d / (rows - d) in the limit
    assert predicted_risk(800, 200, 1, 0.0) == pytest.approx(200 / 600, rel=1e-10)
    assert predicted_risk(800, 200, 1, 0.7, noise=2.5) == pytest.approx(2.5 * 200 / 600, rel=1e-10)
    assert predicted_risk(800, 200, 2, 0.0, signal=7.0) == pytest.approx(200 / 200, rel=1e-10)
    # Without samples' worth of signal the estimate is 0, or its risk the signal alone
    assert predicted_risk(100, 50, 2, 0.3, 1e9, signal=3.0) == pytest.approx(3.0, rel=1e-6)
    # Ridge by the Marchenko-Pastur law: Stieltjes transform v of Z'Z / n at -ridge, and its derivative
    ratio, ridge = 0.5, 0.3
    root = math.sqrt((1 - ratio + ridge) ** 2 + 4 * ratio * ridge)
    v = (-(1 - ratio + ridge) + root) / (2 * ratio * ridge)
    slope = ((1 - ratio + ridge + 2 * ratio) / root - 1) / (2 * ratio * ridge) - v / ridge
    expected = ridge**2 * -slope * 2.0 + ratio * 1.5 * (v + ridge * slope)
    assert predicted_risk(400, 200, 1, 0.0, ridge, signal=2.0, noise=1.5) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("k", "rho", "ridge"), [(2, 0.4, 0.0), (4, 1.0, 0.2), (2, 0.0, 0.5), (4, 0.3, 0.0)])
def test_risk_is_that_of_large_designs(k, rho, ridge):
    n, d, found = 720, 240, []
    for seed in range(3):
        x = normal(n // k, k, d, seed=seed)
        by_mean = fit_linear(x, torch.eye(n // k, dtype=torch.float64), rho, ridge)
        miss = by_mean @ x.mean(1) - torch.eye(d, dtype=torch.float64)
        found.append((2 / d * miss.square().sum() + 3 / k * by_mean.square().sum()).item())
    assert predicted_risk(n, d, k, rho, ridge, signal=2.0, noise=3.0) == pytest.approx(sum(found) / 3, rel=0.02)


def test_private_means():
    generator = torch.Generator().manual_seed(0)
    y = 3 * normal(12)
    plain = private_means(y, 4, math.inf, 2.0)
    torch.testing.assert_close(plain, y.clamp(-2, 2).view(3, 4).mean(1))
    torch.testing.assert_close(private_means(y, 12, math.inf, 1e9), y.mean().unsqueeze(0))
    noise = private_means(torch.zeros(400_000), 2, 0.5, 1.5, generator=generator).double()
    scale = 2 * 1.5 / (2 * 0.5)
    assert noise.abs().mean().item() == pytest.approx(scale, rel=0.02)  # a standard error of 0.2 %
    assert noise.square().mean().item() == pytest.approx(2 * scale**2, rel=0.04)
    assert noise.mean().abs() < 0.02 * scale
    assert (noise.abs() > scale * math.log(10)).double().mean().item() == pytest.approx(0.1, abs=0.004)
    assert private_means(y.view(2, 6).float(), 3, 1.0, 1.0).shape == (2, 2)
    assert private_means(y.float(), 3, 1.0, 1.0).dtype == torch.float32
    assert private_means(y[:0], 3, 1.0, 1.0).shape == (0,)


def test_best_size_is_the_formulas_minimum():
    n, d, clip, signal = 3000, 30, 4.0, 1.7
    for epsilon, noise in ((0.5, 1.0), (1.0, 2.0), (3.0, 0.5)):
        variance = 2 * (2 * clip / epsilon) ** 2

        def risk(k, noise=noise, variance=variance):
            return signal * (1 - 1 / k) ** 2 + d / n * ((signal + noise) / k + variance / k**2)

        best = best_private_bag_size(n, d, epsilon, clip, signal=signal, noise=noise)
        assert risk(best) < min(risk(0.999 * best), risk(1.001 * best))
    assert best_private_bag_size(100, 10, math.inf, 1.0, signal=1.0, noise=1.0) == pytest.approx(1 / 0.9)
    assert best_private_bag_size(10, 10, 1.0, 1.0, signal=1.0, noise=1.0) == math.inf
    assert best_private_bag_size(10, 10, 1.0, 1.0) == math.inf


def test_bad_input_is_refused():
    f, means = normal(3, 4), normal(3)
    for form in (bag_loss, instance_loss, lambda f, y: interpolating_loss(f, y, 0.5)):
        for bad in ((f, means[:2]), (f[:, :0], means), (f[0], means[0]), (f, f)):
            with pytest.raises(ValueError, match="predictions are"):
                form(*bad)
        for bad in ((f.long(), means), (f, means.long())):
            with pytest.raises(ValueError, match="floating point"):
                form(*bad)
    for bad in (f[0], f[:, :0]):
        with pytest.raises(ValueError, match="predictions are"):
            within_bag_variance(bad)
    with pytest.raises(ValueError, match="floating point"):
        within_bag_variance(f.long())
    for rho in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="rho is a number"):
            interpolating_loss(f, means, rho)
        with pytest.raises(ValueError, match="rho is a number"):
            predicted_risk(10, 2, 1, rho)
    x, y = normal(3, 4, 2), normal(3, 1)
    for bad in ((x, y[:2]), (x, y[:, 0]), (x[0], y[:, 0]), (x[:, :0], y), (x[:0], y[:0]), (x[..., :0], y)):
        with pytest.raises(ValueError, match="x is"):
            fit_linear(*bad, 0.5)
    for bad in ((x.long(), y.long()), (x, y.float())):
        with pytest.raises(ValueError, match="share float32 or float64"):
            fit_linear(*bad, 0.5)
    for weights in ((-1.0, 0.0), (0.0, -1.0), (math.inf, 0.0)):
        with pytest.raises(ValueError, match="is a number from 0 on"):
            fit_linear(x, y, *weights)
    for sizes in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            predicted_risk(*sizes, 0.5, 0.1)
    for sizes in ((200, 200, 1, 1.0), (200, 100, 2, 0.0), (200, 100, 4, 0.0)):
        with pytest.raises(ValueError, match="have to be more than the features"):
            predicted_risk(*sizes)
    assert predicted_risk(200, 100, 4, 0.1) > 0
    for name in ("signal", "noise"):
        with pytest.raises(ValueError, match=f"{name} is"):
            predicted_risk(10, 2, 1, 0.0, **{name: -1.0})
        with pytest.raises(ValueError, match=f"{name} is"):
            best_private_bag_size(10, 2, 1.0, 1.0, **{name: -1.0})
    for size in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            best_private_bag_size(*size, 1.0, 1.0)
    for epsilon, clip in ((0.0, 1.0), (-1.0, 1.0), (math.nan, 1.0), (1.0, 0.0), (1.0, math.inf)):
        with pytest.raises(ValueError, match="above 0"):
            private_means(means, 1, epsilon, clip)
        with pytest.raises(ValueError, match="above 0"):
            best_private_bag_size(10, 2, epsilon, clip)
    for k in (0, 2, -1):
        with pytest.raises(ValueError, match="do not divide"):
            private_means(means, k, 1.0, 1.0)
    for bad in (means.long(), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="responses are"):
            private_means(bad, 1, 1.0, 1.0)
