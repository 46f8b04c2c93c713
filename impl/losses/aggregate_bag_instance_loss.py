"""Learning from aggregate responses (Javanmard, Chen, Mirrokni, Badanidiyuru, Fu, 2024, arXiv 2401.11081).

Samples come in bags of k, and only the mean response of a bag is known. The bag-level loss compares it with the bag's mean
prediction, the instance-level loss with every prediction. For squared errors

    L_ins = L_bag + within-bag variance of the predictions,        L_rho = L_bag + rho * variance,

so that rho interpolates between bag (0) and instance (1). For linear regression on isotropic Gaussian features the risk of the
minimiser of L_rho + lam |theta|^2 has a limit where n / d stays fixed. The paper's statement of it, and of the best bag size
under privacy, was not at hand: `predicted_risk` and `best_private_bag_size` were derived anew.
"""

import math
from collections.abc import Callable

import scipy
import torch
from torch import Tensor

__all__ = [
    "bag_loss",
    "best_private_bag_size",
    "fit_linear",
    "instance_loss",
    "interpolating_loss",
    "predicted_risk",
    "private_means",
    "within_bag_variance",
]

Loss = Callable[[Tensor, Tensor], Tensor]


def squared(prediction: Tensor, response: Tensor) -> Tensor:
    return (prediction - response).square()


def bag_loss(predictions: Tensor, means: Tensor, loss: Loss = squared) -> Tensor:
    """Mean over the bags of the loss between mean prediction and mean response.

    Args:
        predictions: f(x), shape (..., bags, k), floating point.
        means: mean responses, shape (..., bags), floating point.
        loss: from predictions and responses of one shape to losses of that shape; the squared error unless given.

    Returns:
        Shape (...); NaN without bags.

    Raises:
        ValueError: shapes or dtypes that do not fit, or empty bags.
    """
    _check(predictions, means)
    return loss(predictions.mean(-1), means).mean(-1)


def instance_loss(predictions: Tensor, means: Tensor, loss: Loss = squared) -> Tensor:
    """Mean over all samples of the loss between prediction and the mean response of the bag; at least `bag_loss` if convex.

    Arguments, returns and errors as in `bag_loss`.
    """
    _check(predictions, means)
    return loss(predictions, means.unsqueeze(-1).expand_as(predictions)).mean((-2, -1))


def within_bag_variance(predictions: Tensor) -> Tensor:
    """Mean over all samples of the squared deviation from the bag's mean prediction: (..., bags, k) to (...).

    Computed in float32 at least: squares leave the range of half precision before their mean does.
    """
    _check(predictions, predictions.sum(-1))
    wide = predictions.to(torch.promote_types(predictions.dtype, torch.float32))
    return (wide - wide.mean(-1, keepdim=True)).square().mean((-2, -1)).to(predictions.dtype)


def interpolating_loss(predictions: Tensor, means: Tensor, rho: float) -> Tensor:
    """L_rho = (1 - rho) L_bag + rho L_ins for squared errors.

    Args:
        predictions, means: as in `bag_loss`.
        rho: weight of the variance within bags, at least 0; the paper's are at most 1.

    Returns:
        Shape (...).

    Raises:
        ValueError: as in `bag_loss`, or a negative rho.
    """
    _check_weight(rho=rho)
    return bag_loss(predictions, means) + rho * within_bag_variance(predictions)


def fit_linear(x: Tensor, means: Tensor, rho: float, ridge: float = 0.0) -> Tensor:
    """Minimiser theta of L_rho + ridge * |theta|^2 for f(x) = <x, theta>, that of least norm where there are many.

    It is least squares on rows sqrt(k) * (bag mean of x), with responses sqrt(k) * mean, and sqrt(rho) * (x - bag mean), with
    responses 0. On CUDA the rows need full column rank, as torch has no other solver there.

    Args:
        x: features, shape (..., bags, k, d), floating point.
        means: mean responses, shape (..., bags, outputs), the dtype of x.
        rho, ridge: weights, at least 0.

    Returns:
        Shape (..., d, outputs).

    Raises:
        ValueError: shapes or dtypes that do not fit, empty bags, no bag, or a negative weight.
    """
    _check_weight(rho=rho, ridge=ridge)
    if x.ndim < 3 or means.ndim < 2 or x.shape[:-2] != means.shape[:-1] or min(x.shape[-3:]) == 0:
        raise ValueError(
            f"x is (..., bags, k, d) and means (..., bags, outputs), none empty, got {tuple(x.shape)} and {tuple(means.shape)}"
        )
    if x.dtype not in (torch.float32, torch.float64) or x.dtype != means.dtype:
        raise ValueError(f"x and means share float32 or float64, got {x.dtype} and {means.dtype}")
    bags, k, d = x.shape[-3:]
    center = x.mean(-2, keepdim=True)
    rows, targets = [k**0.5 * center.squeeze(-2)], [k**0.5 * means]
    if rho and k > 1:
        rows.append(rho**0.5 * (x - center).flatten(-3, -2))
    if ridge:
        rows.append((bags * k * ridge) ** 0.5 * torch.eye(d, dtype=x.dtype, device=x.device).expand(*x.shape[:-3], d, d))
    a = torch.cat(rows, -2)
    targets.append(means.new_zeros(*means.shape[:-2], a.shape[-2] - bags, means.shape[-1]))
    return torch.linalg.lstsq(a, torch.cat(targets, -2)).solution


