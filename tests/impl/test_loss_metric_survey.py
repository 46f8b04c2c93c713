"""The survey's losses and metrics against their definitions, and every property that the table in their module states."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from sklearn import metrics

from paperclaims.impl.losses import loss_metric_survey as survey
from paperclaims.impl.losses import regression_loss_survey

FEW = settings(derandomize=True, deadline=None, max_examples=40)
SINGLE = ("poisson_loss", "binary_cross_entropy", "hinge_loss", "contrastive_loss", "triplet_loss")
# Each loss as a function of one prediction, for the targets that it may have; where the prediction may lie.
CURVES = {
    "squared": (lambda f, y: survey.squared_error(f, y, reduction="none"), (-2.0, 0.0, 3.0), (-20, 20)),
    "absolute": (lambda f, y: survey.absolute_error(f, y, reduction="none"), (-2.0, 0.0, 3.0), (-20, 20)),
    "Huber": (lambda f, y: survey.huber_loss(f, y, 1.5, reduction="none"), (-2.0, 0.0, 3.0), (-20, 20)),
    "log-cosh": (lambda f, y: survey.log_cosh_loss(f, y, reduction="none"), (-2.0, 0.0, 3.0), (-20, 20)),
    "quantile": (lambda f, y: survey.quantile_loss(f, y, 0.8, reduction="none"), (-2.0, 0.0, 3.0), (-20, 20)),
    "Poisson": (lambda f, y: survey.poisson_loss(f, y, reduction="none"), (0.0, 1.0, 4.0), (1e-3, 20)),
    "binary cross-entropy": (lambda f, y: survey.binary_cross_entropy(f, y, reduction="none"), (0.0, 1.0), (-20, 20)),
    "weighted": (lambda f, y: survey.binary_cross_entropy(f, y, 3.0, reduction="none"), (0.0, 1.0), (-20, 20)),
    "focal": (lambda f, y: survey.focal_loss(f, y, reduction="none"), (0.0, 1.0), (-20, 20)),
    "hinge": (lambda f, y: survey.hinge_loss(f, y, reduction="none"), (0.0, 1.0), (-20, 20)),
    "squared hinge": (lambda f, y: survey.hinge_loss(f, y, squared=True, reduction="none"), (0.0, 1.0), (-20, 20)),
    "contrastive": (lambda f, y: survey.contrastive_loss(f, y, 2.0, reduction="none"), (0.0, 1.0), (0, 20)),
    "triplet, positive": (lambda f, y: survey.triplet_loss(f, y, reduction="none"), (0.0, 3.0), (0, 20)),
    "triplet, negative": (lambda f, y: survey.triplet_loss(y, f, reduction="none"), (0.0, 3.0), (0, 20)),
}
CONVEX = [name for name in CURVES if name != "focal"]
SLOPES = {
    "absolute": 1,
    "Huber": 1.5,
    "log-cosh": 1,
    "quantile": 0.8,
    "binary cross-entropy": 1,
    "weighted": 3,
    "hinge": 1,
    "triplet, positive": 1,
    "triplet, negative": 1,
}
UNBOUNDED = ("squared", "Poisson", "squared hinge", "contrastive")
BROKEN = ("absolute", "quantile", "hinge", "triplet, positive", "triplet, negative")


def make(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(*shape, dtype=torch.float64, generator=generator)
    return logits, (torch.rand(*shape, generator=generator) < 0.4).double()


def boxes(n, seed=0, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    corner = spread * torch.rand(n, 2, dtype=torch.float64, generator=generator)
    return torch.cat([corner, corner + 0.2 + torch.rand(n, 2, dtype=torch.float64, generator=generator)], 1)


def slope(name, f, y):
    """Derivative of a curve by its prediction."""
    f = torch.as_tensor(f, dtype=torch.float64).clone().requires_grad_()
    value = CURVES[name][0](f, torch.full_like(f, y).detach())
    return torch.autograd.grad(value.sum(), f, create_graph=True)[0], f


def test_regression_losses_are_the_same_functions():
    for name in ("absolute_error", "huber_loss", "log_cosh_loss", "quantile_loss", "squared_error"):
        assert getattr(survey, name) is getattr(regression_loss_survey, name)
    assert all(hasattr(survey, name) for name in survey.__all__)


def test_single_losses_are_their_definitions():
    z, y = make(3, 4)
    d, other = z.abs() + 0.1, z.flip(0).abs() + 0.1
    points = list(zip(z.flatten().tolist(), y.flatten().tolist(), strict=True))
    log_p = [math.log(1 / (1 + math.exp(-a if b else a))) for a, b in points]
    expected = {
        survey.poisson_loss(d, y, reduction="none"): [
            a - b * math.log(a) for a, b in zip(d.flatten().tolist(), y.flatten().tolist(), strict=True)
        ],
        survey.binary_cross_entropy(z, y, reduction="none"): [-v for v in log_p],
        survey.binary_cross_entropy(z, y, 2.5, reduction="none"): [
            -(2.5 if b else 1) * v for v, (_, b) in zip(log_p, points, strict=True)
        ],
        survey.focal_loss(z, y, 3.0, reduction="none"): [-((1 - math.exp(v)) ** 3) * v for v in log_p],
        survey.focal_loss(z, y, alpha=0.25, reduction="none"): [
            -(0.25 if b else 0.75) * (1 - math.exp(v)) ** 2 * v for v, (_, b) in zip(log_p, points, strict=True)
        ],
        survey.hinge_loss(z, y, reduction="none"): [max(0, 1 - (a if b else -a)) for a, b in points],
        survey.hinge_loss(z, y, squared=True, reduction="none"): [max(0, 1 - (a if b else -a)) ** 2 for a, b in points],
        survey.contrastive_loss(d, y, 1.5, reduction="none"): [
            a**2 if b else max(0, 1.5 - a) ** 2 for a, b in zip(d.flatten().tolist(), y.flatten().tolist(), strict=True)
        ],
        survey.triplet_loss(d, other, 0.4, reduction="none"): [
            max(0, a - b + 0.4) for a, b in zip(d.flatten().tolist(), other.flatten().tolist(), strict=True)
        ],
    }
    for found, values in expected.items():
        assert found.shape == (3, 4)
        torch.testing.assert_close(found.flatten(), torch.tensor(values, dtype=torch.float64), rtol=1e-12, atol=1e-14)


def test_defaults_and_reductions():
    z, y = make(6)
    d = z.abs() + 0.1
    calls = {
        "poisson_loss": (d, y),
        "binary_cross_entropy": (z, y),
        "focal_loss": (z, y),
        "hinge_loss": (z, y),
        "contrastive_loss": (d, y),
        "triplet_loss": (d, d.flip(0)),
    }
    for name, arguments in calls.items():
        loss = getattr(survey, name)
        each = loss(*arguments, reduction="none")
        assert loss(*arguments).item() == pytest.approx(each.mean().item())
        assert loss(*arguments, reduction="sum").item() == pytest.approx(each.sum().item())
    assert torch.equal(survey.focal_loss(z, y), survey.focal_loss(z, y, 2.0))
    assert torch.equal(survey.contrastive_loss(d, y), survey.contrastive_loss(d, y, 1.0))
    assert torch.equal(survey.triplet_loss(d, d.flip(0)), survey.triplet_loss(d, d.flip(0), 1.0))
    assert torch.equal(survey.tversky_loss(z, y), survey.tversky_loss(z, y, 0.5, 0.5, smooth=1.0))
    a, b = boxes(5), boxes(5, 1)
    assert torch.equal(survey.box_loss(a, b), survey.box_loss(a, b, "giou", reduction="none").mean())
    assert torch.equal(survey.box_loss(a, b, reduction="sum"), survey.box_loss(a, b, "giou", reduction="none").sum())


def test_agreement_with_torch():
    z, y = make(30)
    torch.testing.assert_close(survey.binary_cross_entropy(z, y), F.binary_cross_entropy_with_logits(z, y))
    weighted = F.binary_cross_entropy_with_logits(z, y, pos_weight=torch.tensor(4.0))
    torch.testing.assert_close(survey.binary_cross_entropy(z, y, 4.0), weighted)
    torch.testing.assert_close(survey.poisson_loss(z.exp(), y), F.poisson_nll_loss(z.exp(), y, log_input=False, eps=0))
    p, q = z.view(6, 5).softmax(-1), z.flip(0).view(6, 5).softmax(-1)
    torch.testing.assert_close(survey.kl_divergence(q, p), F.kl_div(q.log(), p, reduction="batchmean"))
    logits, classes = z.view(6, 5), torch.tensor([0, 1, 2, 3, 4, -100])
    for smoothing in (0.0, 0.1):
        for reduction in ("mean", "sum", "none"):
            expected = F.cross_entropy(logits, classes, label_smoothing=smoothing, reduction=reduction)
            found = survey.cross_entropy(logits, classes, label_smoothing=smoothing, reduction=reduction)
            torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        survey.cross_entropy(logits, classes.clamp(min=0), ignore_index=2),
        F.cross_entropy(logits, classes.clamp(min=0), ignore_index=2),
    )
    classes = classes.clamp(min=0)
    binary = torch.stack([torch.zeros_like(z), z], -1)
    torch.testing.assert_close(survey.focal_loss(z, y, 0.0), F.cross_entropy(binary, y.long()))
    assert survey.cross_entropy(logits, classes).item() == pytest.approx(
        survey.kl_divergence(logits.softmax(-1), F.one_hot(classes, 5).double()).item()
    )


@FEW
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.4]))
def test_overlap_losses(seed, smooth):
    z, y = make(4, 3, seed=seed)
    p = z.sigmoid()
    hits, invented, missed = (p * y).sum().item(), (p * (1 - y)).sum().item(), ((1 - p) * y).sum().item()
    for alpha, beta in ((0.5, 0.5), (1.0, 1.0), (0.3, 0.7)):
        expected = 1 - (hits + smooth) / (hits + alpha * invented + beta * missed + smooth)
        assert survey.tversky_loss(z, y, alpha, beta, smooth=smooth).item() == pytest.approx(expected, rel=1e-12)
    dice = survey.dice_loss(z, y, smooth=2 * smooth).item()
    assert survey.tversky_loss(z, y, smooth=smooth).item() == pytest.approx(dice, rel=1e-12)
    jaccard = survey.tversky_loss(z, y, 1.0, 1.0, smooth=0.0).item()
    dice = survey.dice_loss(z, y, smooth=0.0).item()
    assert 1 - jaccard == pytest.approx((1 - dice) / (2 - (1 - dice)), rel=1e-12)
    called = (z > 0).double()
    certain = torch.where(z > 0, 1e4, -1e4).double()
    if y.sum() + called.sum() > 0:
        f1 = metrics.f1_score(y.flatten(), called.flatten(), zero_division=0)
        assert survey.tversky_loss(certain, y, smooth=0.0).item() == pytest.approx(1 - f1, abs=1e-12)
        jaccard = metrics.jaccard_score(y.flatten(), called.flatten(), zero_division=0)
        assert survey.tversky_loss(certain, y, 1.0, 1.0, smooth=0.0).item() == pytest.approx(1 - jaccard, abs=1e-12)
    columns = survey.tversky_loss(z, y, 0.3, 0.7, dim=0, smooth=smooth)
    assert columns.shape == (3,)
    assert columns[1].item() == pytest.approx(survey.tversky_loss(z[:, 1], y[:, 1], 0.3, 0.7, smooth=smooth).item(), abs=1e-12)


def test_overlap_losses_bend_one_way_in_active_cells_and_the_other_in_silent_ones():
    p = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    for loss in (survey.dice_loss, survey.tversky_loss, lambda z, y, **o: survey.tversky_loss(z, y, 1.0, 1.0, **o)):
        for active in (0.0, 1.0):
            rows = torch.stack([p, torch.full_like(p, 0.4), torch.full_like(p, 0.7)], -1)
            y = torch.tensor([active, 1.0, 0.0]).expand(19, 3)
            values = loss(rows.logit(), y, dim=-1, smooth=0.0)
            bend = values[2:] - 2 * values[1:-1] + values[:-2]
            # the Jaccard loss falls along a straight line in an active cell
            assert (bend >= -1e-12).all() if active else (bend < 0).all()
            assert values.diff().abs().max() <= 0.05 * 2 / 0.4


def loop_iou(a, b):
    """IoU, GIoU and DIoU of two boxes, and v."""
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    sizes = [(c[2] - c[0], c[3] - c[1]) for c in (a, b)]
    union = sum(w * h for w, h in sizes) - width * height
    w, h = max(a[2], b[2]) - min(a[0], b[0]), max(a[3], b[3]) - min(a[1], b[1])
    iou = width * height / union
    apart = ((a[0] + a[2] - b[0] - b[2]) / 2) ** 2 + ((a[1] + a[3] - b[1] - b[3]) / 2) ** 2
    v = 4 / math.pi**2 * (math.atan(sizes[1][0] / sizes[1][1]) - math.atan(sizes[0][0] / sizes[0][1])) ** 2
    return iou, iou - (w * h - union) / (w * h), iou - apart / (w**2 + h**2), v


def test_box_losses_are_their_definitions():
    a, b = boxes(60), boxes(60, 1)
    found = {kind: survey.box_loss(a, b, kind, reduction="none").tolist() for kind in survey.BOX_KINDS}
    apart = 0
    for place, (one, two) in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
        iou, giou, diou, v = loop_iou(one, two)
        apart += iou == 0
        values = {"iou": iou, "giou": giou, "diou": diou, "ciou": diou - v**2 / (1 - iou + v)}
        for kind, value in values.items():
            assert found[kind][place] == pytest.approx(1 - value, rel=1e-12)
    assert 5 < apart < 55
    assert survey.box_loss(a, a, "ciou").item() == pytest.approx(0, abs=1e-12)


@FEW
@given(st.integers(0, 10**6), st.floats(0.01, 100), st.floats(-50, 50))
def test_box_losses_ranges_and_invariance(seed, scale, shift):
    a, b = boxes(8, seed, 4.0), boxes(8, seed + 1, 4.0)
    for kind, most in (("iou", 1), ("giou", 2), ("diou", 2), ("ciou", 3)):
        loss = survey.box_loss(a, b, kind, reduction="none")
        assert (loss >= 0).all()
        assert (loss <= most).all()
        moved = survey.box_loss(scale * a + shift, scale * b + shift, kind, reduction="none")
        torch.testing.assert_close(loss, moved, rtol=1e-7, atol=1e-7)
        swapped = survey.box_loss(b, a, kind, reduction="none")
        torch.testing.assert_close(loss, swapped)


@FEW
@given(st.floats(0.1, 5), st.floats(0.1, 3), st.floats(-2, 2))
def test_only_iou_is_flat_where_boxes_are_apart(gap, width, offset):
    a = torch.tensor([0, offset, 1, offset + 1], dtype=torch.float64)
    b = torch.tensor([1 + gap, 0, 1 + gap + width, 1], dtype=torch.float64)
    for kind in survey.BOX_KINDS:
        point = a.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(survey.box_loss(point, b, kind), point)
        if kind == "iou":
            assert (gradient == 0).all()
        else:
            assert gradient[[0, 2]].sum() < 0  # moving right lowers the loss


def test_box_gradients():
    a, b = boxes(6), boxes(6, 1)
    for kind in ("iou", "giou", "diou"):
        assert torch.autograd.gradcheck(lambda x, kind=kind: survey.box_loss(x, b, kind, reduction="none"), a.requires_grad_())
    # a is held fixed: the gradient of DIoU and a times that of v
    iou, *_, v = zip(*(loop_iou(one, two) for one, two in zip(a.tolist(), b.tolist(), strict=True)), strict=True)
    factor = torch.tensor([w / (1 - i + w) for i, w in zip(iou, v, strict=True)], dtype=torch.float64)
    held = lambda x: (survey.box_loss(x, b, "diou", reduction="none") + factor * ratio_term(x, b)).sum()  # noqa: E731
    (expected,) = torch.autograd.grad(held(a), a)
    (found,) = torch.autograd.grad(survey.box_loss(a, b, "ciou", reduction="sum"), a)
    torch.testing.assert_close(found, expected)


def ratio_term(a, b):
    angle = [torch.atan((c[:, 2] - c[:, 0]) / (c[:, 3] - c[:, 1])) for c in (a, b)]
    return 4 / math.pi**2 * (angle[0] - angle[1]) ** 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("kind", survey.BOX_KINDS)
def test_degenerate_boxes(kind, dtype):
    point, flat, unit = ([1.0, 1, 1, 1], [0.0, 0, 2, 0], [0.0, 0, 1, 1])
    pairs = [(point, point), (point, unit), (unit, flat), (flat, flat), (unit, unit), ([0.0, 0, 1e4, 1e4], unit)]
    a = torch.tensor([pair[0] for pair in pairs], dtype=dtype).requires_grad_()
    b = torch.tensor([pair[1] for pair in pairs], dtype=dtype)
    loss = survey.box_loss(a, b, kind, reduction="none")
    assert loss.dtype == dtype
    assert loss.isfinite().all()
    assert torch.autograd.grad(loss.sum(), a)[0].isfinite().all()
    assert loss[4] == 0
    assert loss[0] == 1  # two points have no area to share
    if kind == "ciou":  # the centres' part is 0.1; the angles differ by pi / 4, so v = 1 / 4 and a = 1 / 5
        assert loss[2].item() == pytest.approx(1 + 0.1 + 0.25 / 5, rel=2e-3)


@pytest.mark.parametrize("name", CONVEX)
@FEW
@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_convex(name, first, second, share):
    loss, targets, (low, high) = CURVES[name]
    for y in targets:
        a, b = (torch.tensor(low + (high - low) * part, dtype=torch.float64) for part in (first, second))
        y = torch.tensor(y, dtype=torch.float64)
        chord = share * loss(a, y) + (1 - share) * loss(b, y)
        assert loss(share * a + (1 - share) * b, y) <= chord + 1e-9 * (1 + chord.abs())


@pytest.mark.parametrize("name", CURVES)
def test_slopes_rise_where_a_loss_is_convex(name):
    _, targets, (low, high) = CURVES[name]
    for y in targets:
        rising = slope(name, torch.linspace(low, high, 4001), y)[0].diff()
        assert (rising >= -1e-12).all() == (name != "focal")


def test_focal_loss_is_concave_far_from_the_target():
    for gamma in (0.5, 2.0, 5.0):
        f = torch.tensor([-8.0, -4.0, 4.0], dtype=torch.float64, requires_grad=True)
        value = survey.focal_loss(f, torch.ones_like(f), gamma, reduction="sum")
        (first,) = torch.autograd.grad(value, f, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), f)
        assert second[0] < 0
        assert second[2] > 0


@pytest.mark.parametrize("name", CURVES)
def test_slopes_are_bounded_and_the_bounds_are_reached(name):
    _, targets, (low, high) = CURVES[name]
    steepest = max(slope(name, torch.linspace(low, high, 4001), y)[0].abs().max().item() for y in targets)
    if name in SLOPES:
        assert steepest == pytest.approx(SLOPES[name], rel=1e-6)
    elif name == "focal":
        assert steepest < 1.4
    else:
        far = 1e-6 if name == "Poisson" else 1e4
        assert max(slope(name, [side * far], y)[0].abs().item() for y in targets for side in (1, -1 if low < 0 else 1)) > 1e3


def test_slopes_of_focal_loss_and_cross_entropy():
    for gamma in (0.0, 1.0, 5.0):
        z = torch.linspace(-20, 20, 4001, dtype=torch.float64).requires_grad_()
        (gradient,) = torch.autograd.grad(survey.focal_loss(z, torch.ones_like(z), gamma, reduction="sum"), z)
        p = z.detach().sigmoid()
        torch.testing.assert_close(gradient, (1 - p) ** gamma * (gamma * p * p.log() - (1 - p)), rtol=1e-9, atol=1e-12)
        assert gradient.abs().max() < 1.4
    z, _ = make(40, 5)
    (gradient,) = torch.autograd.grad(survey.cross_entropy(z.requires_grad_(), torch.zeros(40).long(), reduction="sum"), z)
    torch.testing.assert_close(gradient, z.softmax(-1) - F.one_hot(torch.zeros(40).long(), 5))
    assert gradient.abs().max() < 1
    a, b = z.detach()[:20], z.detach()[20:]
    zeros, loss = torch.zeros(20).long(), survey.cross_entropy
    assert (
        loss((a + b) / 2, zeros, reduction="none") <= (loss(a, zeros, reduction="none") + loss(b, zeros, reduction="none")) / 2
    ).all()


@pytest.mark.parametrize("name", CURVES)
def test_slopes_are_continuous_but_for_those_with_a_kink(name):
    _, targets, (low, high) = CURVES[name]
    f = torch.linspace(max(low, 0.01), high, 200_001, dtype=torch.float64)
    if low < 0:
        f = torch.linspace(low, high, 200_001, dtype=torch.float64)
    jump = max(slope(name, f, y)[0].diff().abs().max().item() for y in targets)
    assert (jump > 0.9) if name in BROKEN else (jump < 0.05 * (100 if name == "Poisson" else 1))


@pytest.mark.parametrize("share", [0.1, 0.3, 0.8])
def test_best_constants(share):
    """Of targets of which a share is 1, by minimisation."""
    y = torch.tensor([1.0] * round(10 * share) + [0.0] * round(10 * (1 - share)), dtype=torch.float64)
    odds = math.log(share / (1 - share))
    expected = {
        "squared": share,
        "absolute": float(share > 0.5),
        "Poisson": share,
        "binary cross-entropy": odds,
        "weighted": odds + math.log(3),
        "hinge": 1.0 if share > 0.5 else -1.0,
        "squared hinge": 2 * share - 1,
        "contrastive": 2 * (1 - share),
    }
    for name, value in expected.items():
        low, high = {"Poisson": (1e-3, 5), "contrastive": (0, 5)}.get(name, (-5, 5))
        risk = lambda f, name=name: CURVES[name][0](torch.full_like(y, f), y).mean().item()  # noqa: E731
        found = minimize_scalar(risk, bounds=(low, high), method="bounded", options={"xatol": 1e-9}).x
        assert found == pytest.approx(value, abs=1e-5)
    for gamma in (0.5, 2.0, 5.0):
        risk = lambda f, gamma=gamma: survey.focal_loss(torch.full_like(y, f), y, gamma).item()  # noqa: E731
        found = minimize_scalar(risk, bounds=(-5, 5), method="bounded", options={"xatol": 1e-9}).x
        assert 0 < found / odds < 1
    logits = torch.tensor([0.0, odds]).double().expand(10, 2).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(survey.cross_entropy(logits, y.long()), logits)
    torch.testing.assert_close(gradient.sum(0), torch.zeros(2).double())


def test_divergence():
    p, q = (make(7, 4, seed=seed)[0].softmax(-1) for seed in (0, 1))
    each = survey.kl_divergence(q, p, reduction="none")
    expected = [
        sum(a * math.log(a / b) for a, b in zip(one, two, strict=True)) for one, two in zip(p.tolist(), q.tolist(), strict=True)
    ]
    torch.testing.assert_close(each, torch.tensor(expected).double())
    assert survey.kl_divergence(q, p).item() == pytest.approx(each.mean().item())
    assert survey.kl_divergence(q, p, reduction="sum").item() == pytest.approx(each.sum().item())
    assert (each > 0).all()
    torch.testing.assert_close(survey.kl_divergence(p, p), torch.zeros(()).double())
    other, another = (make(7, 4, seed=seed)[0].softmax(-1) for seed in (2, 3))
    middle = survey.kl_divergence((q + another) / 2, (p + other) / 2, reduction="none")
    assert (middle <= (each + survey.kl_divergence(another, other, reduction="none")) / 2 + 1e-12).all()
    # of all constant predictions the mean of P is the best
    mean = p.mean(0, keepdim=True).expand(7, 4)
    for rival in (q.mean(0, keepdim=True).expand(7, 4), 0.9 * mean + 0.1 * p[:1]):
        assert survey.kl_divergence(mean, p) < survey.kl_divergence(rival, p)


def test_divergence_of_certainty():
    certain = torch.tensor([0.0, 1.0], dtype=torch.float64)
    q = torch.tensor([0.25, 0.75], dtype=torch.float64, requires_grad=True)
    loss = survey.kl_divergence(q, certain)
    assert loss.item() == pytest.approx(-math.log(0.75))
    assert torch.autograd.grad(loss, q)[0].tolist() == pytest.approx([0, -1 / 0.75])
    assert survey.kl_divergence(certain.clone().requires_grad_(), certain).item() == 0
    zero = certain.clone().requires_grad_()
    assert torch.autograd.grad(survey.kl_divergence(zero, certain), zero)[0].tolist() == [0, -1]
    assert survey.kl_divergence(certain, 1 - certain).item() == math.inf
    true = certain.clone().requires_grad_()
    assert torch.autograd.grad(survey.kl_divergence(q.detach(), true), true)[0].tolist() == [0, pytest.approx(1 - math.log(0.75))]


def test_gradients():
    z, y = make(5)
    d = z.abs() + 0.1
    calls = [
        (lambda x: survey.poisson_loss(x, y), d),
        (lambda x: survey.binary_cross_entropy(x, y, 2.0), z),
        (lambda x: survey.focal_loss(x, y, alpha=0.3), z),
        (lambda x: survey.hinge_loss(x, y), z),
        (lambda x: survey.hinge_loss(x, y, squared=True), z),
        (lambda x: survey.kl_divergence(x, y / y.sum()), d),
        (lambda x: survey.contrastive_loss(x, y), d),
        (lambda x: survey.triplet_loss(x, d.flip(0)), d),
        (lambda x: survey.tversky_loss(x, y, 0.3, 0.6), z),
        (lambda x: survey.r_squared(x, y), z),
    ]
    for call, point in calls:
        assert torch.autograd.gradcheck(call, point.clone().requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_extremes_and_dtypes(dtype):
    for y in (torch.tensor([1, 0]), torch.tensor([True, False]), torch.tensor([1.0, 0.0])):
        for size in (1e4, -1e4, 0.0):
            z = torch.full((2,), size, dtype=dtype).requires_grad_()
            for loss in (survey.binary_cross_entropy, survey.focal_loss, survey.hinge_loss, survey.tversky_loss):
                value = loss(z, y)
                assert value.dtype == dtype
                assert value.isfinite()
                assert torch.autograd.grad(value, z)[0].isfinite().all()
            for loss in (survey.contrastive_loss, survey.triplet_loss):
                assert loss(z.abs() / 100, y).dtype == dtype
            rates = torch.full((2,), 2.0, dtype=dtype)
            assert survey.poisson_loss(rates, y).item() == pytest.approx(2 - math.log(2) / 2, rel=1e-2)
    # a wrong and certain prediction costs what its logit is off, and nothing where it is right
    z = torch.tensor([1e4, -1e4], dtype=torch.float64)
    assert survey.binary_cross_entropy(z, torch.tensor([0, 1])).item() == 1e4
    assert survey.binary_cross_entropy(z, torch.tensor([1, 0])).item() == 0


def test_half_precision_where_squares_and_counts_leave_its_range():
    scores, y = torch.tensor([-300.0, 0.0], dtype=torch.float16), torch.tensor([1, 0])
    assert survey.hinge_loss(scores, y, squared=True).item() == pytest.approx((301**2 + 1) / 2, rel=1e-3)
    distances, same = torch.zeros(4, dtype=torch.float16), torch.tensor([1, 0, 0, 0])
    distances[0] = 300
    assert survey.contrastive_loss(distances, same).item() == pytest.approx((300**2 + 3) / 4, rel=1e-3)
    rates = torch.tensor([1.5], dtype=torch.float16)
    assert survey.poisson_loss(rates, torch.tensor([100_000])).item() == pytest.approx(1.5 - 100_000 * math.log(1.5), rel=1e-3)


def test_empty_and_single():
    empty, one = torch.zeros(0, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    for name in SINGLE:
        loss = getattr(survey, name)
        assert loss(empty, empty).isnan()
        assert loss(empty, empty, reduction="sum") == 0
        assert loss(empty, empty, reduction="none").shape == (0,)
        assert loss(one, one - 1).shape == ()
    assert survey.box_loss(torch.zeros(0, 4), torch.zeros(0, 4)).isnan()
    assert survey.box_loss(torch.zeros(0, 4), torch.zeros(0, 4), reduction="sum") == 0
    assert survey.box_loss(boxes(1)[0], boxes(1)[0]).item() == pytest.approx(0, abs=1e-12)
    assert survey.tversky_loss(empty, empty, smooth=0.0) == 0
    assert survey.kl_divergence(torch.zeros(0, 3), torch.zeros(0, 3)).isnan()
    assert survey.kl_divergence(torch.zeros(2, 0), torch.zeros(2, 0)).item() == 0


@FEW
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=15))
def test_areas_are_the_definitions(points):
    """With many ties: against counted pairs and against scikit-learn."""
    scores = torch.tensor([point[0] for point in points], dtype=torch.float64)
    y = torch.tensor([point[1] for point in points])
    wins = [(a > b) + 0.5 * (a == b) for a, s in points if s for b, t in points if not t]
    found = survey.roc_auc(scores, y).item()
    if not wins:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(sum(wins) / len(wins), rel=1e-12)
        assert survey.roc_auc(-scores, y).item() == pytest.approx(1 - found, abs=1e-12)
    if y.any():
        expected = metrics.average_precision_score(y, scores)
        assert survey.average_precision(scores, y).item() == pytest.approx(expected, rel=1e-12)
    else:
        assert survey.average_precision(scores, y).isnan()


def test_areas_over_leading_axes():
    scores, y = make(2, 3, 20)
    for area, theirs in ((survey.roc_auc, metrics.roc_auc_score), (survey.average_precision, metrics.average_precision_score)):
        found = area(scores, y)
        assert found.shape == (2, 3)
        assert found.dtype == torch.float64
        assert found[1, 2].item() == pytest.approx(theirs(y[1, 2], scores[1, 2]), rel=1e-12)
        assert area(scores.bfloat16(), y.bool())[0, 1].item() == pytest.approx(theirs(y[0, 1], scores[0, 1].bfloat16().float()))


def test_share_of_variance_explained():
    forecast, actual = make(40)[0], make(40, seed=1)[0]
    assert survey.r_squared(forecast, actual).item() == pytest.approx(metrics.r2_score(actual, forecast), rel=1e-12)
    assert survey.r_squared(actual.mean().expand(40), actual).item() == pytest.approx(0, abs=1e-12)
    assert survey.r_squared(actual, actual) == 1
    assert survey.r_squared(forecast.view(4, 10), actual.view(4, 10), dim=1).shape == (4,)
    columns = np.array([metrics.r2_score(a, f) for a, f in zip(actual.view(4, 10), forecast.view(4, 10), strict=True)])
    np.testing.assert_allclose(survey.r_squared(forecast.view(4, 10), actual.view(4, 10), dim=1), columns)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *((lambda z, y, name=name: getattr(survey, name)(z.long(), y), "floating point") for name in SINGLE),
        *((lambda z, y, name=name: getattr(survey, name)(z, y[:2]), "share their shape") for name in SINGLE),
        *((lambda z, y, name=name: getattr(survey, name)(z.abs() + 1, y, reduction="max"), "reduction is") for name in SINGLE),
        (lambda z, y: survey.poisson_loss(z * 0, y), "rates are above 0"),
        (lambda z, y: survey.poisson_loss(z.abs() + 1, y - 1), "counts at least 0"),
        (lambda z, y: survey.binary_cross_entropy(z, y + 0.5), "targets are in"),
        (lambda z, y: survey.binary_cross_entropy(z, y - 0.5), "targets are in"),
        (lambda z, y: survey.binary_cross_entropy(z, y, 0.0), "weight is"),
        (lambda z, y: survey.binary_cross_entropy(z, y, math.inf), "weight is"),
        (lambda z, y: survey.hinge_loss(z, y / 2), "targets are 0 or 1"),
        (lambda z, y: survey.focal_loss(z, y / 2), "targets are 0 or 1"),
        (lambda z, y: survey.contrastive_loss(z, y * 2), "targets are in"),
        (lambda z, y: survey.contrastive_loss(z, y, -1.0), "margin is"),
        (lambda z, y: survey.triplet_loss(z, y, 0.0), "margin is"),
        (lambda z, y: survey.kl_divergence(-z.abs(), y), "probabilities are at least 0"),
        (lambda z, y: survey.kl_divergence(z.abs(), -y), "probabilities are at least 0"),
        (lambda z, y: survey.kl_divergence(z[0], y[0]), "have shape"),
        (lambda z, y: survey.kl_divergence(z, y[:2]), "share their shape"),
        (lambda z, y: survey.tversky_loss(z, y, -0.1), "alpha and beta"),
        (lambda z, y: survey.tversky_loss(z, y, 0.5, math.nan), "alpha and beta"),
        (lambda z, y: survey.tversky_loss(z, y, smooth=-1.0), "smooth is"),
        (lambda z, y: survey.tversky_loss(z.long(), y), "floating point"),
        (lambda z, y: survey.cross_entropy(z, y), "targets are int64"),
        (lambda z, y: survey.box_loss(boxes(2), boxes(2), "eiou"), "kind is one of"),
        (lambda z, y: survey.box_loss(boxes(2), boxes(3)), "share their shape"),
        (lambda z, y: survey.box_loss(z[:3], z[:3]), "boxes have shape"),
        (lambda z, y: survey.box_loss(z[0], z[0]), "boxes have shape"),
        (lambda z, y: survey.box_loss(boxes(2), -boxes(2)), "boxes are x0, y0"),
        (lambda z, y: survey.box_loss(boxes(2)[:, [0, 3, 2, 1]], boxes(2)), "boxes are x0, y0"),
        (lambda z, y: survey.roc_auc(z, y[:2]), "share their shape"),
        (lambda z, y: survey.roc_auc(z, y / 2), "targets are 0 or 1"),
        (lambda z, y: survey.roc_auc(z * math.nan, y), "NaN"),
        (lambda z, y: survey.average_precision(z[:0], y[:0]), "with points in it"),
        (lambda z, y: survey.average_precision(z[0], y[0]), "with points in it"),
        (lambda z, y: survey.r_squared(z, y.float()), "share a shape"),
    ],
)
def test_bad_input_is_refused(call, message):
    z, y = make(5)
    y[0], y[1] = 1, 0
    with pytest.raises(ValueError, match=message):
        call(z, y)
