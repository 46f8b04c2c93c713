"""AnyLoss: against counts written out, the paper's formulas for the metrics, and its closed-form gradients, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from paperclaims.impl.losses.anyloss import (
    METRICS,
    Confusion,
    accuracy,
    amplify,
    any_loss,
    balanced_accuracy,
    confusion,
    f_beta,
    g_mean,
    hard_metric,
)

LEVELS = [None, 0.0, 1.0, 10.0, 73.0]
CASES = [*METRICS, lambda c: f_beta(c, 2.0), lambda c: f_beta(c, 0.5)]
CASE_NAMES = [*METRICS, "F2", "F0.5"]


def make(*shape, seed=0, rate=0.3):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(*shape, dtype=torch.float64, generator=generator)
    return logits, (torch.rand(*shape, generator=generator) < rate).long()


def loop_confusion(logits, targets, level):
    """The four sums, point by point."""
    tp = fn = fp = tn = 0.0
    for z, y in zip(logits.tolist(), targets.tolist(), strict=True):
        p = 1 / (1 + math.exp(-z))
        a = p if level is None else 1 / (1 + math.exp(-level * (p - 0.5)))
        tp, fn, fp, tn = tp + y * a, fn + y * (1 - a), fp + (1 - y) * a, tn + (1 - y) * (1 - a)
    return tp, fn, fp, tn


def loop_metric(name, tp, fn, fp, tn):
    tpr, tnr = tp / (tp + fn), tn / (tn + fp)
    return {
        "accuracy": (tp + tn) / (tp + tn + fp + fn),
        "f1": 2 * tp / (2 * tp + fn + fp),
        "balanced_accuracy": (tpr + tnr) / 2,
        "g_mean": math.sqrt(tpr * tnr),
    }[name]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", METRICS)
def test_loss_is_one_minus_the_metric_of_the_soft_counts(name, level):
    logits, targets = make(3, 17)
    for row, labels, loss in zip(logits, targets, any_loss(logits, targets, name, amplification=level), strict=True):
        counts = loop_confusion(row, labels, level)
        torch.testing.assert_close(torch.stack(confusion(amplify(row, level), labels)), torch.tensor(counts).double())
        assert loss.item() == pytest.approx(1 - loop_metric(name, *counts), rel=1e-12)


def test_f_beta_weighs_what_is_missed():
    c = Confusion(*(torch.tensor(v, dtype=torch.float64) for v in (6.0, 2.0, 3.0, 9.0)))
    for beta in (0.5, 1.0, 2.0):
        precision, recall = 6 / 9, 6 / 8
        expected = (1 + beta**2) * precision * recall / (beta**2 * precision + recall)
        assert f_beta(c, beta).item() == pytest.approx(expected, rel=1e-14)
    assert f_beta(c).item() == f_beta(c, 1.0).item()


def test_defaults_are_the_papers():
    logits, targets = make(20)
    assert torch.equal(any_loss(logits, targets), any_loss(logits, targets, "f1", amplification=73.0))
    assert torch.equal(amplify(logits), amplify(logits, 73.0))
    assert list(METRICS) == ["accuracy", "f1", "balanced_accuracy", "g_mean"]


@pytest.mark.parametrize("level", [10.0, 73.0])
def test_gradients_are_the_papers(level):
    """dLoss/dz = -dM/dA L A (1 - A) p (1 - p), with dM/dA from the definitions in TP, FN, FP and TN."""
    logits, targets = make(15, seed=1)
    logits = (logits / 4).requires_grad_()
    p = logits.detach().sigmoid()
    a = amplify(logits.detach(), level)
    y = targets.double()
    n, positives, called, tp = len(y), y.sum(), a.sum(), (y * a).sum()
    negatives = n - positives
    tpr, tnr = tp / positives, 1 - (called - tp) / negatives
    by_a = {
        "accuracy": (2 * y - 1) / n,
        "f1": 2 * y / (positives + called) - 2 * tp / (positives + called) ** 2,
        "balanced_accuracy": (y / positives - (1 - y) / negatives) / 2,
        "g_mean": (y / positives * tnr - (1 - y) / negatives * tpr) / (2 * (tpr * tnr).sqrt()),
    }
    for name, slope in by_a.items():
        (gradient,) = torch.autograd.grad(any_loss(logits, targets, name, amplification=level), logits)
        torch.testing.assert_close(gradient, -slope * level * a * (1 - a) * p * (1 - p), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("metric", CASES, ids=CASE_NAMES)
def test_gradcheck(metric):
    logits, targets = make(2, 9, seed=2)
    for level in (None, 5.0):
        assert torch.autograd.gradcheck(
            lambda z, level=level: any_loss(z, targets, metric, amplification=level), logits.clone().requires_grad_()
        )


def test_hard_metric_is_scikit_learns():
    logits, targets = make(200, seed=3)
    for threshold in (0.0, 0.7):
        called = (logits > threshold).long()
        assert hard_metric(logits, targets, "f1", threshold).item() == pytest.approx(metrics.f1_score(targets, called))
        assert hard_metric(logits, targets, "accuracy", threshold).item() == pytest.approx(
            metrics.accuracy_score(targets, called)
        )
        expected = metrics.balanced_accuracy_score(targets, called)
        assert hard_metric(logits, targets, "balanced_accuracy", threshold).item() == pytest.approx(expected)
        recalls = [metrics.recall_score(targets, called, pos_label=label) for label in (0, 1)]
        assert hard_metric(logits, targets, "g_mean", threshold).item() == pytest.approx(math.sqrt(math.prod(recalls)))
        two = hard_metric(logits, targets, lambda c: f_beta(c, 2.0), threshold)
        assert two.item() == pytest.approx(metrics.fbeta_score(targets, called, beta=2))
    assert hard_metric(torch.zeros(3), torch.tensor([0, 0, 1]), "accuracy").item() == pytest.approx(2 / 3)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.floats(0.2, 30), st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_amplified_loss_tends_to_the_metric(points):
    """Away from p = 0.5 a large L turns every metric into that of the hard predictions."""
    logits = torch.tensor([size if called else -size for size, called, _ in points], dtype=torch.float64)
    targets = torch.tensor([label for _, _, label in points])
    for name in METRICS:
        loss = any_loss(logits, targets, name, amplification=1e4)
        assert loss.item() == pytest.approx(1 - hard_metric(logits, targets, name).item(), abs=1e-6)
        assert 0 <= any_loss(logits, targets, name).item() <= 1


def test_amplifier():
    z = torch.linspace(-6, 6, 41, dtype=torch.float64)
    p = z.sigmoid()
    for level in (1.0, 73.0):
        torch.testing.assert_close(amplify(z, level), 1 / (1 + torch.exp(-level * (p - 0.5))), rtol=1e-12, atol=0)
    torch.testing.assert_close(amplify(z, 0.0), torch.full_like(z, 0.5))
    assert torch.equal(amplify(z, None), p)


@pytest.mark.parametrize("metric", CASES, ids=CASE_NAMES)
@pytest.mark.parametrize("labels", ["all", "none", "both"])
@pytest.mark.parametrize("size", [1e4, -1e4, 0.0])
def test_certain_predictions_and_absent_classes(metric, labels, size):
    logits = torch.full((4,), size, dtype=torch.float32).requires_grad_()
    targets = {"all": torch.ones(4), "none": torch.zeros(4), "both": torch.tensor([1.0, 0, 0, 0])}[labels]
    for level in (None, 73.0, 1e4):
        loss = any_loss(logits, targets, metric, amplification=level)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert 0 <= loss.item() <= 1
        assert gradient.isfinite().all()


def test_values_where_a_class_is_absent():
    called = torch.tensor([1.0, 0, 0, 0])
    none, every = torch.zeros(4), torch.ones(4)
    assert f_beta(confusion(called, none)).item() == 0
    assert f_beta(confusion(none, none)).item() == 0
    for metric in (balanced_accuracy, g_mean):
        assert metric(confusion(called, none)).item() == pytest.approx(0.75)
        assert metric(confusion(called, every)).item() == pytest.approx(0.25)
    assert accuracy(confusion(called, none)).item() == pytest.approx(0.75)
    assert g_mean(confusion(none, called)).item() == 0
    assert any_loss(torch.tensor([5.0]), torch.tensor([1])).item() < 1e-6


def test_leading_axes_and_broadcasting():
    logits, targets = make(2, 3, 11)
    for name in METRICS:
        stacked = any_loss(logits, targets, name)
        assert stacked.shape == (2, 3)
        assert stacked[1, 2].item() == pytest.approx(any_loss(logits[1, 2], targets[1, 2], name).item(), rel=1e-12)
        shared = any_loss(logits, targets[0, 0], name)
        assert shared[1, 0].item() == pytest.approx(any_loss(logits[1, 0], targets[0, 0], name).item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    logits, targets = make(64)
    for kind in (torch.bool, torch.int64, torch.float32):
        loss = any_loss(logits.to(dtype), targets.to(kind), "accuracy")
        assert loss.dtype == dtype
        expected = any_loss(logits.to(dtype).double(), targets, "accuracy").item()
        assert loss.item() == pytest.approx(expected, abs=8 * torch.finfo(dtype).eps)


def test_metrics_of_less_than_one_point():
    c = Confusion(*(torch.tensor(count, dtype=torch.float64) for count in (0.1, 0.2, 0.1, 0.3)))
    assert METRICS["f1"](c).item() == pytest.approx(0.2 / 0.5)
    assert METRICS["balanced_accuracy"](c).item() == pytest.approx((1 / 3 + 3 / 4) / 2)
    assert METRICS["g_mean"](c).item() == pytest.approx((1 / 4) ** 0.5)


def test_half_precision_holds_large_batches():
    logits, targets = make(100_000, rate=0.5)
    for name in METRICS:
        expected = any_loss(logits.half().double(), targets, name).item()
        assert any_loss(logits.half(), targets, name).item() == pytest.approx(expected, abs=2e-3)
    assert confusion(torch.ones(100_000, dtype=torch.float16), torch.ones(100_000)).tp.item() == 100_000


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z, y: any_loss(z, y, "f3"), "metric is one of"),
        (lambda z, y: hard_metric(z, y, "f3"), "metric is one of"),
        (lambda z, y: any_loss(z.long(), y), "floating point"),
        (lambda z, y: any_loss(z, y, amplification=-1.0), "amplification"),
        (lambda z, y: any_loss(z, y, amplification=math.nan), "amplification"),
        (lambda z, y: any_loss(z, y, amplification=math.inf), "amplification"),
        (lambda z, y: any_loss(z, 2 * y - 1), "targets are in"),
        (lambda z, y: any_loss(z, y + 0.5), "targets are in"),
        (lambda z, y: any_loss(z, y.to(torch.complex64)), "targets are in"),
        (lambda z, y: hard_metric(z.long(), y), "floating point"),
        (lambda z, y: confusion(z.sigmoid() > 0.5, y), "floating point"),
        (lambda z, y: any_loss(z, y[:, :2]), "do not fit"),
        (lambda z, y: any_loss(z, y[:, :1]), "at least one point"),
        (lambda z, y: any_loss(z[:, :1], y), "at least one point"),
        (lambda z, y: any_loss(z[:, :0], y[:, :0]), "at least one point"),
        (lambda z, y: any_loss(z[0, 0], y), "at least one point"),
        (lambda z, y: any_loss(z[0, 0], y[0, 0]), "at least one point"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(*make(2, 5))