def predicted_risk(n: int, d: int, k: int, rho: float, ridge: float = 0.0, *, signal: float = 1.0, noise: float = 1.0) -> float:
    """Limit of E |theta_hat - theta|^2 for `fit_linear` on isotropic Gaussian features, as n and d grow with n / d fixed.

    Rotated within each bag, the rows of the least-squares problem are independent and standard normal, m = n / k of weight 1 and
    n - m of weight rho. With M = (Z_b' Z_b + rho Z_w' Z_w) / n + ridge, its limit e of tr(M^-1) / n solves

        e (ridge + (m / n) / (1 + e) + (1 - m / n) rho / (1 + rho e)) = d / n,

    and with e' = de / d ridge, h' = (m / n) / (1 + e)^2 + (m^2 / (n d)) (1 - e) / (1 + e)^3,

        risk = signal (1 - 2 (m / d) e / (1 + e) - h' e') - noise (m / n) e' / (1 + e)^2.

    Args:
        n, d: samples and features.
        k: size of the bags.
        rho, ridge: weights, at least 0; together they leave enough rows: ridge > 0, or m > d, or rho > 0 and n > d.
        signal: |theta|^2.
        noise: variance of a sample's noise, or k times that of a bag mean's.

    Raises:
        ValueError: a negative weight, size or variance, or too few rows.
    """
    _check_weight(rho=rho, ridge=ridge, signal=signal, noise=noise)
    if min(n, d, k) < 1:
        raise ValueError(f"n, d and k are at least 1, got {n}, {d} and {k}")
    share, ratio = 1 / k, d / n
    if ridge == 0 and (1.0 if rho else share) <= ratio:
        raise ValueError(f"without a ridge the rows, {n if rho else n // k}, have to be more than the features, {d}")

    def excess(e: float) -> float:
        return e * (ridge + share / (1 + e) + (1 - share) * rho / (1 + rho * e)) - ratio

    high = 1.0
    while excess(high) < 0:
        high *= 2
    e = scipy.optimize.brentq(excess, 0.0, high, xtol=1e-15, rtol=1e-14)
    slope = ridge + share / (1 + e) ** 2 + (1 - share) * rho / (1 + rho * e) ** 2  # d(excess) / de
    e_prime = -e / slope
    h_prime = share / (1 + e) ** 2 + share**2 / ratio * (1 - e) / (1 + e) ** 3
    bias = 1 - 2 * share / ratio * e / (1 + e) - h_prime * e_prime
    return signal * bias - noise * share * e_prime / (1 + e) ** 2


def private_means(responses: Tensor, k: int, epsilon: float, clip: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Bag means of clipped responses with Laplace noise: the means are epsilon-differentially private in each response.

    Args:
        responses: shape (..., n), floating point; consecutive ones share a bag.
        k: size of the bags, divides n.
        epsilon: above 0; inf: no noise.
        clip: C, above 0. A response changes its mean by 2 C / k at most, so the noise has the scale 2 C / (k epsilon).
        generator: of the noise.

    Returns:
        Shape (..., n / k).

    Raises:
        ValueError: responses that are not floating point, k that does not divide n, or epsilon or clip not above 0.
    """
    if not responses.is_floating_point() or responses.ndim < 1:
        raise ValueError(f"responses are floating point of shape (..., n), got {responses.dtype} {tuple(responses.shape)}")
    _check_private(epsilon, clip)
    if k < 1 or responses.shape[-1] % k:
        raise ValueError(f"bags of {k} do not divide {responses.shape[-1]} responses")
    means = responses.clamp(-clip, clip).unflatten(-1, (-1, k)).mean(-1)
    uniform = torch.rand(2, *means.shape, dtype=means.dtype, device=means.device, generator=generator)
    laplace = torch.log1p(-uniform[0]) - torch.log1p(-uniform[1])  # difference of two exponentials
    return means + 2 * clip / (k * epsilon) * laplace


def best_private_bag_size(n: int, d: int, epsilon: float, clip: float, *, signal: float = 1.0, noise: float = 1.0) -> float:
    """Bag size of least risk for the instance loss without ridge on `private_means`, where n is much larger than d.

    There the risk is signal (1 - 1/k)^2 + (d / n) ((signal + noise) / k + V / k^2) with V = 2 (2 C / epsilon)^2, least at

        k = (signal + V d / n) / (signal - (d / n) (signal + noise) / 2).

    Args:
        n, d: samples and features.
        epsilon, clip: of `private_means`.
        signal, noise: |theta|^2 and variance of the noise.

    Returns:
        A real number; inf where the risk falls with every size.

    Raises:
        ValueError: sizes below 1, a negative variance, or epsilon or clip not above 0.
    """
    _check_weight(signal=signal, noise=noise)
    _check_private(epsilon, clip)
    if min(n, d) < 1:
        raise ValueError(f"n and d are at least 1, got {n} and {d}")
    ratio = d / n
    information = signal - ratio * (signal + noise) / 2
    return (signal + ratio * 2 * (2 * clip / epsilon) ** 2) / information if information > 0 else math.inf


def _check(predictions: Tensor, means: Tensor) -> None:
    if predictions.ndim < 2 or predictions.shape[-1] == 0 or means.shape != predictions.shape[:-1]:
        raise ValueError(
            f"predictions are (..., bags, k) and means (..., bags), got {tuple(predictions.shape)} and {tuple(means.shape)}"
        )
    if not predictions.is_floating_point() or not means.is_floating_point():
        raise ValueError(f"predictions and means are floating point, got {predictions.dtype} and {means.dtype}")


def _check_weight(**weights: float) -> None:
    for name, value in weights.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is a number from 0 on, got {value}")


def _check_private(epsilon: float, clip: float) -> None:
    if not (epsilon > 0 and 0 < clip < math.inf):
        raise ValueError(f"epsilon and clip are above 0, got {epsilon} and {clip}")
