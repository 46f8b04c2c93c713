"""Mean absolute directional loss (Michańków, Sakowski, Ślepaczuk, 2023, arXiv 2309.10546): forecasts judged by trading.

    MADL = (1 / N) sum_i -sign(R_i F_i) |R_i|           R: return that came, F: return that was forecast

-N MADL is the sum of the returns of a strategy that is long where F > 0, short where F < 0, and out of the market where F = 0.
Its gradient is 0 wherever it exists, so that it serves to choose between models; to train one, sign(u) becomes tanh(a u).
"""

import math

import torch
from torch import Tensor

__all__ = ["directional_loss", "information_ratio", "madl", "smooth_madl", "strategy_returns"]


def strategy_returns(realised: Tensor, forecast: Tensor) -> Tensor:
    """sign(F) R, the return of every period, in the shape that the two broadcast to.

    Raises:
        ValueError: not floating point, two dtypes, or shapes that do not broadcast.
    """
    _check(realised, forecast)
    return forecast.sign() * realised


def madl(realised: Tensor, forecast: Tensor, *, reduction: str = "mean") -> Tensor:
    """MADL over the last axis, the periods; lower is better.

    Args:
        realised, forecast: R and F, shapes that broadcast to (..., n), floating point of one dtype, in any unit of return.
        reduction: "mean" or "sum" over the periods, or "none".

    Returns:
        Shape (...), or (..., n) for "none", in the unit of the returns; NaN for the mean of nothing.

    Raises:
        ValueError: as in `strategy_returns`, no axis of periods, or another reduction.
    """
    return _reduce(-strategy_returns(realised, forecast), reduction)


def smooth_madl(realised: Tensor, forecast: Tensor, a: float, *, reduction: str = "mean") -> Tensor:
    """MADL with tanh(a R F) for the sign: it has a gradient, and tends to MADL as a grows.

    Args:
        a: sharpness, at least 0, per squared unit of return: daily returns as fractions have R F near 1e-4, so that a is some
            1e4 for a tanh that is neither flat nor a step.
        realised, forecast, reduction: as in `madl`.

    Raises:
        ValueError: as in `madl`, or an a that is negative or not finite.
    """
    _check(realised, forecast)
    if not 0 <= a < math.inf:
        raise ValueError(f"a is a number from 0 on, got {a}")
    wide = torch.promote_types(realised.dtype, torch.float32)  # a R alone overflows in 16 bits, and inf times 0 is NaN
    signs = (a * realised.to(wide) * forecast.to(wide)).tanh().to(realised.dtype)
    return _reduce(-signs * realised.abs(), reduction)


def directional_loss(realised: Tensor, forecast: Tensor, *, reduction: str = "mean") -> Tensor:
    """-sign(R F): MADL without the weight of the return. Arguments, results and errors as in `madl`."""
    return _reduce(-strategy_returns(realised, forecast).sign(), reduction)


def information_ratio(returns: Tensor, *, periods: int = 252) -> Tensor:
    """Mean over standard deviation of the returns (..., n), times the root of the periods of a year; shape (...).

    A strategy that never moves has NaN.

    Raises:
        ValueError: returns not floating point, fewer than two, or no periods.
    """
    if not returns.is_floating_point() or returns.ndim < 1 or returns.shape[-1] < 2 or periods < 1:
        raise ValueError(f"returns are floating point (..., n) with n at least 2, got {returns.dtype} {tuple(returns.shape)}")
    return returns.mean(-1) / returns.std(-1) * periods**0.5


def _reduce(losses: Tensor, reduction: str) -> Tensor:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is 'mean', 'sum' or 'none', got {reduction!r}")
    if losses.ndim < 1:
        raise ValueError("losses are over an axis of periods, got numbers")
    return losses if reduction == "none" else losses.mean(-1) if reduction == "mean" else losses.sum(-1)


def _check(realised: Tensor, forecast: Tensor) -> None:
    if not realised.is_floating_point() or realised.dtype != forecast.dtype:
        raise ValueError(f"realised and forecast share a floating-point dtype, got {realised.dtype} and {forecast.dtype}")
    try:
        torch.broadcast_shapes(realised.shape, forecast.shape)
    except RuntimeError:
        raise ValueError(f"shapes {tuple(realised.shape)} and {tuple(forecast.shape)} do not broadcast") from None
