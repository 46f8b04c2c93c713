"""Second-order losses for distributions over probability vectors (Bengs, Hüllermeier, Waegeman, 2022, arXiv 2203.06102).

A second-order learner predicts Q, a distribution over the probabilities theta of K classes, here a Dirichlet with parameters
alpha. It is trained by a loss of the class y that was drawn,

    outer:  L(Q, y) = E_(theta ~ Q) l(theta, y)          inner:  L(Q, y) = l(E_Q theta, y)

with l the logarithmic or the Brier loss. The outer loss is linear in Q, so that nothing beats the point mass on the best theta;
the inner one sees the mean of Q only. With lam KL(Q || uniform) added, the mean outer logarithmic loss of labels with frequencies
p has its minimum at alpha = 1 + p / lam, whatever their number.
"""

import math

import torch
from torch import Tensor

__all__ = [
    "dirichlet_mean",
    "inner_loss",
    "kl_to_uniform",
    "outer_loss",
    "posterior",
    "regularized_minimum",
    "total_variance",
]


def dirichlet_mean(alpha: Tensor) -> Tensor:
    """E theta = alpha / alpha_0, shape (..., K).

    Raises:
        ValueError: alpha not floating point (..., K), or not above 0.
    """
    _check(alpha)
    return alpha / alpha.sum(-1, keepdim=True)


def outer_loss(alpha: Tensor, y: Tensor, *, form: str = "log") -> Tensor:
    """E l(theta, y) under Dirichlets; differentiable in alpha.

    log: psi(alpha_0) - psi(alpha_y); Brier: sum_k (E theta_k - [k = y])^2 plus the total variance.

    Args:
        alpha: shape (..., K), floating point, above 0.
        y: classes, int64, shape (...).
        form: "log" or "brier".

    Returns:
        Shape (...).

    Raises:
        ValueError: shapes, dtypes or classes other than these, or another form.
    """
    _check(alpha, y, form)
    if form == "log":
        return torch.digamma(alpha.sum(-1)) - torch.digamma(alpha.gather(-1, y.unsqueeze(-1)).squeeze(-1))
    return _brier(dirichlet_mean(alpha), y) + total_variance(alpha)


def inner_loss(alpha: Tensor, y: Tensor, *, form: str = "log") -> Tensor:
    """l(E theta, y): a loss of the mean alone. Arguments, result and errors as in `outer_loss`."""
    _check(alpha, y, form)
    mean = dirichlet_mean(alpha)
    return -mean.gather(-1, y.unsqueeze(-1)).squeeze(-1).log() if form == "log" else _brier(mean, y)


def kl_to_uniform(alpha: Tensor) -> Tensor:
    """KL(Dir(alpha) || Dir(1, ..., 1)), the uniform distribution over the simplex; shape (...).

    Raises:
        ValueError: as in `dirichlet_mean`.
    """
    _check(alpha)
    total, k = alpha.sum(-1), alpha.shape[-1]
    spread = ((alpha - 1) * (torch.digamma(alpha) - torch.digamma(total).unsqueeze(-1))).sum(-1)
    return torch.lgamma(total) - torch.lgamma(alpha).sum(-1) - math.lgamma(k) + spread


def total_variance(alpha: Tensor) -> Tensor:
    """sum_k Var theta_k = sum_k m_k (1 - m_k) / (alpha_0 + 1) with m the mean, shape (...): the width of Q.

    Raises:
        ValueError: as in `dirichlet_mean`.
    """
    mean = dirichlet_mean(alpha)
    return (mean * (1 - mean)).sum(-1) / (alpha.sum(-1) + 1)


def posterior(counts: Tensor, prior: float = 1.0) -> Tensor:
    """Dirichlet of Bayes' rule after class counts (..., K): prior + counts, whose variance falls like 1 / n.

    Raises:
        ValueError: counts below 0, without an axis of classes, or a prior not above 0.
    """
    if counts.ndim < 1 or (counts < 0).any() or not prior > 0:
        raise ValueError(f"counts (..., K) are at least 0 and the prior above 0, got {tuple(counts.shape)} and {prior}")
    return counts + prior


def regularized_minimum(frequencies: Tensor, lam: float) -> Tensor:
    """1 + p / lam: the Dirichlet of the least mean outer logarithmic loss plus lam `kl_to_uniform`, for frequencies (..., K).

    Raises:
        ValueError: frequencies below 0 or not floating point, or a lam not above 0.
    """
    if not frequencies.is_floating_point() or frequencies.ndim < 1 or (frequencies < 0).any() or not lam > 0:
        raise ValueError(f"frequencies are floating point, at least 0, and lam above 0, got {frequencies.dtype} and {lam}")
    return 1 + frequencies / lam


def _brier(mean: Tensor, y: Tensor) -> Tensor:
    return (mean - torch.nn.functional.one_hot(y, mean.shape[-1])).square().sum(-1)


def _check(alpha: Tensor, y: Tensor | None = None, form: str = "log") -> None:
    if not alpha.is_floating_point() or alpha.ndim < 1 or not (alpha > 0).all():
        raise ValueError(f"alpha is floating point (..., K) and above 0, got {alpha.dtype} {tuple(alpha.shape)}")
    if y is not None and (y.shape != alpha.shape[:-1] or y.dtype != torch.int64 or ((y < 0) | (y >= alpha.shape[-1])).any()):
        raise ValueError(
            f"y is int64 in 0..{alpha.shape[-1] - 1}, shape {tuple(alpha.shape[:-1])}, got {y.dtype} {tuple(y.shape)}"
        )
    if form not in ("log", "brier"):
        raise ValueError(f"form is 'log' or 'brier', got {form!r}")
