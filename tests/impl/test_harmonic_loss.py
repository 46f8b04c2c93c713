"""Harmonic loss against brute force, its plain form against the operator, its properties, its extremes."""

import math

import mpmath
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from paperclaims.impl.losses.harmonic_loss import (
    HarmonicCrossEntropy,
    harmonic_cross_entropy,
    harmonic_log_probabilities,
    harmonic_loss,
    squared_distances,
)

FEW = settings(derandomize=True, deadline=None, max_examples=20)


def make(m=6, v=4, d=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in ((m, d), (v, d)))
    return x, w, torch.randint(v, (m,), generator=generator)


@pytest.mark.parametrize("n", [0.5, 1.0, 4.0, 28.0])
def test_brute_force(n):
    x, w, targets = make()
    with mpmath.workdps(40):
        expected, chances = [], []
        for point, target in zip(x.tolist(), targets.tolist(), strict=True):
            distances = [mpmath.sqrt(sum((mpmath.mpf(a) - b) ** 2 for a, b in zip(point, c, strict=True))) for c in w.tolist()]
            powers = [distance ** (-n) for distance in distances]
            chances.append([float(power / sum(powers)) for power in powers])
            expected.append(float(-mpmath.log(powers[target] / sum(powers))))
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(harmonic_loss(x, w, targets, n, reduction="none"), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(harmonic_cross_entropy(x, w, targets, n, reduction="none"), expected, rtol=1e-10, atol=0)
    chances = torch.tensor(chances, dtype=torch.float64)
    torch.testing.assert_close(harmonic_log_probabilities(x, w, n).exp(), chances, rtol=1e-12, atol=0)


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_plain_form_is_the_operator(eps):
    x, w, targets = make(seed=1)
    targets[2] = -100
    leaves = x.requires_grad_(), w.requires_grad_()
    for reduction in ("mean", "sum", "none"):
        losses = [f(*leaves, targets, eps=eps, reduction=reduction) for f in (harmonic_loss, harmonic_cross_entropy)]
        torch.testing.assert_close(*losses, rtol=1e-11, atol=1e-13)
        grads = [torch.autograd.grad(loss.sum(), leaves) for loss in losses]
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_distances_without_the_differences():
    x, w = (torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) for shape in ((2, 6, 3), (4, 3)))
    x[0, 0] = w[1]
    x.requires_grad_()
    with_them, without = (squared_distances(x, w, 0.5, pairwise=pairwise) for pairwise in (True, False))
    torch.testing.assert_close(without, with_them, rtol=1e-12, atol=1e-12)
    slopes = [torch.autograd.grad(found.square().sum(), x)[0] for found in (with_them, without)]
    torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-10)


def test_squared_distances_and_their_softening():
    x, w, _ = make()
    expected = torch.tensor([[sum((a - b) ** 2 for a, b in zip(p, c, strict=True)) for c in w.tolist()] for p in x.tolist()])
    torch.testing.assert_close(squared_distances(x, w), expected.double(), rtol=1e-6, atol=0)
    soft = squared_distances(x, w, 0.5) - squared_distances(x, w)
    torch.testing.assert_close(soft, (x.square().sum(1)[:, None] + w.square().sum(1)) / 2)


def test_default_exponent_is_the_root_of_the_dimension():
    x, w, targets = make(d=9)
    torch.testing.assert_close(harmonic_loss(x, w, targets), harmonic_loss(x, w, targets, 3.0))
    torch.testing.assert_close(harmonic_cross_entropy(x, w, targets), harmonic_loss(x, w, targets, 3.0))
    assert HarmonicCrossEntropy(9, 4).n == 3
    assert HarmonicCrossEntropy(9, 4, 2.0).n == 2


def test_released_code():
    """The authors' layer raises squared distances to -n: twice the exponent."""
    x, w, targets = make(d=4)
    powers = torch.cdist(x, w).square() ** -2.0
    log_p = (powers / powers.sum(1, keepdim=True)).log()
    torch.testing.assert_close(harmonic_log_probabilities(x, w, 2 * 2.0), log_p)
    torch.testing.assert_close(harmonic_loss(x, w, targets, 2 * 2.0), F.nll_loss(log_p, targets))


@FEW
@given(st.integers(0, 10**6), st.floats(1e-3, 1e3), st.floats(0.3, 30), st.floats(0, 1))
def test_scaling_and_moving_change_nothing(seed, scale, n, eps):
    x, w, targets = make(seed=seed)
    losses = harmonic_loss(x, w, targets, n, eps=eps, reduction="none")
    torch.testing.assert_close(
        harmonic_loss(scale * x, scale * w, targets, n, eps=eps, reduction="none"), losses, rtol=1e-9, atol=1e-12
    )
    if not eps:
        torch.testing.assert_close(harmonic_loss(x + 1, w + 1, targets, n, reduction="none"), losses, rtol=1e-9, atol=1e-12)


@FEW
@given(st.integers(0, 10**6), st.floats(1.5, 12))
def test_centre_is_the_optimum(seed, n):
    """The loss falls to 0 along the way to the target's centre, and its gradient with it."""
    x, w, targets = make(seed=seed)
    last = torch.full((len(x),), math.inf, dtype=x.dtype)
    for left in (0.1, 1e-2, 1e-4, 0.0):
        near = (w[targets] + left * (x - w[targets])).requires_grad_()
        losses = harmonic_loss(near, w, targets, n, reduction="none")
        assert (losses < last).all()
        last = losses.detach()
    assert last.max() < 1e-100
    assert torch.autograd.grad(losses.sum(), near)[0].abs().max() < 1e-50


