"""Black-box proper losses (Kimpara, Frongillo, Waggoner, 2022, arXiv 2211.03761): judging a model by its samples alone.

A model p and a target q over a finite alphabet are seen only through draws. The expectation of any loss of n draws of p and m of
q is a polynomial of degree at most n in p and m in q, so these are the only expected losses there are; each of them is estimated
without bias by falling factorials of the counts X,

    E[prod_y (X_y)_{k_y}] = (n)_{|k|} prod_y p_y^{k_y},        (X)_k = X (X - 1) ... (X - k + 1).

A number of draws that is itself Poisson, with mean lam, makes the counts independent and E[(X)_k] = (lam p)^k of every degree, so
that power series can be estimated too, cross-entropy among them.
"""

import math
from collections.abc import Callable, Sequence
from itertools import combinations_with_replacement

import torch
from torch import Tensor

__all__ = [
    "all_counts",
    "count",
    "count_probabilities",
    "expected_loss",
    "inverse_binomial_log_loss",
    "monomial",
    "plug_in_power_loss",
    "poisson_log_loss",
    "poisson_monomial",
    "power_loss",
]

EULER = 0.5772156649015329


def count(draws: Tensor, size: int) -> Tensor:
    """How often each symbol was drawn.

    Args:
        draws: symbols in [0, size), shape (..., n), int64.
        size: of the alphabet.

    Returns:
        Counts, shape (..., size), int64.

    Raises:
        ValueError: not int64 of shape (..., n), or a symbol out of range.
    """
    if draws.ndim < 1 or draws.dtype != torch.int64:
        raise ValueError(f"draws are int64 of shape (..., n), got {draws.dtype} {tuple(draws.shape)}")
    if draws.numel() and not (draws.min() >= 0 and draws.max() < size):
        raise ValueError(f"symbols are in [0, {size}), got {draws.min().item()} to {draws.max().item()}")
    zeros = torch.zeros(*draws.shape[:-1], size, dtype=torch.int64, device=draws.device)
    return zeros.scatter_add(-1, draws, torch.ones_like(draws))


def monomial(counts: Tensor, powers: Sequence[int] | Tensor) -> Tensor:
    """Unbiased estimate of prod_y p_y^{k_y} from n draws: prod_y (X_y)_{k_y} / (n)_{|k|}.

    Args:
        counts: X, shape (..., size), integers; n is their sum, at least |k| = sum_y k_y.
        powers: k, one for each symbol, at least 0.

    Returns:
        Shape (...), float64, in [0, 1].

    Raises:
        ValueError: counts that are not integers of at least 0, powers that do not fit, or fewer draws than their degree.
    """
    powers = _powers(counts, powers)
    degree, least = int(powers.sum()), _draws(counts)
    if least < degree:
        raise ValueError(f"a monomial of degree {degree} needs as many draws, got {least}: no loss of fewer is unbiased")
    return _falling(counts, powers).prod(-1) / _falling(counts.sum(-1), powers.sum())


def poisson_monomial(counts: Tensor, powers: Sequence[int] | Tensor, lam: float) -> Tensor:
    """Unbiased estimate of prod_y p_y^{k_y} from Poisson-many draws, lam in the mean: prod_y (X_y)_{k_y} / lam^{|k|}.

    Args and errors as in `monomial`, but for any number of draws; ValueError also for a lam that is not above 0.
    """
    powers = _powers(counts, powers)
    _check_mean(lam)
    return (_falling(counts, powers) / lam**powers).prod(-1)


