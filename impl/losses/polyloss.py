"""PolyLoss (Leng, Tan, Liu, Cubuk, Shi, Cheng, Anguelov, 2022, arXiv 2204.12511): classification losses as series in 1 - p_t.

Cross-entropy is sum_{j >= 1} (1 - p_t)^j / j, and focal loss is that series times (1 - p_t)^gamma. PolyLoss changes coefficients
of the series: Poly-N adds eps_j (1 - p_t)^j to its first N terms, Poly-1 to the first one only. The probability p_t of the target
enters as 1 - p_t = -expm1(log p_t), which keeps its digits where the model is certain.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from paperclaims.kernels.losses.cut_cross_entropy import linear_cross_entropy

__all__ = [
    "binary_poly_focal_loss",
    "linear_poly_cross_entropy",
    "poly_cross_entropy",
    "poly_focal_loss",
    "truncated_cross_entropy",
]


def poly_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    eps: float | Sequence[float] | Tensor = 1.0,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy with other coefficients in front: -log p_t + sum_{j <= N} eps_j (1 - p_t)^j.

    Args:
        logits: shape (..., classes), floating point.
        targets: classes in [0, classes) or `ignore_index`, shape (...), int64.
        eps: eps_1 (a number: Poly-1; at least -1 leaves no coefficient of it negative), or eps_1 to eps_N, as numbers or a
            tensor of shape (N,).
        label_smoothing: share of the target's weight that is spread over all classes, in [0, 1]; p_t is then the smoothed
            targets' product with the softmax, as in the paper's code.
        ignore_index: a target that is left out; its loss is 0.
        reduction: "mean" over the targets not ignored (NaN where there is none), "sum", or "none".

    Returns:
        Shape (...) for "none", else a scalar; the dtype of `logits`.

    Raises:
        ValueError: shapes, dtypes or settings that do not fit, or a target out of range.
    """
    kept = _check(logits, targets, ignore_index, reduction)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is in [0, 1], got {label_smoothing}")
    log_p = logits.log_softmax(-1)
    own = log_p.gather(-1, targets.where(kept, 0).unsqueeze(-1)).squeeze(-1)
    entropy, rest = -own, -torch.expm1(own)
    if label_smoothing:
        entropy = entropy.lerp(-log_p.mean(-1), label_smoothing)
        rest = rest.lerp((1 - 1 / logits.shape[-1]) * torch.ones_like(rest), label_smoothing)
    return _reduce(entropy + _polynomial(rest, eps), kept, reduction)


def linear_poly_cross_entropy(e: Tensor, c: Tensor, targets: Tensor, eps: float | Sequence[float] = 1.0, **settings) -> Tensor:
    """`poly_cross_entropy(e @ c.T, targets, eps, ...)` without the matrix of logits.

    Args:
        e: embeddings, (..., d).
        c: classifier, (v, d).
        targets, eps: as in `poly_cross_entropy`; eps as numbers.
        settings: further arguments of `linear_cross_entropy` (label_smoothing, ignore_index, reduction, bias and others).

    Raises:
        ValueError: what `linear_cross_entropy` refuses.
    """
    return linear_cross_entropy(e, c, targets, poly=eps, **settings)


def poly_focal_loss(
    logits: Tensor,
    targets: Tensor,
    eps: float | Sequence[float] | Tensor = 1.0,
    *,
    gamma: float = 2.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Focal loss with other coefficients in front: (1 - p_t)^gamma [-log p_t + sum_{j <= N} eps_j (1 - p_t)^j].

    Args:
        logits, targets, eps, ignore_index, reduction: as in `poly_cross_entropy`; p_t is of the softmax over the classes.
        gamma: focusing exponent, at least 0; 0 is `poly_cross_entropy`. Below 1 the gradient at p_t = 1 is taken as 0.

    Returns:
        Shape (...) for "none", else a scalar.

    Raises:
        ValueError: as in `poly_cross_entropy`, or gamma below 0.
    """
    kept = _check(logits, targets, ignore_index, reduction)
    log_p = logits.log_softmax(-1).gather(-1, targets.where(kept, 0).unsqueeze(-1)).squeeze(-1)
    return _reduce(_focal(-log_p, eps, gamma), kept, reduction)


def binary_poly_focal_loss(
    logits: Tensor,
    targets: Tensor,
    eps: float | Sequence[float] | Tensor = 1.0,
    *,
    gamma: float = 2.0,
    alpha: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Poly focal loss of independent yes-or-no targets, as detection uses it: p_t is of the sigmoid.

    Args:
        logits: any shape, floating point.
        targets: 0 or 1, the shape of `logits`, of its dtype, integers or booleans.
        eps, gamma: as in `poly_focal_loss`.
        alpha: weight of positive targets, 1 - alpha of negative ones, in [0, 1]; None: no weights. (It weighs the
            whole loss, the added terms too.)
        reduction: "mean" over all entries (NaN where there is none), "sum", or "none".

    Returns:
        The shape of `logits` for "none", else a scalar.

    Raises:
        ValueError: shapes, dtypes or settings that do not fit, or a target that is neither 0 nor 1.
    """
    if not logits.is_floating_point() or targets.shape != logits.shape:
        raise ValueError(
            f"logits are floating point and targets share their shape, got {logits.dtype} {tuple(logits.shape)} "
            f"and {tuple(targets.shape)}"
        )
    if targets.is_complex() or not ((targets == 0) | (targets == 1)).all():
        raise ValueError("targets are 0 or 1")
    _check_reduction(reduction)
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"alpha is None or in [0, 1], got {alpha}")
    yes = targets == 1
    losses = _focal(-F.logsigmoid(torch.where(yes, logits, -logits)), eps, gamma)
    if alpha is not None:
        losses = torch.where(yes, alpha * losses, (1 - alpha) * losses)
    return _reduce(losses, torch.ones_like(yes), reduction)


