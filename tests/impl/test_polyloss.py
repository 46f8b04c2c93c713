"""PolyLoss against the definition in 60 digits, against torch's own losses, and at certain, hopeless and ignored examples."""

import math

import mpmath
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from paperclaims.impl.losses.polyloss import (
    binary_poly_focal_loss,
    linear_poly_cross_entropy,
    poly_cross_entropy,
    poly_focal_loss,
    truncated_cross_entropy,
)

FEW = settings(derandomize=True, deadline=None, max_examples=30)
EPS = [-1.0, 0.0, 2.5, [0.5], [0.3, -0.2, 4.0], torch.tensor([1.0, 2.0])]


def make(*shape, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(*shape, dtype=torch.float64, generator=generator)
    return logits, torch.randint(shape[-1], shape[:-1], generator=generator)


def exact(p, eps, gamma=0.0, weight=1.0):
    """The loss of a target probability given as an mpmath number."""
    coefficients = [eps] if isinstance(eps, float) else [float(e) for e in eps]
    bracket = -mpmath.log(p) + sum(e * (1 - p) ** (j + 1) for j, e in enumerate(coefficients))
    return float(weight * (1 - p) ** gamma * bracket)


def softmax(row, target):
    with mpmath.workdps(60):
        terms = [mpmath.exp(mpmath.mpf(z)) for z in row]
        return terms[target] / sum(terms)


@pytest.mark.parametrize("eps", EPS, ids=str)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_losses_are_the_definition(eps, gamma):
    logits, targets = make(6, 4, scale=8.0)
    with mpmath.workdps(60):
        expected = [exact(softmax(row, y), eps, gamma) for row, y in zip(logits.tolist(), targets, strict=True)]
    expected = torch.tensor(expected, dtype=torch.float64)
    losses = poly_focal_loss(logits, targets, eps, gamma=gamma, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-16)
    torch.testing.assert_close(poly_focal_loss(logits, targets, eps, gamma=gamma), losses.mean())
    torch.testing.assert_close(poly_focal_loss(logits.view(2, 3, 4), targets.view(2, 3), eps, gamma=gamma), losses.mean())
    torch.testing.assert_close(poly_focal_loss(logits, targets, eps, gamma=gamma, reduction="sum"), losses.sum())
    if gamma == 0:
        torch.testing.assert_close(poly_cross_entropy(logits, targets, eps, reduction="none"), expected, rtol=1e-12, atol=1e-16)
        torch.testing.assert_close(poly_cross_entropy(logits, targets, eps, reduction="sum"), losses.sum())


@pytest.mark.parametrize("eps", [2.0, [1.0, -0.5]], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_logits_it_is_the_same_loss(eps, smoothing):
    generator = torch.Generator().manual_seed(3)
    e, c = (torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in ((7, 5), (11, 5)))
    targets = torch.tensor([0, 10, 3, -100, 3, 7, 1])
    fused = linear_poly_cross_entropy(e, c, targets, eps, label_smoothing=smoothing)
    plain = poly_cross_entropy(e @ c.T, targets, eps, label_smoothing=smoothing)
    torch.testing.assert_close(fused, plain)
    for ours, true in zip(*(torch.autograd.grad(loss, (e, c)) for loss in (fused, plain)), strict=True):
        torch.testing.assert_close(ours, true)


def test_defaults():
    logits, targets = make(5, 3)
    torch.testing.assert_close(poly_cross_entropy(logits, targets), poly_cross_entropy(logits, targets, 1.0, reduction="mean"))
    torch.testing.assert_close(poly_focal_loss(logits, targets), poly_focal_loss(logits, targets, 1.0, gamma=2.0))
    yes = torch.rand(5, 3, generator=torch.Generator().manual_seed(1)) < 0.5
    torch.testing.assert_close(binary_poly_focal_loss(logits, yes), binary_poly_focal_loss(logits, yes, 1.0, gamma=2.0))


@pytest.mark.parametrize("alpha", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_binary_loss_is_the_definition(alpha, gamma):
    logits, _ = make(4, 5, scale=6.0)
    targets = torch.rand(4, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    for eps in (-1.0, [0.3, 2.0]):
        with mpmath.workdps(60):
            expected = []
            for z, yes in zip(logits.flatten().tolist(), targets.flatten().tolist(), strict=True):
                weight = 1.0 if alpha is None else alpha if yes else 1 - alpha
                expected.append(exact(1 / (1 + mpmath.exp(-z if yes else mpmath.mpf(z))), eps, gamma, weight))
        expected = torch.tensor(expected, dtype=torch.float64).view(4, 5)
        for given_targets in (targets, targets.double(), targets.long()):
            losses = binary_poly_focal_loss(logits, given_targets, eps, gamma=gamma, alpha=alpha, reduction="none")
            torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-16)
        torch.testing.assert_close(binary_poly_focal_loss(logits, targets, eps, gamma=gamma, alpha=alpha), losses.mean())


def test_special_cases_are_torchs():
    logits, targets = make(7, 5)
    plain = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(poly_cross_entropy(logits, targets, 0.0, reduction="none"), plain)
    torch.testing.assert_close(poly_cross_entropy(logits, targets, [], reduction="none"), plain)
    torch.testing.assert_close(poly_focal_loss(logits, targets, 0.0, gamma=0.0, reduction="none"), plain)
    yes = F.one_hot(targets, 5).double()
    torch.testing.assert_close(
        binary_poly_focal_loss(logits, yes, 0.0, gamma=0.0), F.binary_cross_entropy_with_logits(logits, yes)
    )
    one = truncated_cross_entropy(logits, targets, 1, reduction="none")
    torch.testing.assert_close(one, 1 - logits.softmax(-1).gather(-1, targets[:, None]).squeeze(-1))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_label_smoothing(smoothing):
    logits, targets = make(7, 5)
    smooth = (1 - smoothing) * F.one_hot(targets, 5) + smoothing / 5
    expected = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none")
    rest = (smooth * (1 - logits.softmax(-1))).sum(-1)
    losses = poly_cross_entropy(logits, targets, [1.5, -0.5], label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(losses, expected + 1.5 * rest - 0.5 * rest**2)


@FEW
@given(st.floats(1e-6, 1 - 1e-9), st.integers(1, 60))
def test_series_converges_within_its_remainder(p, terms):
    logits = torch.tensor([[math.log(p) - math.log1p(-p), 0.0]], dtype=torch.float64)
    target = torch.tensor([0])
    missing = (F.cross_entropy(logits, target) - truncated_cross_entropy(logits, target, terms)).item()
    assert -1e-13 <= missing <= (1 - p) ** (terms + 1) / ((terms + 1) * p) + 1e-13
    with mpmath.workdps(40):
        exact_p = 1 / (1 + mpmath.exp(-mpmath.mpf(logits[0, 0].item())))
        expected = float(sum((1 - exact_p) ** j / j for j in range(1, terms + 1)))
    assert truncated_cross_entropy(logits, target, terms).item() == pytest.approx(expected, rel=1e-12)


@FEW
@given(st.integers(0, 10**6), st.floats(-1, 5))
def test_gradient_is_one_plus_eps_p_times_cross_entropys(seed, eps):
    logits, targets = make(3, 4, seed=seed)
    logits.requires_grad_()
    p = logits.softmax(-1).gather(-1, targets[:, None])
    (plain,) = torch.autograd.grad(F.cross_entropy(logits, targets, reduction="sum"), logits)
    (ours,) = torch.autograd.grad(poly_cross_entropy(logits, targets, eps, reduction="sum"), logits)
    torch.testing.assert_close(ours, (1 + eps * p) * plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_gradients(gamma):
    logits, targets = make(4, 3)
    targets[2] = -100
    logits.requires_grad_()
    yes = torch.rand(4, 3, generator=torch.Generator().manual_seed(1)) < 0.5
    for eps in (-1.0, [0.5, 2.0]):
        calls = [
            lambda z, e=eps: poly_focal_loss(z, targets, e, gamma=gamma),
            lambda z, e=eps: binary_poly_focal_loss(z, yes, e, gamma=gamma, alpha=0.3, reduction="none"),
            lambda z, e=eps: poly_cross_entropy(z, targets, e, label_smoothing=0.1, reduction="none"),
            lambda z: truncated_cross_entropy(z, targets, 3),
        ]
        for call in calls:
            assert torch.autograd.gradcheck(call, logits)
            assert torch.autograd.gradgradcheck(call, logits)
    coefficients = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda e: poly_focal_loss(logits.detach(), targets, e, gamma=gamma), coefficients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits(dtype):
    logits = torch.tensor([[1e4, -1e4, 0], [1e4, -1e4, 0], [7, 7, 7], [20, 0, 0]], dtype=dtype, requires_grad=True)
    targets = torch.tensor([0, 1, 2, 0])
    rest = -math.expm1(-math.log1p(2 * math.exp(-20)))  # 4.1e-9, lost in 1 - p_t below float64
    for gamma in (0.0, 0.5, 2.0):
        losses = poly_focal_loss(logits, targets, 2.0, gamma=gamma, reduction="none")
        assert losses.dtype == dtype
        tie = (2 / 3) ** gamma * (math.log(3) + 2 * 2 / 3)
        expected = torch.tensor([0, 2e4 + 2, tie, rest**gamma * (math.log1p(2 * math.exp(-20)) + 2 * rest)], dtype=dtype)
        tiny = 0 if dtype in (torch.float64, torch.bfloat16, torch.float32) else 1e-6
        close = {torch.float64: 1e-7, torch.float32: 1e-4}.get(dtype, 0.05)
        torch.testing.assert_close(losses[:3], expected[:3], rtol=close, atol=tiny)
        if dtype in (torch.float64, torch.float32):
            torch.testing.assert_close(losses[3], expected[3], rtol=close if dtype == torch.float64 else 0.1, atol=1e-7)
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
        assert gradient.isfinite().all()
        assert gradient[0].eq(0).all()
    yes = torch.tensor([[True, True, False], [False, False, True]])
    extreme = torch.tensor([[1e4, -1e4, 0], [1e4, -1e4, 0]], dtype=dtype, requires_grad=True)
    losses = binary_poly_focal_loss(extreme, yes, 2.0, gamma=0.5, reduction="none")
    half = 0.5**0.5 * (math.log(2) + 1)
    expected = torch.tensor([[0, 1e4 + 2, half], [1e4 + 2, 0, half]], dtype=dtype)
    torch.testing.assert_close(losses, expected, rtol=close, atol=1e-6)
    assert torch.autograd.grad(losses.sum(), extreme)[0].isfinite().all()


def test_ignored_empty_and_single():
    logits, targets = make(6, 5)
    ignoring = targets.clone()
    ignoring[[1, 4]] = 3
    kept = ignoring != 3
    calls = [
        lambda *a, **k: poly_cross_entropy(*a, 2.0, **k),
        lambda *a, **k: poly_focal_loss(*a, 2.0, gamma=0.5, **k),
        lambda *a, **k: truncated_cross_entropy(*a, 4, **k),
    ]
    for call in calls:
        losses = call(logits, ignoring, ignore_index=3, reduction="none")
        assert losses[~kept].eq(0).all()
        torch.testing.assert_close(losses[kept], call(logits[kept], ignoring[kept], reduction="none"))
        torch.testing.assert_close(call(logits, ignoring, ignore_index=3), losses[kept].mean())
        assert call(logits, torch.full_like(targets, -100)).isnan()
        assert call(logits, torch.full_like(targets, -100), reduction="sum") == 0
        assert call(logits[:0], targets[:0]).isnan()
        assert call(logits[:0], targets[:0], reduction="none").shape == (0,)
        assert call(logits[0], targets[0], reduction="none").shape == ()
    assert binary_poly_focal_loss(logits[:0], logits[:0], reduction="sum") == 0
    assert binary_poly_focal_loss(logits[:0], logits[:0]).isnan()
    assert binary_poly_focal_loss(torch.tensor(0.3), torch.tensor(1)).shape == ()


def test_bad_input_is_refused():
    logits, targets = make(6, 4)
    calls = [poly_cross_entropy, poly_focal_loss, lambda z, y, **k: truncated_cross_entropy(z, y, 2, **k)]
    for call in calls:
        for bad in (targets[:5], targets.int(), targets.double()):
            with pytest.raises(ValueError, match="targets are int64"):
                call(logits, bad)
        for bad in (logits.long(), logits[..., :0], torch.tensor(1.0)):
            with pytest.raises(ValueError, match="logits are floating"):
                call(bad, targets)
        for value in (-1, 4):
            out = targets.clone()
            out[3] = value
            with pytest.raises(ValueError, match=rf"in \[0, 4\) or -100, got {value}"):
                call(logits, out)
        with pytest.raises(ValueError, match="reduction is"):
            call(logits, targets, reduction="max")
    for eps in (math.nan, math.inf, [[1.0]], [1.0, math.nan]):
        with pytest.raises(ValueError, match="eps is"):
            poly_cross_entropy(logits, targets, eps)
    for gamma in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="gamma is"):
            poly_focal_loss(logits, targets, gamma=gamma)
    for smoothing in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="label_smoothing is"):
            poly_cross_entropy(logits, targets, label_smoothing=smoothing)
    for terms in (0, -1):
        with pytest.raises(ValueError, match="terms is"):
            truncated_cross_entropy(logits, targets, terms)
    yes = torch.ones_like(logits)
    for bad in (yes[:5], yes[:, :3]):
        with pytest.raises(ValueError, match="share their shape"):
            binary_poly_focal_loss(logits, bad)
    with pytest.raises(ValueError, match="share their shape"):
        binary_poly_focal_loss(logits.long(), yes)
    for bad in (yes * 0.5, yes * 2, yes * math.nan, -yes):
        with pytest.raises(ValueError, match="0 or 1"):
            binary_poly_focal_loss(logits, bad)
    for alpha in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="alpha is"):
            binary_poly_focal_loss(logits, yes, alpha=alpha)
    with pytest.raises(ValueError, match="reduction is"):
        binary_poly_focal_loss(logits, yes, reduction="max")