def power_loss(model: Tensor, target: Tensor, degree: int = 2) -> Tensor:
    """Strictly proper loss of d draws of the model and one of the target.

    It is unbiased for (d - 1) sum_y p_y^d - d sum_y p_y^(d-1) q_y, the Bregman divergence from p to q of the convex sum_y p_y^d
    without its part sum_y q_y^d that no model changes; for d = 2 it is ||p - q||^2 - ||q||^2. It averages over more draws.

    Args:
        model: counts of draws of p, shape (..., size), integers, `degree` of them or more.
        target: counts of draws of q, shape (..., size) that broadcasts, one of them or more.
        degree: d, at least 2.

    Returns:
        Shape (...), float64.

    Raises:
        ValueError: counts that are not integers of at least 0 of the same symbols, a degree below 2, or too few draws.
    """
    _check_pair(model, target, degree)
    n = _draws(model)
    if n < degree:
        raise ValueError(f"a loss of degree {degree} needs as many draws of the model, got {n}")
    total, drawn = model.sum(-1), target.sum(-1).double()
    own = _falling(model, degree).sum(-1) / _falling(total, degree)
    shared = (_falling(model, degree - 1) * target).sum(-1) / (_falling(total, degree - 1) * drawn)
    return (degree - 1) * own - degree * shared


def plug_in_power_loss(model: Tensor, target: Tensor, degree: int = 2) -> Tensor:
    """The same polynomial of the frequencies X / n in place of p, which is biased: the rival. Arguments as in `power_loss`.

    One draw of the model is enough here; ValueError where there is none.
    """
    _check_pair(model, target, degree)
    if _draws(model) < 1:
        raise ValueError("needs a draw of the model")
    frequency, drawn = model / model.sum(-1, keepdim=True).double(), target / target.sum(-1, keepdim=True).double()
    own, shared = frequency.pow(degree).sum(-1), (frequency.pow(degree - 1) * drawn).sum(-1)
    return (degree - 1) * own - degree * shared


def poisson_log_loss(model: Tensor, symbol: Tensor, lam: float) -> Tensor:
    """Unbiased estimate of -log p_y from Poisson-many draws: sum_{k = 1}^M (M)_k / (k lam^k), M the draws of other symbols.

    It estimates the series sum_k (1 - p_y)^k / k term by term; with the symbol drawn from q its expectation is the cross-entropy.
    Its variance is infinite wherever p_y < 1: the second moment holds k! ((1 - p_y) / lam)^k. See `inverse_binomial_log_loss`.

    Args:
        model: counts of the draws of p, whose number is Poisson with mean lam, shape (..., size), integers.
        symbol: y, shape (...), int64 in [0, size).
        lam: mean number of draws, above 0.

    Returns:
        Shape (...), float64, at least 0; 0 where only y was drawn.

    Raises:
        ValueError: counts that are not integers of at least 0, symbols that do not fit, or a lam that is not above 0.
    """
    _check_counts(model)
    _check_mean(lam)
    if symbol.shape != model.shape[:-1] or symbol.dtype != torch.int64:
        raise ValueError(f"symbols are int64 of shape {tuple(model.shape[:-1])}, got {symbol.dtype} {tuple(symbol.shape)}")
    if symbol.numel() and not (symbol.min() >= 0 and symbol.max() < model.shape[-1]):
        raise ValueError(f"symbols are in [0, {model.shape[-1]}), got {symbol.min().item()} to {symbol.max().item()}")
    others = model.sum(-1) - model.gather(-1, symbol.unsqueeze(-1)).squeeze(-1)
    k = torch.arange(int(others.max()) if others.numel() else 0, dtype=torch.float64, device=model.device)
    left = others.unsqueeze(-1) - k
    terms = (left.clamp(min=1) / lam).cumprod(-1) / (k + 1)
    return terms.where(left > 0, 0).sum(-1)


def inverse_binomial_log_loss(waiting: Tensor) -> Tensor:
    """Unbiased estimate of -log p_y with a finite variance, from draws until y comes, at draw K: sum_{k < K} 1 / k.

    Not the paper's: the rival to `poisson_log_loss` where draws can be made one by one.

    Args:
        waiting: K, integers of at least 1, any shape.

    Returns:
        The shape of `waiting`, float64.

    Raises:
        ValueError: not integers, or one below 1.
    """
    if waiting.is_floating_point() or (waiting < 1).any():
        raise ValueError("waiting times are integers of at least 1")
    return torch.digamma(waiting.double()) + EULER


