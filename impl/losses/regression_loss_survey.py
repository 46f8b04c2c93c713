"""The 14 regression losses of Jadon, Patil, Jadon, "A Comprehensive Survey of Regression Based Loss Functions for Time Series
Forecasting" (2022, arXiv 2211.02989), with actual values y, forecasts f and errors e = y - f.

What the best constant forecast of each is, whether it is convex in the forecast, and the bound of its slope by one forecast:

    loss                         best constant                    convex     slope
    absolute, MAE, RAE           median                           yes        1 (RAE: 1 / sum |y - mean|)
    squared, RMSE, RSE, NRMSE    mean                             yes        unbounded (RMSE, NRMSE: bounded)
    bias, MBE                    none: falls without end          linear     1
    percentage, MAPE             median weighted by 1 / |y|       yes        1 / |y|
    logarithmic, MSLE, RMSLE     exp(mean log(1 + y)) - 1         no, where 1 + f > e (1 + y)
    relative, RRMSE              mean y^2 / mean y                no
    Huber                        root of mean clipped error       yes        delta
    log-cosh                     root of mean tanh(e)             yes        1
    quantile                     q-quantile                       yes        max(q, 1 - q)
"""

import math

import torch
from torch import Tensor

__all__ = [
    "absolute_error",
    "bias_error",
    "huber_loss",
    "log_cosh_loss",
    "logarithmic_error",
    "normalised_root_error",
    "percentage_error",
    "quantile_loss",
    "relative_absolute_error",
    "relative_root_error",
    "relative_squared_error",
    "root_logarithmic_error",
    "root_squared_error",
    "squared_error",
]

Dim = int | tuple[int, ...] | None


def absolute_error(forecast: Tensor, actual: Tensor, *, reduction: str = "mean") -> Tensor:
    """MAE, |e|.

    Args (here and in the other losses of single errors):
        forecast, actual: one shape, one floating-point dtype.
        reduction: "mean" over all entries (NaN where there is none), "sum", or "none".

    Returns:
        A scalar, or the shape of the errors for "none".

    Raises:
        ValueError: two shapes or dtypes, not floating point, another reduction, or what the single loss says.
    """
    return _reduced(_error(forecast, actual).abs(), reduction)


def squared_error(forecast: Tensor, actual: Tensor, *, reduction: str = "mean") -> Tensor:
    """MSE, e^2. Arguments and errors as in `absolute_error`."""
    return _reduced(_error(forecast, actual).square(), reduction)


def bias_error(forecast: Tensor, actual: Tensor, *, reduction: str = "mean") -> Tensor:
    """MBE, e: positive where the forecast is too low. Errors cancel, so it measures and does not train."""
    return _reduced(_error(forecast, actual), reduction)


def percentage_error(forecast: Tensor, actual: Tensor, *, reduction: str = "mean") -> Tensor:
    """MAPE, |e / y| (a share; times 100 for per cent). ValueError also for an actual value of 0."""
    error = _error(forecast, actual)
    if (actual == 0).any():
        raise ValueError("the percentage error needs actual values other than 0")
    return _reduced((error / actual).abs(), reduction)


def logarithmic_error(forecast: Tensor, actual: Tensor, *, reduction: str = "mean") -> Tensor:
    """MSLE, (log(1 + y) - log(1 + f))^2; NaN for a forecast below -1. ValueError also for an actual value of -1 or less."""
    return _reduced(_log_ratio(forecast, actual).square(), reduction)


def huber_loss(forecast: Tensor, actual: Tensor, delta: float = 1.0, *, reduction: str = "mean") -> Tensor:
    """Huber: e^2 / 2 up to |e| = delta, then delta (|e| - delta / 2). ValueError also for a delta that is not above 0."""
    size = _error(forecast, actual).abs()
    if not 0 < delta < math.inf:
        raise ValueError(f"delta is a number above 0, got {delta}")
    small = size.clamp(max=delta)
    return _reduced(small * (size - small / 2), reduction)


def log_cosh_loss(forecast: Tensor, actual: Tensor, *, reduction: str = "mean") -> Tensor:
    """Log-cosh, log cosh e: e^2 / 2 for small errors, |e| - log 2 for large ones, to full precision at both ends."""
    size = _error(forecast, actual).abs()
    near, far = size.clamp(max=1), size.clamp(min=1)
    small = torch.log1p(2 * torch.sinh(near / 2).square())
    large = far + torch.log1p(torch.exp(-2 * far)) - math.log(2)
    return _reduced(torch.where(size < 1, small, large), reduction)