def truncated_cross_entropy(
    logits: Tensor, targets: Tensor, terms: int, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """The first terms of cross-entropy's series, sum_{j <= terms} (1 - p_t)^j / j (section 4, the paper's L_drop).

    It falls short of cross-entropy by at most (1 - p_t)^(terms + 1) / ((terms + 1) p_t).

    Args:
        logits, targets, ignore_index, reduction: as in `poly_cross_entropy`.
        terms: how many, at least 1; one term is 1 - p_t, the mean absolute error.

    Returns:
        Shape (...) for "none", else a scalar.

    Raises:
        ValueError: as in `poly_cross_entropy`, or fewer than one term.
    """
    kept = _check(logits, targets, ignore_index, reduction)
    if terms < 1:
        raise ValueError(f"terms is at least 1, got {terms}")
    log_p = logits.log_softmax(-1).gather(-1, targets.where(kept, 0).unsqueeze(-1)).squeeze(-1)
    coefficients = torch.arange(1, terms + 1, dtype=torch.float64).reciprocal()
    return _reduce(_polynomial(-torch.expm1(log_p), coefficients), kept, reduction)


def _polynomial(rest: Tensor, coefficients: float | Sequence[float] | Tensor) -> Tensor:
    """sum_j coefficients_j rest^j from j = 1 on, by Horner's rule."""
    coefficients = torch.as_tensor(coefficients, dtype=rest.dtype, device=rest.device)
    if coefficients.ndim > 1 or not coefficients.isfinite().all():
        raise ValueError(f"eps is a number or a flat list of numbers, all finite, got {coefficients}")
    total = torch.zeros_like(rest)
    for coefficient in coefficients.reshape(-1).flip(0):
        total = rest * (coefficient + total)
    return total


def _focal(entropy: Tensor, eps: float | Sequence[float] | Tensor, gamma: float) -> Tensor:
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma is a number from 0 on, got {gamma}")
    rest = -torch.expm1(-entropy)
    bracket = entropy + _polynomial(rest, eps)
    if gamma == 0:
        return bracket
    positive = rest > 0  # the power's own gradient is infinite at 0 for gamma below 1, where the loss's is 0
    return torch.where(positive, rest, 1).pow(gamma).where(positive, 0) * bracket


def _check(logits: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """Which targets are not ignored, after all arguments were found to fit."""
    if logits.ndim < 1 or logits.shape[-1] == 0 or not logits.is_floating_point():
        raise ValueError(f"logits are floating point of shape (..., classes), got {logits.dtype} of {tuple(logits.shape)}")
    if targets.shape != logits.shape[:-1] or targets.dtype != torch.int64:
        raise ValueError(f"targets are int64 of shape {tuple(logits.shape[:-1])}, got {targets.dtype} of {tuple(targets.shape)}")
    _check_reduction(reduction)
    kept = targets != ignore_index
    wrong = kept & ((targets < 0) | (targets >= logits.shape[-1]))
    if wrong.any():
        raise ValueError(f"targets are in [0, {logits.shape[-1]}) or {ignore_index}, got {targets[wrong][0].item()}")
    return kept


def _check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is 'mean', 'sum' or 'none', got {reduction!r}")


def _reduce(losses: Tensor, kept: Tensor, reduction: str) -> Tensor:
    losses = losses.where(kept, 0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / kept.sum()
