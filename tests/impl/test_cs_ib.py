"""Cauchy-Schwarz estimators against sums over Gram matrices, quadrature and closed forms; their properties and extremes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paperclaims.impl.losses.cs_ib import (
    conditional_cs_divergence,
    cs_divergence,
    cs_ib_loss,
    cs_information,
    gaussian_cs_divergence,
    median_distance,
    normalized_cs_information,
)

FEW = settings(derandomize=True, deadline=None, max_examples=20)


def make(n=9, d=3, k=2, seed=0):
    """Inputs (n, d), representations (n, k), responses and predictions (n,)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (n, d), (n, k), (n,), (n,)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def gram(a, b, width):
    """Gaussian kernels, entry by entry, as an array."""
    a, b = (z.detach().reshape(len(z), -1).numpy() for z in (a, b))
    return np.array([[math.exp(-sum((p - q) ** 2) / (2 * width**2)) for q in b] for p in a])


@pytest.mark.parametrize("dense", [False, True])
def test_divergence_is_the_formula(dense):
    x, y = make()[0], make(7, seed=1)[0]
    expected = math.log(gram(x, x, 0.8).sum()) + math.log(gram(y, y, 0.8).sum()) - 2 * math.log(gram(x, y, 0.8).sum())
    assert cs_divergence(x, y, 0.8, dense=dense).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("weighting", ["published", "released"])
def test_conditional_divergence_is_the_formula(dense, weighting):
    x, _, y, predictions = make()
    k = gram(x, x, 1.3)
    below = k.sum(1) ** 2 if weighting == "published" else (k**2).sum(1)
    pairs = (y, y), (predictions, predictions), (predictions, y)
    first, second, cross = (math.log(((k * gram(a, b, 0.7)).sum(1) / below).sum()) for a, b in pairs)
    ours = conditional_cs_divergence(x, y, predictions, 0.7, 1.3, weighting=weighting, dense=dense)
    assert ours.item() == pytest.approx(first + second - 2 * cross, rel=1e-11)
    column = conditional_cs_divergence(x, y[:, None], predictions[:, None], 0.7, 1.3, weighting=weighting, dense=dense)
    torch.testing.assert_close(column, ours)
    same = conditional_cs_divergence(x, y, predictions, 0.7, 0.7, weighting=weighting, dense=dense)
    torch.testing.assert_close(conditional_cs_divergence(x, y, predictions, 0.7, weighting=weighting, dense=dense), same)


@pytest.mark.parametrize("dense", [False, True])
def test_information_is_the_formula(dense):
    x, t, *_ = make()
    k, q, n = gram(x, x, 1.2), gram(t, t, 0.6), len(x)
    first, second = math.log(np.trace(k @ q) / n**2), math.log(k.sum() * q.sum() / n**4)
    expected = first + second - 2 * math.log((k @ q).sum() / n**3)
    assert cs_information(x, t, 1.2, 0.6, dense=dense).item() == pytest.approx(expected, rel=1e-11)
    torch.testing.assert_close(cs_information(x, t, 1.2, dense=dense), cs_information(x, t, 1.2, 1.2, dense=dense))
    own = [cs_information(z, z, width) for z, width in ((x, 1.2), (t, 0.6))]
    expected = expected / math.sqrt(own[0] * own[1])
    assert normalized_cs_information(x, t, 1.2, 0.6, dense=dense).item() == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("weighting", ["published", "released"])
def test_objective(weighting):
    x, t, y, predictions = make()
    prediction = conditional_cs_divergence(x, y, predictions, 0.9, weighting=weighting)
    plain, scaled = cs_information(x, t, 0.9), normalized_cs_information(x, t, 0.9)
    ours = cs_ib_loss(x, t, y, predictions, 0.3, 0.9, weighting=weighting)
    torch.testing.assert_close(ours, prediction + 0.3 * scaled)
    ours = cs_ib_loss(x, t, y, predictions, 0.3, 0.9, weighting=weighting, normalized=False)
    torch.testing.assert_close(ours, prediction + 0.3 * plain)
    torch.testing.assert_close(cs_ib_loss(x, t * math.nan, y, predictions, 0.0, 0.9, weighting=weighting), prediction)


