"""Comp-sum losses (Mao, Mohri, Zhong, 2023, arXiv 2304.07288): the family, its consistency bounds, its adversarial versions.

A comp-sum loss is Phi(u) of u = sum_{y'} exp(h(x, y') - h(x, y)) = 1 / softmax_y. The family here is indexed by tau >= 0:
Phi(u) = (u^(1 - tau) - 1) / (1 - tau), and log u at tau = 1. It holds the sum-exponential loss (tau = 0), the logistic loss or
cross-entropy (1), generalised cross-entropy (1 < tau < 2) and the mean absolute error (2), which is 1 - softmax_y.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = [
    "comp_sum_loss",
    "consistency_bound",
    "consistency_transform",
    "least_excess_risk",
    "least_risk",
    "margin_differences",
    "perturb",
    "smooth_adversarial_loss",
]


def comp_sum_loss(
    logits: Tensor, targets: Tensor, tau: float = 1.0, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """Comp-sum loss of scores h (section 2): with s = -log softmax_y, expm1((1 - tau) s) / (1 - tau), or s at tau = 1.

    Args:
        logits: scores, shape (..., n), floating point.
        targets: classes in [0, n) or `ignore_index`, shape (...), int64.
        tau: member of the family, at least 0. Below 1 the loss grows like exp((1 - tau) s): it is inf, and its gradient no
            number, where that leaves the range of the dtype.
        ignore_index: a target that is left out; its loss is 0.
        reduction: "mean" over the targets not ignored (NaN where there is none), "sum", or "none".

    Returns:
        Shape (...) for "none", else a scalar; the dtype of `logits`.

    Raises:
        ValueError: shapes, dtypes or settings that do not fit, or a target out of range.
    """
    _check_scores(logits, targets)
    _check_tau(tau)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is 'mean', 'sum' or 'none', got {reduction!r}")
    kept = targets != ignore_index
    _check_targets(targets[kept], logits.shape[-1])
    losses = _phi(_surprisal(logits, targets.where(kept, 0)), tau).where(kept, 0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / kept.sum()


def least_risk(p: Tensor, tau: float) -> Tensor:
    """Conditional risk sum_y p_y Phi(1 / q_y) of the best scores, whose softmax q is in proportion to p^(1 / (2 - tau)).

    Args:
        p: probabilities of the classes, shape (..., n), floating point.
        tau: member of the family, at least 0; from 2 on the best q has all its weight on one class.

    Returns:
        Shape (...): the entropy of p at tau = 1, 1 - max p at tau = 2.

    Raises:
        ValueError: not floating point with a class at least, or tau below 0.
    """
    _check_probabilities(p)
    _check_tau(tau)
    if tau == 1:
        return torch.special.entr(p).sum(-1)
    if tau >= 2:
        return (1 - p.amax(-1)) / (tau - 1)
    return (p.pow(1 / (2 - tau)).sum(-1).pow(2 - tau) - 1) / (1 - tau)


def least_excess_risk(p: Tensor, predicted: Tensor, tau: float) -> Tensor:
    """Least conditional risk of scores that predict a given class, above the least of all scores.

    Scores whose largest is that of class k are best where k shares one score with every class more probable than their mean:
    pooling p over those classes leaves the risk of equal scores as it is, so the least risk is that of the pooled p. Above
    tau = 2 the best softmax is uniform on k and some of the most probable classes.

    Args:
        p: probabilities of the classes, shape (..., n), floating point.
        predicted: the class with the largest score, shape (...), int64 in [0, n).
        tau: member of the family, at least 0.

    Returns:
        Shape (...), zero where the predicted class is a most probable one.

    Raises:
        ValueError: shapes or dtypes that do not fit, a class out of range, or tau below 0.
    """
    _check_scores(p, predicted)
    _check_tau(tau)
    _check_targets(predicted, p.shape[-1])
    own = p.gather(-1, predicted.unsqueeze(-1))
    others = p.scatter(-1, predicted.unsqueeze(-1), -math.inf).sort(-1, descending=True).values[..., :-1]
    ordered = torch.cat([own, others], -1)  # the predicted class, then the others by falling probability
    sizes = torch.arange(1, p.shape[-1] + 1, dtype=p.dtype, device=p.device)
    totals = ordered.cumsum(-1)
    if tau > 2:
        return (p.amax(-1) - (totals / sizes.pow(tau - 1)).amax(-1)) / (tau - 1)
    means = totals / sizes
    pooled_mean, last = means.max(-1, keepdim=True)
    pooled = torch.where(sizes - 1 <= last, pooled_mean, ordered)
    return least_risk(pooled, tau) - least_risk(p, tau)


def consistency_transform(beta: Tensor, tau: float, n: int) -> Tensor:
    """T_tau (Theorem 3.1): the least excess of the surrogate's risk that an excess of beta in 0-1 risk costs.

    Args:
        beta: excess of the 0-1 risk, in [0, 1], any shape, floating point.
        tau: member of the family, at least 0.
        n: number of classes, at least 2.

    Returns:
        The shape of beta.

    Raises:
        ValueError: not floating point, a beta outside [0, 1], tau below 0, or n below 2.
    """
    _check_tau(tau)
    if n < 2:
        raise ValueError(f"n is at least 2 classes, got {n}")
    if not beta.is_floating_point() or not ((beta >= 0) & (beta <= 1)).all():
        raise ValueError("beta is floating point in [0, 1]")
    if tau == 1:
        return (torch.special.xlog1py(1 + beta, beta) + torch.special.xlog1py(1 - beta, -beta)) / 2
    if tau >= 2:
        return beta / ((tau - 1) * n ** (tau - 1))
    power = 1 / (2 - tau)
    mean = (((1 + beta).pow(power) + (1 - beta).pow(power)) / 2).pow(2 - tau)
    if tau < 1:
        return 2 ** (1 - tau) / (1 - tau) * (1 - mean)
    return (mean - 1) / ((tau - 1) * n ** (tau - 1))


def consistency_bound(excess: Tensor, tau: float, n: int) -> Tensor:
    """Gamma_tau, the inverse of T_tau (Theorem 3.1): the largest excess of 0-1 risk that an excess of surrogate risk allows.

        R_01(h) - R*_01(H) + M_01(H) <= Gamma_tau(R_tau(h) - R*_tau(H) + M_tau(H))

    for every h of a symmetric and complete set H, M being the minimizability gap, R*(H) - E_x[inf_h conditional risk at x].

    Args:
        excess: excess of the surrogate's risk, at least 0, any shape, floating point.
        tau, n: as in `consistency_transform`.

    Returns:
        The shape of `excess`, in [0, 1], by bisection to the last digits; 1 (vacuous) from T_tau(1) on.

    Raises:
        ValueError: not floating point, an excess that is negative or NaN, tau below 0, or n below 2.
    """
    if not excess.is_floating_point() or not (excess >= 0).all():
        raise ValueError("excess is floating point and at least 0")
    low, high = torch.zeros_like(excess), torch.ones_like(excess)
    vacuous = excess >= consistency_transform(high, tau, n)
    for _ in range(64):
        middle = (low + high) / 2
        below = consistency_transform(middle, tau, n) <= excess
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return torch.where(vacuous, 1.0, low)


def margin_differences(logits: Tensor, targets: Tensor) -> Tensor:
    """Delta_h(x, y): h(x, y) - h(x, y') for every class y' (zero at y), shape (..., n), from logits (..., n)."""
    _check_scores(logits, targets)
    _check_targets(targets, logits.shape[-1])
    return logits.gather(-1, targets.unsqueeze(-1)) - logits


def smooth_adversarial_loss(
    clean: Tensor, perturbed: Tensor, targets: Tensor, tau: float = 1.0, *, rho: float = 1.0, nu: float = 1.0
) -> Tensor:
    """Smooth adversarial comp-sum loss (section 5): Phi_tau of clean scores / rho plus nu ||Delta_h(x', y) - Delta_h(x, y)||_2.

    Args:
        clean, perturbed: scores of x and of x', the point near x where the norm is largest (`perturb`), shape (..., n).
        targets: classes in [0, n), shape (...), int64.
        tau: member of the family, at least 0.
        rho: scale of the scores, above 0.
        nu: weight of the smooth term, at least 0. The norm's gradient at a vanishing difference is taken as 0.

    Returns:
        Shape (...).

    Raises:
        ValueError: shapes, dtypes or settings that do not fit, or a target out of range.
    """
    if clean.shape != perturbed.shape or clean.dtype != perturbed.dtype:
        raise ValueError(
            f"clean and perturbed scores share shape and dtype, got {tuple(clean.shape)} {clean.dtype} "
            f"and {tuple(perturbed.shape)} {perturbed.dtype}"
        )
    if not (rho > 0 and nu >= 0):
        raise ValueError(f"rho is above 0 and nu at least 0, got {rho} and {nu}")
    moved = (margin_differences(perturbed, targets) - margin_differences(clean, targets)).norm(dim=-1)
    return comp_sum_loss(clean / rho, targets, tau, ignore_index=-1, reduction="none") + nu * moved


def perturb(
    objective: Callable[[Tensor], Tensor],
    x: Tensor,
    epsilon: float,
    *,
    steps: int,
    step_size: float,
    start: Tensor | None = None,
    low: float = -math.inf,
    high: float = math.inf,
) -> Tensor:
    """Projected gradient ascent by signs: points within epsilon of x, in every coordinate, that make the objective large.

    Args:
        objective: from points of the shape of x to values that are summed, such as the norm in `smooth_adversarial_loss`.
        x: floating point, any shape.
        epsilon: radius in the maximum norm, at least 0.
        steps, step_size: of the ascent, at least 0 each.
        start: first points, brought within reach; None: x itself. A norm of differences needs a start away from x.
        low, high: bounds of every coordinate.

    Returns:
        The shape of x, without a gradient.

    Raises:
        ValueError: x not floating point, or a negative radius, number or size of steps.
    """
    if not x.is_floating_point():
        raise ValueError(f"x is floating point, got {x.dtype}")
    if not (epsilon >= 0 and steps >= 0 and step_size >= 0):
        raise ValueError(f"epsilon, steps and step_size are at least 0, got {epsilon}, {steps} and {step_size}")
    x = x.detach()

    def reach(point: Tensor) -> Tensor:
        return point.clamp(x - epsilon, x + epsilon).clamp(low, high)

    point = reach(x if start is None else start.detach())
    for _ in range(steps):
        with torch.enable_grad():
            point.requires_grad_()
            (gradient,) = torch.autograd.grad(objective(point).sum(), point)
        point = reach(point.detach() + step_size * gradient.sign())
    return point


def _phi(surprisal: Tensor, tau: float) -> Tensor:
    """Phi_tau(u) from log u."""
    return surprisal if tau == 1 else torch.expm1((1 - tau) * surprisal) / (1 - tau)


def _surprisal(logits: Tensor, targets: Tensor) -> Tensor:
    return -logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _check_probabilities(p: Tensor) -> None:
    if p.ndim < 1 or p.shape[-1] == 0 or not p.is_floating_point():
        raise ValueError(f"scores and probabilities are floating point of shape (..., n), got {p.dtype} {tuple(p.shape)}")


def _check_scores(scores: Tensor, targets: Tensor) -> None:
    _check_probabilities(scores)
    if targets.shape != scores.shape[:-1] or targets.dtype != torch.int64:
        raise ValueError(
            f"classes are int64 of shape {tuple(scores.shape[:-1])}, got {targets.dtype} of shape {tuple(targets.shape)}"
        )


def _check_targets(targets: Tensor, n: int) -> None:
    if targets.numel() and not (targets.min() >= 0 and targets.max() < n):
        raise ValueError(f"classes are in [0, {n}), got {targets.min().item()} to {targets.max().item()}")


def _check_tau(tau: float) -> None:
    if not 0 <= tau < math.inf:
        raise ValueError(f"tau is a number from 0 on, got {tau}")
