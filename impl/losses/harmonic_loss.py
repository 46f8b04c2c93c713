"""Harmonic loss (Baek, Liu, Tyagi, Tegmark, 2025, arXiv 2502.01628): classes as centres, probabilities from inverse distances.

In the paper's symbols, for a point x, class centres w_i and the harmonic exponent n:

    d_i = |w_i - x|_2                          harmonic logits, no bias
    p_i = d_i^-n / sum_j d_j^-n                HarMax
    loss = -log p_c = log(1 + sum_{j != c} (d_c / d_j)^n)

(x, w) -> (a x, a w) leaves p as it is, and x = w_c gives p_c = 1 at finite norms. The paper takes n near sqrt(dimension). The
authors' code raises squared distances, with 1e-4 added, to the power -n: its exponent is 2 n here, and the constant breaks the
invariance; `eps` is a softening that keeps it.

`harmonic_cross_entropy` and `HarmonicCrossEntropy` are for use: the fused operator, which never holds the distances of a batch to
a vocabulary. `harmonic_loss` is the same loss in plain differentiable operations, for second derivatives, for batches of models,
and for reading (not under vmap: its check of the targets looks at values).
"""

import math

import torch
from torch import Tensor, nn

from paperclaims.kernels.losses.harmonic_loss import harmonic_cross_entropy

__all__ = ["HarmonicCrossEntropy", "harmonic_cross_entropy", "harmonic_log_probabilities", "harmonic_loss", "squared_distances"]


class HarmonicCrossEntropy(nn.Module):
    """Class centres and harmonic loss in one, in the place of a linear head: weight (classes, dimensions).

    Args:
        dimensions, classes: sizes of the head.
        n: harmonic exponent, above 0; None: sqrt(dimensions).
        settings: further arguments of `harmonic_cross_entropy`.
    """

    def __init__(self, dimensions: int, classes: int, n: float | None = None, **settings):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, dimensions) / dimensions**0.5)
        self.n = dimensions**0.5 if n is None else n
        self.settings = settings

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        """Loss of points (..., dimensions) and targets (...)."""
        return harmonic_cross_entropy(x, self.weight, targets, self.n, **self.settings)

    def log_probabilities(self, x: Tensor) -> Tensor:
        """(..., classes), for prediction; holds the distances, but not the differences. Differentiable once."""
        return harmonic_log_probabilities(x, self.weight.to(x.dtype), self.n, eps=self.settings.get("eps", 0.0), pairwise=False)


def squared_distances(x: Tensor, w: Tensor, eps: float = 0.0, *, pairwise: bool = True) -> Tensor:
    """|w_j - x|^2 + eps (|w_j|^2 + |x|^2) from the differences themselves, shape (..., m, v), differentiable everywhere.

    Args:
        x: points, shape (..., m, d), floating point; 16 bits are computed in float32.
        w: centres, shape (..., v, d), same dtype; leading axes broadcast.
        eps: softening, at least 0.
        pairwise: hold the differences of all pairs, (..., m, v, d), so that second derivatives exist; False: `torch.cdist`.

    Raises:
        ValueError: shapes, dtypes or settings that do not fit.
    """
    if x.ndim < 2 or w.ndim < 2 or x.shape[-1] != w.shape[-1] or 0 in w.shape[-2:]:
        raise ValueError(f"x is (..., m, d) and w is (..., v, d), v and d at least 1, got {tuple(x.shape)} and {tuple(w.shape)}")
    if not x.is_floating_point() or x.dtype != w.dtype:
        raise ValueError(f"x and w have one floating-point dtype, got {x.dtype} and {w.dtype}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps is a number from 0 on, got {eps}")
    wide = torch.promote_types(x.dtype, torch.float32)
    x, w = x.to(wide), w.to(wide)
    if pairwise:
        squares = (x.unsqueeze(-2) - w.unsqueeze(-3)).square().sum(-1)
    else:
        squares = torch.cdist(x, w, compute_mode="donot_use_mm_for_euclid_dist").square()
    if eps:
        squares = squares + eps * (x.square().sum(-1).unsqueeze(-1) + w.square().sum(-1).unsqueeze(-2))
    return squares


def harmonic_log_probabilities(
    x: Tensor, w: Tensor, n: float | None = None, *, eps: float = 0.0, pairwise: bool = True
) -> Tensor:
    """log p_j of every point and class, shape (..., m, v); the classes of centres that a point lies on share it equally.

    Args:
        x, w, eps, pairwise: as in `squared_distances`.
        n: harmonic exponent, above 0; None: sqrt(d).

    Raises:
        ValueError: as `squared_distances`, or n not above 0.
    """
    return _scores(x, w, n, eps, pairwise).log_softmax(-1)


def harmonic_loss(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    n: float | None = None,
    *,
    eps: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Harmonic loss in plain operations; holds the distances, and the differences of all points and centres with them.

    Args:
        x: points, shape (..., m, d), floating point.
        w: class centres, shape (..., v, d), same dtype; leading axes broadcast.
        targets: classes in [0, v) or `ignore_index`, int64, shape (..., m).
        n: harmonic exponent, above 0; None: sqrt(d).
        eps: softening, at least 0.
        ignore_index: a target that is left out; its loss is 0.
        reduction: "mean" over the targets not ignored (NaN where there is none), "sum", or "none".

    Returns:
        Shape (..., m) for "none", else a scalar.

    Raises:
        ValueError: shapes, dtypes or settings that do not fit, or a target out of range.
    """
    scores = _scores(x, w, n, eps)
    if targets.shape != scores.shape[:-1] or targets.dtype != torch.int64:
        raise ValueError(f"targets are int64 of shape {tuple(scores.shape[:-1])}, got {targets.dtype} of {tuple(targets.shape)}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is 'mean', 'sum' or 'none', got {reduction!r}")
    kept = targets != ignore_index
    wrong = kept & ((targets < 0) | (targets >= scores.shape[-1]))
    if wrong.any():
        raise ValueError(f"targets are in [0, {scores.shape[-1]}) or {ignore_index}, got {targets[wrong][0].item()}")
    place = targets.where(kept, 0).unsqueeze(-1)
    own = scores.gather(-1, place).squeeze(-1)
    others = scores.scatter(-1, place, -torch.inf).logsumexp(-1)
    losses = torch.logaddexp(others - own, torch.zeros_like(own)).where(kept, 0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / kept.sum()


def _scores(x: Tensor, w: Tensor, n: float | None, eps: float, pairwise: bool = True) -> Tensor:
    """-n log d, (..., m, v)."""
    squares = squared_distances(x, w, eps, pairwise=pairwise)
    n = x.shape[-1] ** 0.5 if n is None else n
    if not 0 < n < math.inf:
        raise ValueError(f"n is None or a number above 0, got {n}")
    return squares.clamp(min=torch.finfo(squares.dtype).tiny).log() * (-n / 2)