def test_divergence_is_that_of_the_density_estimates():
    """Kernels of width s between samples are overlaps of densities with kernels of width s / sqrt(2), by quadrature."""
    x, y = make(6, 1)[0], make(5, 1, seed=1)[0]
    grid = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    p, q = ((-(grid[:, None] - z[:, 0]).square() / 0.5).exp().mean(1) for z in (x, y))
    expected = (p * p).sum().log() + (q * q).sum().log() - 2 * (p * q).sum().log()
    torch.testing.assert_close(cs_divergence(x, y, 0.5**0.5), expected, rtol=1e-9, atol=1e-12)


def test_samples_of_two_sizes_side_by_side():
    x, y = make(6, 3)[0].view(2, 3, 3), make(10, 3, seed=1)[0].view(2, 5, 3)
    torch.testing.assert_close(cs_divergence(x, y), torch.stack([cs_divergence(*pair, 1.0) for pair in zip(x, y, strict=True)]))


def test_normal_distributions():
    """Closed form against quadrature in one dimension, independent axes, and large samples."""
    grid = torch.linspace(-15, 15, 20001, dtype=torch.float64)
    p, q = (torch.distributions.Normal(m, s).log_prob(grid).exp() for m, s in ((0.3, 0.8), (-0.5, 1.5)))
    expected = (p * p).sum().log() + (q * q).sum().log() - 2 * (p * q).sum().log()
    one = torch.tensor([0.3]), torch.tensor([[0.64]]), torch.tensor([-0.5]), torch.tensor([[2.25]])
    torch.testing.assert_close(gaussian_cs_divergence(*(z.double() for z in one)), expected)
    means, variances = torch.tensor([[0.3, 1.0], [-0.5, 0.0]]).double(), torch.tensor([[0.64, 2.0], [2.25, 0.5]]).double()
    both = gaussian_cs_divergence(means[0], variances[0].diag(), means[1], variances[1].diag())
    alone = [
        gaussian_cs_divergence(means[0, [i]], variances[0, [i], None], means[1, [i]], variances[1, [i], None]) for i in (0, 1)
    ]
    torch.testing.assert_close(both, sum(alone))
    stacked = gaussian_cs_divergence(means[:, :1], variances[:, :1, None], means.flip(0)[:, :1], variances.flip(0)[:, :1, None])
    torch.testing.assert_close(stacked, alone[0].expand(2))
    generator = torch.Generator().manual_seed(0)
    x, y = (m + v.sqrt() * torch.randn(4000, 2, generator=generator).double() for m, v in zip(means, variances, strict=True))
    smoothed = gaussian_cs_divergence(
        means[0], variances[0].diag() + torch.eye(2) / 8, means[1], variances[1].diag() + torch.eye(2) / 8
    )
    assert cs_divergence(x, y, 0.5).item() == pytest.approx(smoothed.item(), abs=0.05)