def all_counts(n: int, size: int) -> Tensor:
    """Every outcome of n draws as counts, shape (C(n + size - 1, n), size), int64."""
    draws = list(combinations_with_replacement(range(size), n))
    return count(torch.tensor(draws, dtype=torch.int64).view(len(draws), n), size)


def count_probabilities(counts: Tensor, p: Tensor) -> Tensor:
    """Multinomial probability of every row of counts (outcomes, size) under every p (..., size): shape (..., outcomes)."""
    _check_counts(counts)
    if p.ndim < 1 or not p.is_floating_point() or p.shape[-1] != counts.shape[-1]:
        raise ValueError(f"p is floating point of shape (..., {counts.shape[-1]}), got {p.dtype} {tuple(p.shape)}")
    ways = torch.lgamma(counts.sum(-1).double() + 1) - torch.lgamma(counts.double() + 1).sum(-1)
    return ways.exp().to(p.dtype) * p.unsqueeze(-2).pow(counts).prod(-1)


def expected_loss(loss: Callable[[Tensor, Tensor], Tensor], p: Tensor, q: Tensor, n: int, m: int = 1) -> Tensor:
    """Exact expectation of a loss over n draws of p and m of q, by enumeration; differentiable in p and q.

    Args:
        loss: from counts of draws of p and q, (outcomes, 1, size) and (1, outcomes, size), to values that broadcast with both.
        p, q: distributions, shapes (..., size) that broadcast, floating point.
        n, m: numbers of draws.

    Returns:
        Shape (...).
    """
    model, target = all_counts(n, p.shape[-1]).to(p.device), all_counts(m, q.shape[-1]).to(q.device)
    values = loss(model.unsqueeze(1), target.unsqueeze(0)).to(p.dtype)
    return ((count_probabilities(model, p) @ values) * count_probabilities(target, q)).sum(-1)


def _falling(x: Tensor, k: int | Tensor) -> Tensor:
    """x (x - 1) ... (x - k + 1) as float64; k a number or one for every entry of the last axis."""
    k = torch.as_tensor(k, device=x.device)
    steps = torch.arange(int(k.max()) if k.numel() else 0, device=x.device)
    return torch.where(steps < k.unsqueeze(-1), x.unsqueeze(-1) - steps, 1).double().prod(-1)


def _draws(counts: Tensor) -> float:
    """The fewest draws of any row."""
    return counts.sum(-1).min().item() if counts.numel() else math.inf


def _powers(counts: Tensor, powers: Sequence[int] | Tensor) -> Tensor:
    _check_counts(counts)
    powers = torch.as_tensor(powers, device=counts.device)
    if powers.shape != counts.shape[-1:] or powers.is_floating_point() or (powers < 0).any():
        raise ValueError(f"powers are {counts.shape[-1]} integers of at least 0, got {powers.tolist()}")
    return powers


def _check_counts(counts: Tensor) -> None:
    if counts.ndim < 1 or counts.is_floating_point() or counts.dtype == torch.bool or (counts < 0).any():
        raise ValueError(f"counts are integers of at least 0 in shape (..., size), got {counts.dtype} {tuple(counts.shape)}")


def _check_pair(model: Tensor, target: Tensor, degree: int) -> None:
    _check_counts(model)
    _check_counts(target)
    if model.shape[-1] != target.shape[-1]:
        raise ValueError(f"both count the same symbols, got {model.shape[-1]} and {target.shape[-1]}")
    if degree < 2:
        raise ValueError(f"a strictly proper loss has a degree of at least 2, got {degree}")
    if _draws(target) < 1:
        raise ValueError("needs a draw of the target")


def _check_mean(lam: float) -> None:
    if not 0 < lam < math.inf:
        raise ValueError(f"lam is a number above 0, got {lam}")
