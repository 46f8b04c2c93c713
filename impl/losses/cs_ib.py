"""Cauchy-Schwarz divergence information bottleneck (Yu, Yu, Løkse, Jenssen, Príncipe, 2024, arXiv 2404.17951).

The Cauchy-Schwarz divergence of two densities and its kernel density estimators, with Gaussian kernels; natural logarithms:

    D(p; q) = -log[ (int p q)^2 / (int p^2 int q^2) ]
    D(p(y|x); q(y'|x)) = log sum_j [sum_i K_ji L1_ji / (sum_i K_ji)^2] + log sum_j [sum_i K_ji L2_ji / (sum_i K_ji)^2]
                         - 2 log sum_j [sum_i K_ji L21_ji / (sum_i K_ji)^2]                          Proposition 1
    I(x; t) = log[1/N^2 sum K_ij Q_ij] + log[1/N^4 sum K_ij sum Q_ij] - 2 log[1/N^3 sum_i (sum_j K_ij)(sum_j Q_ij)]
                                                                                                     Proposition 2
    objective = D(p(y|x); q(y'|x)) + beta I(x; t)

with Gram matrices K of x, L1 of y, L2 of the predictions y', L21 between y' and y, and Q of the representation t. The authors'
code (loss_cs.py of their repository) differs in three ways: logarithms to the base 2; sum_i K_ji^2 for (sum_i K_ji)^2, another
weighting of the sample ("released" here); and I(x; t) over sqrt(I(x; x) I(t; t)) (`normalized_cs_information`).

Every sum of kernels over a row, or of products of kernels, is a sum of Gaussian kernels of points side by side. Two-dimensional
inputs go through the fused operator (`gaussian_log_sums`), which holds no Gram matrix; leading axes, for many models at once,
take the dense form (`dense=True` forces it, for second derivatives and `torch.func`).
"""

import math

import torch
from torch import Tensor

from paperclaims.kernels.losses.cs_ib import gaussian_log_sums

__all__ = [
    "conditional_cs_divergence",
    "cs_divergence",
    "cs_ib_loss",
    "cs_information",
    "gaussian_cs_divergence",
    "gaussian_log_sums",
    "median_distance",
    "normalized_cs_information",
]


def cs_divergence(x: Tensor, y: Tensor, width: float = 1.0, *, dense: bool = False) -> Tensor:
    """Cauchy-Schwarz divergence between the kernel density estimates of two samples, shape (...), at least 0.

    Args:
        x, y: samples, shapes (..., n, d) and (..., m, d), floating point.
        width: standard deviation of the Gaussian kernel exp(-|x - y|^2 / (2 width^2)): that of the densities times sqrt(2).
        dense: hold the Gram matrices even where the inputs have no leading axes.

    Raises:
        ValueError: shapes, dtypes or settings that do not fit, an empty sample.
    """
    _check(("x", x), ("y", y), rows=False)
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"x and y have one number of columns, got {x.shape[-1]} and {y.shape[-1]}")
    x, y = x / _width(width), y / _width(width)
    within = (_log_sums(z, z, dense).logsumexp(-1) for z in (x, y))
    return sum(within) - 2 * _log_sums(x, y, dense).logsumexp(-1)


def conditional_cs_divergence(
    x: Tensor,
    y: Tensor,
    predictions: Tensor,
    width: float = 1.0,
    width_x: float | None = None,
    *,
    weighting: str = "published",
    dense: bool = False,
) -> Tensor:
    """Cauchy-Schwarz divergence between p(y | x) and q(prediction | x), shape (...): the prediction term (Proposition 1).

    Args:
        x: inputs, shape (..., n, d), floating point.
        y: their responses, shape (..., n) or (..., n, k).
        predictions: of the responses, the shape of `y`.
        width: standard deviation of the kernel on responses.
        width_x: of the kernel on inputs; None: `width`.
        weighting: "published", 1 / (sum_i K_ji)^2, or "released", 1 / sum_i K_ji^2 as in the authors' code.
        dense: as in `cs_divergence`.

    Raises:
        ValueError: shapes, dtypes or settings that do not fit, an empty sample.
    """
    if weighting not in ("published", "released"):
        raise ValueError(f"weighting is 'published' or 'released', got {weighting!r}")
    y, predictions = _columns(x, y), _columns(x, predictions)
    _check(("x", x), ("y", y), ("predictions", predictions))
    if y.shape != predictions.shape:
        raise ValueError(f"predictions have the shape of y, {tuple(y.shape)}, got {tuple(predictions.shape)}")
    x, y, predictions = x / _width(width if width_x is None else width_x), y / _width(width), predictions / width
    level = _log_sums(x, x, dense) * 2 if weighting == "published" else _log_sums(2**0.5 * x, 2**0.5 * x, dense)
    true, ours = torch.cat([x, y], -1), torch.cat([x, predictions], -1)
    terms = [(_log_sums(a, b, dense) - level).logsumexp(-1) for a, b in ((true, true), (ours, ours), (ours, true))]
    return terms[0] + terms[1] - 2 * terms[2]


def cs_information(x: Tensor, t: Tensor, width_x: float = 1.0, width_t: float | None = None, *, dense: bool = False) -> Tensor:
    """Cauchy-Schwarz quadratic mutual information of x and t, shape (...), at least 0: the compression term (Proposition 2).

    Args:
        x, t: paired samples, shapes (..., n, d) and (..., n, k), floating point.
        width_x, width_t: standard deviations of their kernels; None: that of x.
        dense: as in `cs_divergence`.

    Raises:
        ValueError: shapes, dtypes or settings that do not fit, an empty sample.
    """
    _check(("x", x), ("t", t))
    x, t = x / _width(width_x), t / _width(width_x if width_t is None else width_t)
    return _information(*(_log_sums(z, z, dense) for z in (x, t, torch.cat([x, t], -1))))


