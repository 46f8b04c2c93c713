"""AnyLoss: any metric of the binary confusion matrix as a differentiable loss.

Source: Han, Moniz, Chawla, "AnyLoss: Transforming Classification Metrics into Loss Functions", 2024, arXiv 2405.14745. With
p_i = sigmoid(z_i) and labels y_i in {0, 1}, in the paper's symbols:

    A(p) = 1 / (1 + exp(-L (p - 0.5)))                               amplifies p towards 0 or 1; the authors take L = 73
    TP = sum y A,  FN = sum y (1 - A),  FP = sum (1 - y) A,  TN = sum (1 - y) (1 - A)
    loss = 1 - metric(TP, FN, FP, TN)

A metric is any differentiable function of a `Confusion`. The loss is one number a batch, so batches have to be large enough to
hold both classes.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Confusion(NamedTuple):
    """Counts, or their soft versions, each of shape (...)."""

    tp: Tensor
    fn: Tensor
    fp: Tensor
    tn: Tensor


def amplify(logits: Tensor, amplification: float | None = 73.0) -> Tensor:
    """A(sigmoid(logits)), same shape; `amplification` None: sigmoid(logits) itself, the plain soft counts.

    Written as sigmoid(L/2 tanh(z/2)), which keeps its digits where p rounds to 0 or 1.

    Raises:
        ValueError: logits that are not floating point, an amplification below 0 or infinite.
    """
    if not logits.is_floating_point():
        raise ValueError(f"logits are floating point, got {logits.dtype}")
    if amplification is None:
        return logits.sigmoid()
    if not 0 <= amplification < math.inf:
        raise ValueError(f"amplification is None or a number from 0 on, got {amplification}")
    return (amplification / 2 * (logits / 2).tanh()).sigmoid()


def confusion(positive: Tensor, targets: Tensor) -> Confusion:
    """Confusion matrix of predictions in [0, 1] (hard or amplified) and labels, summed over the last axis.

    Args:
        positive: to which degree a point is called positive, floating point, (..., n).
        targets: 0 or 1 (or between, for soft labels), any dtype, a shape that broadcasts against it.

    Returns:
        Counts in the dtype of the predictions, but at least float32, as half precision ends at 65,504.

    Raises:
        ValueError: no points, shapes that do not fit, predictions that are not floating point, targets outside [0, 1].
    """
    if not positive.is_floating_point() or targets.is_complex() or not ((targets >= 0) & (targets <= 1)).all():
        raise ValueError(f"predictions are floating point, got {positive.dtype}, and targets are in [0, 1]")
    try:
        shape = torch.broadcast_shapes(positive.shape, targets.shape)
    except RuntimeError as error:
        raise ValueError(f"predictions {tuple(positive.shape)} and targets {tuple(targets.shape)} do not fit") from error
    if min(positive.ndim, targets.ndim) < 1 or shape[-1] == 0 or positive.shape[-1] != targets.shape[-1]:
        raise ValueError(f"needs at least one point, got predictions {tuple(positive.shape)} and targets {tuple(targets.shape)}")
    positive = positive.to(torch.promote_types(positive.dtype, torch.float32))
    y = targets.to(positive.dtype)
    tp, positives, called = (y * positive).sum(-1), y.sum(-1), positive.sum(-1)
    return Confusion(tp, positives - tp, called - tp, shape[-1] - positives - called + tp)


def accuracy(c: Confusion) -> Tensor:
    """(TP + TN) / n."""
    return (c.tp + c.tn) / sum(c)


def f_beta(c: Confusion, beta: float = 1.0) -> Tensor:
    """(1 + b^2) TP / ((1 + b^2) TP + b^2 FN + FP); 0 where it would be 0/0, which is its limit when FP falls to 0."""
    hits = (1 + beta**2) * c.tp
    total = hits + beta**2 * c.fn + c.fp
    return hits / torch.where(total > 0, total, 1)


def balanced_accuracy(c: Confusion) -> Tensor:
    """(TPR + TNR) / 2; the rate of the one class where the other is absent."""
    return sum(_rates(c)) / 2


def g_mean(c: Confusion) -> Tensor:
    """sqrt(TPR TNR), with a gradient of zero where it is zero; the rate of the one class where the other is absent."""
    tpr, tnr = _rates(c)
    product = tpr * tnr
    some = product > 0
    return torch.where(some, torch.where(some, product, 1).sqrt(), 0)


METRICS = {"accuracy": accuracy, "f1": f_beta, "balanced_accuracy": balanced_accuracy, "g_mean": g_mean}


def any_loss(
    logits: Tensor,
    targets: Tensor,
    metric: str | Callable[[Confusion], Tensor] = "f1",
    *,
    amplification: float | None = 73.0,
) -> Tensor:
    """1 - metric of the amplified predictions.

    Args:
        logits: scores, positive for the positive class, (..., n), floating point; every row is a batch of its own.
        targets: 0 or 1, any dtype, a shape that broadcasts against it.
        metric: one of METRICS, or a function of a `Confusion` such as `lambda c: f_beta(c, 2)`.
        amplification: the paper's L. Small ones train more easily, as L A (1 - A) vanishes away from p = 0.5; None: A(p) = p.

    Returns:
        Shape (...), the dtype of `logits`.

    Raises:
        ValueError: an unknown metric, or as in `amplify` and `confusion`.
    """
    return (1 - _metric(metric)(confusion(amplify(logits, amplification), targets))).to(logits.dtype)


def hard_metric(
    logits: Tensor, targets: Tensor, metric: str | Callable[[Confusion], Tensor] = "f1", threshold: float | Tensor = 0.0
) -> Tensor:
    """The metric itself, shape (...), with points above the threshold called positive. Arguments as in `any_loss`."""
    return _metric(metric)(confusion((logits > threshold).to(logits.dtype), targets))


def _metric(metric: str | Callable[[Confusion], Tensor]) -> Callable[[Confusion], Tensor]:
    if isinstance(metric, str) and metric not in METRICS:
        raise ValueError(f"metric is one of {', '.join(METRICS)} or a function, got {metric!r}")
    return METRICS[metric] if isinstance(metric, str) else metric


def _rates(c: Confusion) -> tuple[Tensor, Tensor]:
    """True-positive and true-negative rate; that of an absent class is the other's."""
    positives, negatives = c.tp + c.fn, c.tn + c.fp
    tpr, tnr = (hits / torch.where(total > 0, total, 1) for hits, total in ((c.tp, positives), (c.tn, negatives)))
    return torch.where(positives > 0, tpr, tnr), torch.where(negatives > 0, tnr, tpr)
