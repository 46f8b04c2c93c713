"""Losses and metrics of Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss Functions and Metrics in
Deep Learning" (2023, arXiv 2307.02694), and their properties: what a constant prediction is drawn to, convexity, the largest
slope, and whether the slope is continuous. Those of regression are the same functions as in `regression_loss_survey`.

    loss (of)                          best constant             convex           slope         continuous slope
    squared (prediction)               mean                      yes              unbounded     yes
    absolute (prediction)              median                    yes              1             no
    Huber (prediction)                 root of clipped errors    yes              delta         yes
    log-cosh (prediction)              root of mean tanh(e)      yes              1             yes
    quantile (prediction)              q-quantile                yes              max(q, 1-q)   no
    Poisson (rate)                     mean                      yes              unbounded     yes
    binary cross-entropy (logit)       log odds + log weight     yes              1 or weight   yes
    cross-entropy (logits)             log frequencies           yes              1             yes
    focal, gamma > 0 (logit)           between log odds and 0    no               1.4           yes
    hinge (score)                      1 or -1, the majority     yes              1             no
    squared hinge (score)              2 P(y = 1) - 1            yes              unbounded     yes
    Kullback-Leibler (Q)               mean of P                 yes, jointly     unbounded     yes
    contrastive (distance)             margin P(different)       yes              unbounded     yes
    triplet (distances)                                          yes              1             no
    Dice, Tversky (probability)                                  active cells     bounded       yes
    IoU (box)                                                    no, and flat where boxes are apart
    GIoU, DIoU, CIoU (box)                                       no, with a slope where boxes are apart

In a silent cell Dice and Tversky are concave. Focal loss's slope is bounded by 1.4 for gamma up to 5.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from paperclaims.impl.losses.dice_loss_sed import dice_loss
from paperclaims.impl.losses.polyloss import binary_poly_focal_loss, poly_cross_entropy
from paperclaims.impl.losses.regression_loss_survey import (
    absolute_error,
    huber_loss,
    log_cosh_loss,
    quantile_loss,
    relative_squared_error,
    squared_error,
)

__all__ = [
    "absolute_error",
    "average_precision",
    "binary_cross_entropy",
    "box_loss",
    "contrastive_loss",
    "cross_entropy",
    "dice_loss",
    "focal_loss",
    "hinge_loss",
    "huber_loss",
    "kl_divergence",
    "log_cosh_loss",
    "poisson_loss",
    "quantile_loss",
    "r_squared",
    "roc_auc",
    "squared_error",
    "triplet_loss",
    "tversky_loss",
]

BOX_KINDS = ("iou", "giou", "diou", "ciou")


def poisson_loss(rates: Tensor, counts: Tensor, *, reduction: str = "mean") -> Tensor:
    """Poisson loss, f - y log f: the negative log-likelihood up to what does not depend on f.

    Args (here and in the other losses of single predictions):
        rates: f, above 0, floating point.
        counts: y, 0 or more, of the same shape, any real dtype.
        reduction: "mean" over all entries (NaN where there is none), "sum", or "none".

    Returns:
        A scalar, or the shape of the predictions for "none".

    Raises:
        ValueError: not floating point, two shapes, another reduction, or values out of range.
    """
    _fitting(rates, counts)
    if not (rates > 0).all() or not (counts >= 0).all():
        raise ValueError("rates are above 0 and counts at least 0")
    wide = torch.promote_types(rates.dtype, torch.float32)  # counts leave the range of half precision
    f = rates.to(wide)
    return _reduced(f - torch.xlogy(counts.to(wide), f), reduction).to(rates.dtype)


def binary_cross_entropy(logits: Tensor, targets: Tensor, weight: float = 1.0, *, reduction: str = "mean") -> Tensor:
    """Binary cross-entropy, -w y log p - (1 - y) log(1 - p) with p = sigmoid(z); weighted where w is not 1.

    Args as in `poisson_loss`, with targets in [0, 1]; ValueError also for a weight that is not above 0.
    """
    y = _fitting(logits, targets)
    _in_unit(y)
    _positive("weight", weight)
    return _reduced(-weight * y * F.logsigmoid(logits) - (1 - y) * F.logsigmoid(-logits), reduction)


def cross_entropy(
    logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """Categorical cross-entropy, -log p_t, with the targets' weight spread over all classes if asked for.

    Arguments and errors as in `polyloss.poly_cross_entropy`: logits (..., classes), targets int64 (...).
    """
    settings = {"label_smoothing": label_smoothing, "ignore_index": ignore_index, "reduction": reduction}
    return poly_cross_entropy(logits, targets, 0.0, **settings)


def focal_loss(
    logits: Tensor, targets: Tensor, gamma: float = 2.0, *, alpha: float | None = None, reduction: str = "mean"
) -> Tensor:
    """Focal loss of yes-or-no targets, -(1 - p_t)^gamma log p_t, times alpha or 1 - alpha; gamma = 0 is cross-entropy.

    Arguments and errors as in `polyloss.binary_poly_focal_loss`: targets 0 or 1, of the shape of the logits.
    """
    return binary_poly_focal_loss(logits, targets, 0.0, gamma=gamma, alpha=alpha, reduction=reduction)


def hinge_loss(scores: Tensor, targets: Tensor, *, squared: bool = False, reduction: str = "mean") -> Tensor:
    """Hinge loss, max(0, 1 - t f) with t = 1 for targets of 1 and -1 for 0, or its square. Args as in `poisson_loss`."""
    y = _fitting(scores, targets)
    if not ((y == 0) | (y == 1)).all():
        raise ValueError("targets are 0 or 1")
    short = (1 - (2 * y - 1) * scores).relu()
    return _reduced(_square(short) if squared else short, reduction).to(scores.dtype)


def kl_divergence(predicted: Tensor, true: Tensor, *, reduction: str = "mean") -> Tensor:
    """Kullback-Leibler divergence of true from predicted probabilities, sum_i P_i log(P_i / Q_i); 0 log 0 = 0.

    Args:
        predicted: Q, shape (..., n), floating point, at least 0.
        true: P, likewise.
        reduction: "mean" over the leading axes, "sum", or "none".

    Returns:
        A scalar, or shape (...) for "none"; inf where Q is 0 and P is not.

    Raises:
        ValueError: as in `poisson_loss`, or no last axis.
    """
    true = _fitting(predicted, true)
    if predicted.ndim < 1:
        raise ValueError("probabilities have shape (..., n)")
    if not (predicted >= 0).all() or not (true >= 0).all():
        raise ValueError("probabilities are at least 0")
    positive = true > 0  # the logarithms' own gradients are infinite or NaN at 0, where P = 0 makes the term 0
    return _reduced((true * (true.where(positive, 1).log() - predicted.where(positive, 1).log())).sum(-1), reduction)


def contrastive_loss(distances: Tensor, same: Tensor, margin: float = 1.0, *, reduction: str = "mean") -> Tensor:
    """Contrastive loss, y d^2 + (1 - y) max(0, m - d)^2: draws pairs of one kind together and pushes others to the margin.

    Args as in `poisson_loss`: distances d, and y = 1 for pairs of one kind, else 0. ValueError also for a margin that is not
    above 0.
    """
    y = _fitting(distances, same)
    _in_unit(y)
    _positive("margin", margin)
    return _reduced(y * _square(distances) + (1 - y) * _square((margin - distances).relu()), reduction).to(distances.dtype)


def triplet_loss(to_positive: Tensor, to_negative: Tensor, margin: float = 1.0, *, reduction: str = "mean") -> Tensor:
    """Triplet loss, max(0, d(anchor, positive) - d(anchor, negative) + m). Args as in `contrastive_loss`."""
    far = _fitting(to_positive, to_negative)
    _positive("margin", margin)
    return _reduced((to_positive - far + margin).relu(), reduction)


def tversky_loss(
    logits: Tensor,
    targets: Tensor,
    alpha: float = 0.5,
    beta: float = 0.5,
    *,
    dim: int | tuple[int, ...] | None = None,
    smooth: float = 1.0,
) -> Tensor:
    """Tversky loss, 1 - (TP + s) / (TP + alpha FP + beta FN + s), of sums of probabilities.

    Half and half it is `dice_loss` (with 2 s); with 1 and 1 the Jaccard or soft IoU loss.

    Args:
        logits, targets, dim, smooth: as in `dice_loss`, which checks them.
        alpha, beta: weight of false positives and of misses, at least 0.

    Returns:
        The shape of `logits` without `dim`; 0 where nothing is active and nothing expected.

    Raises:
        ValueError: as in `dice_loss`, or a negative weight.
    """
    if not (0 <= alpha < math.inf and 0 <= beta < math.inf):
        raise ValueError(f"alpha and beta are at least 0, got {alpha} and {beta}")
    checked = dice_loss(logits, targets, dim=dim, smooth=smooth)
    wide = torch.promote_types(logits.dtype, torch.float32)
    p, y = logits.to(wide).sigmoid(), targets.to(wide)
    hits = (p * y).sum(dim)
    total = hits + alpha * (p * (1 - y)).sum(dim) + beta * ((1 - p) * y).sum(dim) + smooth
    some = total > 0
    return (1 - (hits + smooth) / torch.where(some, total, 1)).where(some, 0).to(checked.dtype)


def box_loss(boxes: Tensor, targets: Tensor, kind: str = "giou", *, reduction: str = "mean") -> Tensor:
    """1 - IoU of boxes, or with what GIoU, DIoU and CIoU add, which has a slope where the boxes are apart.

        GIoU = IoU - (C - union) / C             C: area of the smallest box around both
        DIoU = IoU - rho^2 / c^2                 rho: distance of the centres, c: diagonal of the box around both
        CIoU = DIoU - a v                        v = 4 / pi^2 (atan(w' / h') - atan(w / h))^2, a = v / (1 - IoU + v)

    Args:
        boxes, targets: x0, y0, x1, y1 with x0 <= x1 and y0 <= y1, floating point, one shape (..., 4).
        kind: "iou", "giou", "diou" or "ciou" (no gradient goes through a).
        reduction: "mean" over all pairs (NaN where there is none), "sum", or "none".

    Returns:
        A scalar, or shape (...) for "none".

    Raises:
        ValueError: shapes, dtypes, corners or settings that do not fit.
    """
    if kind not in BOX_KINDS:
        raise ValueError(f"kind is one of {', '.join(BOX_KINDS)}, got {kind!r}")
    targets, dtype = _fitting(boxes, targets), boxes.dtype
    if boxes.ndim < 1 or boxes.shape[-1] != 4:
        raise ValueError(f"boxes have shape (..., 4), got {tuple(boxes.shape)}")
    wide = torch.promote_types(dtype, torch.float32)  # areas leave the range of half precision
    (low, high), (true_low, true_high) = (part.to(wide).unflatten(-1, (2, 2)).unbind(-2) for part in (boxes, targets))
    if not (low <= high).all() or not (true_low <= true_high).all():
        raise ValueError("boxes are x0, y0, x1, y1 with x0 <= x1 and y0 <= y1")
    size, true_size = high - low, true_high - true_low
    shared = (torch.minimum(high, true_high) - torch.maximum(low, true_low)).relu().prod(-1)
    union = size.prod(-1) + true_size.prod(-1) - shared
    around = torch.maximum(high, true_high) - torch.minimum(low, true_low)
    apart = loss = 1 - _over(shared, union)
    if kind == "giou":
        loss = loss + _over(around.prod(-1) - union, around.prod(-1))
    if kind in ("diou", "ciou"):
        between_centres = (low + high - true_low - true_high).square().sum(-1) / 4
        loss = loss + _over(between_centres, around.square().sum(-1))
    if kind == "ciou":
        v = 4 / math.pi**2 * (_angle(true_size) - _angle(size)).square()
        loss = loss + _over(v, apart + v).detach() * v
    return _reduced(loss.to(dtype), reduction)


def roc_auc(scores: Tensor, targets: Tensor) -> Tensor:
    """Area under the ROC curve: the chance that a positive scores higher than a negative, ties counting half.

    Args:
        scores: shape (..., n), floating point.
        targets: 0 or 1, of the same shape.

    Returns:
        float64 (...); NaN where a class is absent.

    Raises:
        ValueError: not floating point, two shapes, or targets that are neither 0 nor 1.
    """
    hits, called = _steps(scores, targets)
    invented = called - hits
    before = F.pad(torch.stack([hits, invented])[..., :-1], (1, 0))
    area = ((hits + before[0]) / 2 * (invented - before[1])).sum(-1)
    positives, negatives = hits.amax(-1), invented.amax(-1)
    return area / (positives * negatives)


def average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    """Area under the steps of the precision-recall curve, sum (R_k - R_{k-1}) P_k. Arguments and errors as in `roc_auc`."""
    hits, called = _steps(scores, targets)
    gained = hits - F.pad(hits[..., :-1], (1, 0))
    return (gained * hits / called).sum(-1) / hits.amax(-1)


def r_squared(forecast: Tensor, actual: Tensor, *, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Share of the variance explained, 1 - sum e^2 / sum (y - mean y)^2. As `regression_loss_survey.relative_squared_error`."""
    return 1 - relative_squared_error(forecast, actual, dim=dim)


