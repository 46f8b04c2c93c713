"""Conformal risk control (Angelopoulos, Bates, Fisch, Lei, Schuster, 2022, arXiv 2208.02814): bounds on expected losses.

Losses L_i(lam) of n calibration points do not rise in lam and are at most B. The choice

    lam_hat = inf { lam : (n / (n + 1)) R_n(lam) + B / (n + 1) <= alpha },    R_n(lam) = (1 / n) sum_i L_i(lam)       (Eq. 4)

has E L_(n+1)(lam_hat) <= alpha for exchangeable points (Theorem 1), and at least alpha - 2 B / (n + 1) for independent ones whose
losses jump at different lam (Theorem 2). Where no lam will do, it is the largest. Losses that do rise are made monotone first
(section 2.3); under a shift of the inputs by known weights w, points count w(x_i), and the new one w(x), for 1 (section 4.1);
several risks take the largest of their lam_hat (section 4.3).
"""

import torch
from torch import Tensor

__all__ = ["false_negative_rate", "fnr_threshold", "monotone", "prediction_sets", "risk_threshold"]


def risk_threshold(losses: Tensor, lambdas: Tensor, alpha: float, *, bound: float = 1.0) -> Tensor:
    """lam_hat on a grid of lam.

    Args:
        losses: L, shape (..., n, m), floating point, not rising along the last axis, at most `bound`.
        lambdas: shape (m,), rising.
        alpha: level of the risk.
        bound: B.

    Returns:
        Shape (...): the smallest lam of the grid whose bound holds, or the largest.

    Raises:
        ValueError: shapes or an order other than these, losses that rise (make them `monotone`) or exceed the bound.
    """
    if losses.ndim < 2 or not losses.is_floating_point() or lambdas.shape != losses.shape[-1:] or not len(lambdas):
        raise ValueError(
            f"losses are floating point (..., n, m), lambdas (m,), got {tuple(losses.shape)} and {tuple(lambdas.shape)}"
        )
    if (lambdas.diff() <= 0).any():
        raise ValueError("lambdas rise")
    if (losses.diff(dim=-1) > 0).any():
        raise ValueError("losses rise with lambda: make them monotone first")
    if not (losses <= bound).all():
        raise ValueError(f"losses exceed the bound {bound}")
    n = losses.shape[-2]
    holds = (losses.sum(-2) + bound) / (n + 1) <= alpha
    first = torch.where(holds.any(-1), holds.int().argmax(-1), len(lambdas) - 1)
    return lambdas[first]


def monotone(losses: Tensor) -> Tensor:
    """sup over lam' >= lam of losses (..., m), whose last axis is lam."""
    return losses.flip(-1).cummax(-1).values.flip(-1)


def prediction_sets(scores: Tensor, lam: float | Tensor) -> Tensor:
    """Labels with a score of at least 1 - lam, bool in the shape that scores (..., labels) and lam broadcast to."""
    return 1 - scores <= lam  # as `fnr_threshold` computes it, to the last digit


def false_negative_rate(sets: Tensor, labels: Tensor) -> Tensor:
    """1 - |Y and C| / |Y| for sets C and labels Y, bool (..., labels), shape (...), float32; 0 where there is no label."""
    missed, all_labels = (labels & ~sets).sum(-1), labels.sum(-1)
    return missed / all_labels.clamp(min=1)


def fnr_threshold(
    scores: Tensor,
    labels: Tensor,
    alpha: float,
    *,
    weights: Tensor | None = None,
    new_weight: float | Tensor | None = None,
) -> Tensor:
    """lam_hat for the false-negative rate of `prediction_sets`, exact: the loss jumps at 1 - score of every true label.

    Args:
        scores: shape (..., n, labels), floating point in [0, 1].
        labels: bool, same shape.
        alpha: level of the false-negative rate.
        weights: w(x_i), shape (..., n), not negative: density of the new points over that of the calibration points. None: no
            shift.
        new_weight: w(x) of the new point, shape (...) or a number; with the weights, or None.

    Returns:
        Shape (...), in [0, 1]; 1, all labels, where nothing less will do.

    Raises:
        ValueError: shapes, dtypes or values other than these, or weights without a new one.
    """
    if scores.ndim < 2 or not scores.is_floating_point() or labels.shape != scores.shape or labels.dtype != torch.bool:
        raise ValueError(
            f"scores are floating point (..., n, labels) and labels bool, got {scores.dtype} {tuple(scores.shape)} and "
            f"{labels.dtype} {tuple(labels.shape)}"
        )
    if not ((scores >= 0) & (scores <= 1)).all():
        raise ValueError("scores are in [0, 1]")
    if (weights is None) != (new_weight is None):
        raise ValueError("weights and the new point's weight come together")
    w = torch.ones(scores.shape[:-1], dtype=scores.dtype, device=scores.device) if weights is None else weights
    new = torch.as_tensor(1.0 if new_weight is None else new_weight, dtype=scores.dtype, device=scores.device)
    if w.shape != scores.shape[:-1] or not (w >= 0).all() or not (new >= 0).all():
        raise ValueError(f"weights are not negative, shape {tuple(scores.shape[:-1])}, got {tuple(w.shape)}")
    # What may be missed by the calibration points, in units of the weights, so that the bound holds.
    allowed = alpha * (w.sum(-1) + new) - new
    mass = (w / labels.sum(-1).clamp(min=1)).unsqueeze(-1) * labels
    jumps, order = torch.where(labels, 1 - scores, -1).flatten(-2).sort(-1, descending=True)
    missed = mass.flatten(-2).gather(-1, order).cumsum(-1)
    # At lam equal to a jump, what is missed are the jumps before it; below the last of them nothing more is missed.
    zero = missed.new_zeros(*missed.shape[:-1], 1)
    above, candidates = torch.cat([zero, missed], -1), torch.cat([jumps.clamp(min=0), zero], -1)
    last = ((above <= allowed.unsqueeze(-1)).sum(-1) - 1).clamp(min=0)
    chosen = candidates.gather(-1, last.unsqueeze(-1)).squeeze(-1)
    return torch.where(allowed < 0, 1, chosen)