def test_gradients():
    x, w, targets = make()
    targets[3] = -100
    x, w = x.requires_grad_(), w.requires_grad_()
    for n in (0.5, 3.0):
        assert torch.autograd.gradcheck(lambda a, b, n=n: harmonic_loss(a, b, targets, n, eps=0.1), (x, w))
        assert torch.autograd.gradgradcheck(lambda a, b, n=n: harmonic_loss(a, b, targets, n, reduction="none"), (x, w))
    per_point = torch.func.vmap(torch.func.grad(lambda a, b, y: harmonic_loss(a[None], b, y[None], 3.0)), (0, None, 0))
    kept = targets != -100
    true = torch.autograd.grad(harmonic_loss(x, w, targets, 3.0, reduction="sum"), x)[0]
    with pytest.raises(RuntimeError):  # the check of the targets looks at values
        per_point(x[kept], w, targets[kept])
    ours = torch.autograd.grad(harmonic_cross_entropy(x, w, targets, 3.0, reduction="sum"), x)[0]
    torch.testing.assert_close(ours, true)


def test_models_side_by_side():
    x, w, targets = make(m=12, v=8)
    x, w, targets = x.view(2, 1, 6, 3), w.view(1, 2, 4, 3), (targets % 4).view(2, 1, 6).expand(2, 2, 6)
    losses = harmonic_loss(x, w, targets, 2.0, reduction="none")
    for i in range(2):
        for j in range(2):
            alone = harmonic_loss(x[i, 0], w[0, j], targets[i, j], 2.0, reduction="none")
            torch.testing.assert_close(losses[i, j], alone)
    torch.testing.assert_close(harmonic_loss(x, w, targets, 2.0), losses.mean())


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_extremes(dtype):
    dtype = getattr(torch, dtype)
    w = torch.tensor([[1e4, 0], [-1e4, 0], [0, 1e4]], dtype=dtype, requires_grad=True)
    x = torch.tensor([[1e4, 0], [-1e4, 0], [0, 0], [1e4, 0]], dtype=dtype, requires_grad=True)
    targets = torch.tensor([0, 1, 2, 1])
    for function in (harmonic_loss, harmonic_cross_entropy):
        losses = function(x, w, targets, 2.0, reduction="none")
        assert losses[:2].max() < 1e-30  # certain
        assert losses[2].item() == pytest.approx(math.log(3), rel=1e-2 if dtype == torch.bfloat16 else 1e-6)  # a tie
        assert losses[3] > 80  # on another's centre
        assert losses.isfinite().all()
        for grad in torch.autograd.grad(losses.sum(), (x, w)):
            assert grad.isfinite().all()
    on_top = torch.zeros(3, 2, dtype=dtype)
    assert harmonic_loss(on_top, on_top, targets[:3]).item() == pytest.approx(math.log(3), rel=1e-2)


def test_ignored_empty_and_single():
    x, w, targets = make()
    targets[[1, 4]] = 3
    kept = targets != 3
    losses = harmonic_loss(x, w, targets, ignore_index=3, reduction="none")
    assert losses[~kept].eq(0).all()
    torch.testing.assert_close(harmonic_loss(x, w, targets, ignore_index=3), losses[kept].mean())
    ignored = torch.full_like(targets, -100)
    assert harmonic_loss(x, w, ignored).isnan()
    assert harmonic_loss(x, w, ignored, reduction="sum") == 0
    assert harmonic_loss(x[:0], w, targets[:0], reduction="none").shape == (0,)
    assert harmonic_loss(x[:1], w[:1], targets[:1] * 0) == 0  # a single class


def test_module():
    head = HarmonicCrossEntropy(8, 5, eps=0.1, reduction="none")
    assert head.weight.shape == (5, 8)
    x, targets = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([[0, 1, 2], [3, 4, -100]])
    losses = head(x, targets)
    log_p = head.log_probabilities(x)
    expected = F.nll_loss(log_p.flatten(0, 1), targets.flatten(), reduction="none").view(2, 3)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    losses.sum().backward()
    assert head.weight.grad.abs().sum() > 0
    on_centre = head.weight.detach()[None].requires_grad_()
    assert torch.autograd.grad(head.log_probabilities(on_centre).sum(), on_centre)[0].isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(head.log_probabilities(x.bfloat16()), log_p, rtol=0.05, atol=0.05)


def test_bad_input_is_refused():
    x, w, targets = make()
    for bad in (x[0], x[:, :2], x.long(), x.float()):
        with pytest.raises(ValueError, match="x "):
            harmonic_loss(bad, w, targets)
    for bad in (w[0], w[:0], w[:, :0]):
        with pytest.raises(ValueError, match="x is"):
            harmonic_log_probabilities(x, bad)
    for n in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="n is"):
            harmonic_loss(x, w, targets, n)
    for eps in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="eps is"):
            squared_distances(x, w, eps)
    for bad in (targets[:5], targets.int()):
        with pytest.raises(ValueError, match="targets are int64"):
            harmonic_loss(x, w, bad)
    for value in (-1, 4):
        out = targets.clone()
        out[3] = value
        with pytest.raises(ValueError, match=rf"in \[0, 4\) or -100, got {value}"):
            harmonic_loss(x, w, out)
    with pytest.raises(ValueError, match="reduction is"):
        harmonic_loss(x, w, targets, reduction="max")