def quantile_loss(forecast: Tensor, actual: Tensor, q: float = 0.5, *, reduction: str = "mean") -> Tensor:
    """Quantile or pinball loss, max(q e, (q - 1) e). ValueError also for a q outside (0, 1)."""
    error = _error(forecast, actual)
    if not 0 < q < 1:
        raise ValueError(f"q is in (0, 1), got {q}")
    return _reduced(torch.maximum(q * error, (q - 1) * error), reduction)


def relative_absolute_error(forecast: Tensor, actual: Tensor, *, dim: Dim = None) -> Tensor:
    """RAE, sum |e| / sum |y - mean y|.

    Args (here and in the other losses of whole series):
        forecast, actual: one shape, one floating-point dtype.
        dim: the axes that a series runs along; None: all.

    Returns:
        The shape without those axes; NaN for a series without entries, inf or NaN for constant actual values.

    Raises:
        ValueError: two shapes or dtypes, or not floating point.
    """
    return _error(forecast, actual).abs().sum(dim) / (actual - _mean(actual, dim)).abs().sum(dim)


def relative_squared_error(forecast: Tensor, actual: Tensor, *, dim: Dim = None) -> Tensor:
    """RSE, sum e^2 / sum (y - mean y)^2. Arguments and errors as in `relative_absolute_error`."""
    return _error(forecast, actual).square().sum(dim) / (actual - _mean(actual, dim)).square().sum(dim)


def root_squared_error(forecast: Tensor, actual: Tensor, *, dim: Dim = None) -> Tensor:
    """RMSE, sqrt(mean e^2), with a gradient of 0 where every error is 0."""
    return _root(_error(forecast, actual).square().mean(dim))


def root_logarithmic_error(forecast: Tensor, actual: Tensor, *, dim: Dim = None) -> Tensor:
    """RMSLE, the root of MSLE. ValueError also for an actual value of -1 or less."""
    return _root(_log_ratio(forecast, actual).square().mean(dim))


def normalised_root_error(forecast: Tensor, actual: Tensor, *, by: str = "mean", dim: Dim = None) -> Tensor:
    """NRMSE, RMSE over the mean of the actual values, or over their range. ValueError also for another `by`."""
    root = root_squared_error(forecast, actual, dim=dim)
    if by == "mean":
        return root / actual.mean(dim)
    if by == "range":
        axes = tuple(range(actual.ndim)) if dim is None else dim
        return root / (actual.amax(axes) - actual.amin(axes))
    raise ValueError(f"by is 'mean' or 'range', got {by!r}")


def relative_root_error(forecast: Tensor, actual: Tensor, *, dim: Dim = None) -> Tensor:
    """RRMSE, sqrt(mean e^2 / sum f^2): scaled by the forecasts themselves, so that it rewards forecasts that are too high."""
    return _root(_error(forecast, actual).square().mean(dim) / forecast.square().sum(dim))


def _error(forecast: Tensor, actual: Tensor) -> Tensor:
    if forecast.shape != actual.shape or forecast.dtype != actual.dtype or not actual.is_floating_point():
        raise ValueError(
            f"forecast and actual share a shape and a floating-point dtype, got {tuple(forecast.shape)} {forecast.dtype} "
            f"and {tuple(actual.shape)} {actual.dtype}"
        )
    return actual - forecast


def _log_ratio(forecast: Tensor, actual: Tensor) -> Tensor:
    _error(forecast, actual)
    if not (actual > -1).all():
        raise ValueError("the logarithmic error needs actual values above -1")
    return actual.log1p() - forecast.log1p()


def _mean(x: Tensor, dim: Dim) -> Tensor:
    return x.mean(tuple(range(x.ndim)) if dim is None else dim, keepdim=True)


def _root(square: Tensor) -> Tensor:
    positive = square != 0  # the root's own gradient is infinite at 0
    return torch.where(positive, square, 1).sqrt().where(positive, 0)


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is 'mean', 'sum' or 'none', got {reduction!r}")
    return losses.mean() if reduction == "mean" else losses.sum()