@FEW
@given(st.integers(0, 10**6), st.floats(0.05, 20))
def test_never_negative_and_zero_for_equals(seed, width):
    x, t, y, predictions = make(seed=seed)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    values = [
        cs_divergence(x, x + t[:, :1], width),
        cs_information(x, t, width),
        conditional_cs_divergence(x, y, predictions, width),
    ]
    assert min(values) > -1e-12
    torch.testing.assert_close(cs_information(x[order], t[order], width), values[1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(conditional_cs_divergence(x[order], y[order], predictions[order], width), values[2])
    assert abs(cs_divergence(x, x[order], width)) < 1e-12
    assert abs(conditional_cs_divergence(x, y, y, width)) < 1e-12
    constant = torch.ones(9, 1, dtype=x.dtype)
    assert abs(cs_information(x, constant, width)) < 1e-12
    grid = torch.cartesian_prod(y[:3], predictions[:3])  # every pair once: independent
    assert abs(cs_information(grid[:, :1], grid[:, 1:], width)) < 1e-12


@pytest.mark.parametrize("dense", [False, True])
def test_gradients(dense):
    x, t, y, predictions = make(6)
    leaves = x, t.requires_grad_(), y, predictions.requires_grad_()
    for weighting in ("published", "released"):
        for normalized in (False, True):
            arguments = {"weighting": weighting, "normalized": normalized, "dense": dense}
            call = lambda *z, a=arguments: cs_ib_loss(*z, 0.5, 0.9, **a)  # noqa: E731
            assert torch.autograd.gradcheck(call, leaves)
            if dense:
                assert torch.autograd.gradgradcheck(call, leaves)
    assert torch.autograd.gradcheck(lambda a, b: cs_divergence(a, b, 0.9), (x.requires_grad_(), t.detach()[:, :1] + x.detach()))


def test_models_side_by_side():
    parts = [torch.stack(z) for z in zip(*(make(seed=s) for s in range(6)), strict=True)]
    batched = cs_ib_loss(*(z.unflatten(0, (2, 3)) for z in parts), 0.5)
    assert batched.shape == (2, 3)
    alone = torch.stack([cs_ib_loss(*(z[i] for z in parts), 0.5) for i in range(6)])
    torch.testing.assert_close(batched.flatten(), alone)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_extremes(dtype):
    """Far predictions, where every kernel underflows; ties; one row."""
    x, t, y, predictions = (z.to(getattr(torch, dtype)) for z in make())
    far = (predictions + 1e4).requires_grad_()
    for dense in (False, True):
        value = conditional_cs_divergence(x, y, far, dense=dense)
        assert 0.9e8 < value.item() < 1.1e8
        (grad,) = torch.autograd.grad(value, far)
        assert grad.isfinite().all()
        assert grad.sum() > 0
        assert abs(conditional_cs_divergence(x, y * 0, y * 0, dense=dense)) < 1e-5
        assert abs(cs_information(x * 0, t * 0, dense=dense)) < 1e-5
        assert normalized_cs_information(x * 0, t, dense=dense).isnan()
        assert abs(cs_information(x[:1], t[:1], dense=dense)) < 1e-5
        assert abs(cs_divergence(1e4 * x, 1e4 * x, dense=dense)) < 1e-5


@pytest.mark.parametrize("dense", [False, True])
def test_moving_everything_changes_nothing(dense):
    x, t, y, predictions = (z.float() for z in make())
    near = torch.stack([conditional_cs_divergence(x, y, predictions, dense=dense), cs_information(x, t, dense=dense)])
    x, t, y, predictions = (z + 1000 for z in (x, t, y, predictions))
    far = torch.stack([conditional_cs_divergence(x, y, predictions, dense=dense), cs_information(x, t, dense=dense)])
    torch.testing.assert_close(far, near, rtol=2e-3, atol=2e-3)  # the inputs themselves are rounded at 1000
    half = cs_information(x.half(), t.half(), dense=dense)
    assert half.dtype == torch.float32


def test_median_distance():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]], requires_grad=True)
    assert median_distance(x) == pytest.approx(math.sqrt(18))
    for bad in (x[:1], x[0]):
        with pytest.raises(ValueError, match="two rows"):
            median_distance(bad)


def test_bad_input_is_refused():
    x, t, y, predictions = make()
    for bad in (x[0], x[:0], x[:, :0]):
        with pytest.raises(ValueError, match="at least one row and one column"):
            cs_divergence(bad, x)
        with pytest.raises(ValueError, match="at least one row and one column"):
            cs_information(x, bad)
    with pytest.raises(ValueError, match="one number of columns"):
        cs_divergence(x, t)
    with pytest.raises(ValueError, match="floating-point"):
        cs_divergence(x, x.float())
    with pytest.raises(ValueError, match="floating-point"):
        cs_information(x.long(), t)
    with pytest.raises(ValueError, match="paired"):
        cs_information(x, t[:5])
    with pytest.raises(ValueError, match="paired"):
        conditional_cs_divergence(x, y, predictions[:5])
    with pytest.raises(ValueError, match="predictions have the shape of y"):
        conditional_cs_divergence(x, y, torch.stack([predictions, predictions], -1))
    with pytest.raises(ValueError, match="weighting is"):
        conditional_cs_divergence(x, y, predictions, weighting="none")
    for width in (0, -1.0, math.inf, math.nan):
        for call in (
            lambda w: cs_divergence(x, x, w),
            lambda w: cs_information(x, t, w),
            lambda w: cs_information(x, t, 1.0, w),
            lambda w: conditional_cs_divergence(x, y, predictions, w),
            lambda w: conditional_cs_divergence(x, y, predictions, 1.0, w),
        ):
            with pytest.raises(ValueError, match="a width is"):
                call(width)
    for beta in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="beta is"):
            cs_ib_loss(x, t, y, predictions, beta)
    one = torch.eye(2)
    for bad in (
        (y[:2].float(), one, y[:3].float(), one),
        (y[:2].float(), one[:1], y[:2].float(), one),
        (y[:2], one, y[:2], one[:1, :1]),
    ):
        with pytest.raises(ValueError, match="means are"):
            gaussian_cs_divergence(*bad)