def normalized_cs_information(
    x: Tensor, t: Tensor, width_x: float = 1.0, width_t: float | None = None, *, dense: bool = False
) -> Tensor:
    """I(x; t) / sqrt(I(x; x) I(t; t)), as the authors train with; NaN where x or t is constant. As `cs_information`."""
    _check(("x", x), ("t", t))
    x, t = x / _width(width_x), t / _width(width_x if width_t is None else width_t)
    k, q, kq, kk, qq = (_log_sums(z, z, dense) for z in (x, t, torch.cat([x, t], -1), 2**0.5 * x, 2**0.5 * t))
    return _information(k, q, kq) / (_information(k, k, kk) * _information(q, q, qq)).sqrt()


def cs_ib_loss(
    x: Tensor,
    t: Tensor,
    y: Tensor,
    predictions: Tensor,
    beta: float,
    width: float = 1.0,
    *,
    weighting: str = "published",
    normalized: bool = True,
    dense: bool = False,
) -> Tensor:
    """Objective of the information bottleneck: the prediction term plus `beta` times the compression term, shape (...).

    Args:
        x, y, predictions, weighting, dense: as in `conditional_cs_divergence`.
        t: representations, shape (..., n, k).
        beta: weight of the compression, at least 0; at 0 that is not computed.
        width: standard deviation of all kernels.
        normalized: whether the compression term is `normalized_cs_information`.
    """
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta is a number from 0 on, got {beta}")
    loss = conditional_cs_divergence(x, y, predictions, width, weighting=weighting, dense=dense)
    if beta:
        loss = loss + beta * (normalized_cs_information if normalized else cs_information)(x, t, width, dense=dense)
    return loss


def median_distance(x: Tensor) -> float:
    """Median distance between different rows of x (n, d), n at least 2: the usual width of a kernel, before any factor."""
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"x is (n, d) with two rows or more, got {tuple(x.shape)}")
    return torch.nn.functional.pdist(x.detach()).median().item()


def gaussian_cs_divergence(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> Tensor:
    """Cauchy-Schwarz divergence of two normal distributions in closed form, shape (...): int N_p N_q is a normal density again.

    Args:
        mean, other_mean: shape (..., d), floating point.
        covariance, other_covariance: shape (..., d, d), positive definite.

    Raises:
        ValueError: shapes that do not fit.
        torch.linalg.LinAlgError: a covariance that is not positive definite.
    """
    if not mean.shape[-1:] == other_mean.shape[-1:] == covariance.shape[-1:] == covariance.shape[-2:-1] or (
        covariance.shape[-2:] != other_covariance.shape[-2:]
    ):
        shapes = [tuple(z.shape) for z in (mean, covariance, other_mean, other_covariance)]
        raise ValueError(f"means are (..., d) and covariances (..., d, d), got {shapes}")

    def log_overlap(difference, total):  # but for a constant that cancels
        root = torch.linalg.cholesky(total)
        scaled = torch.linalg.solve_triangular(root, difference.unsqueeze(-1), upper=False).squeeze(-1)
        return -scaled.square().sum(-1) / 2 - root.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    between = mean - other_mean
    within = sum(log_overlap(torch.zeros_like(between), 2 * c) for c in (covariance, other_covariance))
    return within - 2 * log_overlap(between, covariance + other_covariance)


def _log_sums(a: Tensor, b: Tensor, dense: bool) -> Tensor:
    """log sum_i exp(-|a_j - b_i|^2 / 2), shape (..., n)."""
    centre = b.detach().mean(-2, keepdim=True)  # squared distances from products need small norms
    a, b = a - centre, b - centre
    if dense or a.ndim > 2:
        a, b = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (a, b))
        squares = a.square().sum(-1).unsqueeze(-1) + b.square().sum(-1).unsqueeze(-2) - 2 * a @ b.mT
        return (squares.clamp(min=0) * -0.5).logsumexp(-1)
    return gaussian_log_sums(a, b)


def _information(k: Tensor, q: Tensor, both: Tensor) -> Tensor:
    """I from the logarithms of the row sums of two Gram matrices and of their entrywise product, (..., n) each."""
    return both.logsumexp(-1) + k.logsumexp(-1) + q.logsumexp(-1) - 2 * (k + q).logsumexp(-1)


def _columns(x: Tensor, y: Tensor) -> Tensor:
    """Responses of shape (..., n, k), k = 1 where they come without it."""
    return y.unsqueeze(-1) if y.ndim == x.ndim - 1 else y


def _width(width: float) -> float:
    if not 0 < width < math.inf:
        raise ValueError(f"a width is a number above 0, got {width}")
    return width


def _check(*samples: tuple[str, Tensor], rows: bool = True) -> None:
    name, first = samples[0]
    for other, sample in samples:
        if sample.ndim < 2 or 0 in sample.shape[-2:]:
            raise ValueError(f"{other} is (..., n, d) with at least one row and one column, got {tuple(sample.shape)}")
        if not sample.is_floating_point() or sample.dtype != first.dtype:
            raise ValueError(f"{name} and {other} have one floating-point dtype, got {first.dtype} and {sample.dtype}")
        if rows and sample.shape[:-1] != first.shape[:-1]:
            raise ValueError(f"{name} and {other} are paired, but have shapes {tuple(first.shape)} and {tuple(sample.shape)}")