def _steps(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Hits and points called at every score from the highest down, float64, both as at the end of its tie."""
    y = _fitting(scores, targets).double()
    if scores.ndim < 1 or scores.shape[-1] == 0:
        raise ValueError(f"scores have shape (..., n) with points in it, got {tuple(scores.shape)}")
    if not ((y == 0) | (y == 1)).all():
        raise ValueError("targets are 0 or 1")
    if scores.isnan().any():
        raise ValueError("a score is NaN")
    rising, order = scores.neg().double().sort(-1)
    called = torch.searchsorted(rising, rising, right=True)
    return y.gather(-1, order).cumsum(-1).gather(-1, called - 1), called.double()


def _fitting(predictions: Tensor, targets: Tensor) -> Tensor:
    """The targets in the dtype of the predictions."""
    if not predictions.is_floating_point() or predictions.shape != targets.shape or targets.is_complex():
        raise ValueError(
            f"predictions are floating point and targets share their shape, got {predictions.dtype} {tuple(predictions.shape)} "
            f"and {targets.dtype} {tuple(targets.shape)}"
        )
    return targets.to(predictions.dtype)


def _in_unit(targets: Tensor) -> None:
    if not ((targets >= 0) & (targets <= 1)).all():
        raise ValueError("targets are in [0, 1]")


def _square(values: Tensor) -> Tensor:
    """In float32 at least: squares leave the range of half precision before their mean does."""
    return values.to(torch.promote_types(values.dtype, torch.float32)).square()


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is a number above 0, got {value}")


def _angle(size: Tensor) -> Tensor:
    """atan(w / h) of sizes (..., 2); pi / 2 for a flat box, 0 for a point."""
    w, h = size.unbind(-1)
    return torch.atan2(w, h.where((w > 0) | (h > 0), 1))


def _over(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, 0 where the whole is 0."""
    some = whole > 0
    return (part / torch.where(some, whole, 1)).where(some, 0)


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is 'mean', 'sum' or 'none', got {reduction!r}")
    return losses.mean() if reduction == "mean" else losses.sum()
