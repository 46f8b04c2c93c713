"""The Z-loss and its spherical family (de Brébisson, Vincent, 2016, arXiv 1604.08859): losses whose exact training step is cheap.

A loss of outputs o = W h over D classes is spherical when it depends on them through the target's output o_c, their sum and
their sum of squares alone. With Q = W^T W and w = W^T 1 these are W_c . h, w . h and h^T Q h, and the gradient by the outputs is
alpha 1 + beta o + gamma e_c. Keeping W as V U + 1 u^T, an exact step of gradient descent then costs O(d^2) an example, whatever
D is: the first two terms go into U and u, the last one changes one row of V (Vincent, de Brébisson, Bouthillier, 2015,
arXiv 1412.7091, here for a batch of examples and any spherical loss).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Spherical",
    "SphericalOutput",
    "log_taylor_softmax_from",
    "output_step",
    "spherical_loss",
    "squared_error_from",
    "z_loss",
    "z_loss_from",
    "z_scores",
]

# From the target's output, the sum and the sum of squares of all outputs, (...) each, and their number, to losses (...).
Spherical = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def z_scores(logits: Tensor) -> Tensor:
    """(o - mean) / standard deviation over the last axis, the deviation biased: shape (..., D), NaN where all are equal.

    Raises:
        ValueError: not floating point, or fewer than two classes.
    """
    if logits.ndim < 1 or logits.shape[-1] < 2 or not logits.is_floating_point():
        raise ValueError(f"logits are floating point of shape (..., D), D at least 2, got {logits.dtype} {tuple(logits.shape)}")
    centred = logits - logits.mean(-1, keepdim=True)
    return centred / centred.square().mean(-1, keepdim=True).sqrt()


def z_loss(
    logits: Tensor, targets: Tensor, a: float = 1.0, b: float = 10.0, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """Z-loss: softplus(a (b - z_c)) / a, z_c the target's z-score. Shifting or scaling all outputs leaves it as it is.

    Args:
        logits: outputs, shape (..., D), floating point; 16-bit outputs are summed in float32.
        targets: classes in [0, D) or `ignore_index`, shape (...), int64.
        a: how sharply the loss bends, above 0.
        b: the z-score beyond which an example counts as learned; z-scores are below sqrt(D - 1).
        ignore_index: a target that is left out; its loss is 0.
        reduction: "mean" over the targets not ignored (NaN where there is none), "sum", or "none".

    Returns:
        Shape (...) for "none", else a scalar. NaN for equal outputs, which have no z-score.

    Raises:
        ValueError: shapes, dtypes or settings that do not fit, or a target out of range.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is 'mean', 'sum' or 'none', got {reduction!r}")
    _check_sharpness(a, b)
    kept = _check_targets(logits, targets, ignore_index)
    wide = torch.promote_types(logits.dtype, torch.float32)
    z = z_scores(logits.to(wide)).gather(-1, targets.where(kept, 0).unsqueeze(-1)).squeeze(-1)
    losses = (F.softplus(a * (b - z)) / a).where(kept, 0).to(logits.dtype)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / kept.sum()


def z_loss_from(own: Tensor, total: Tensor, squares: Tensor, classes: int, a: float = 1.0, b: float = 10.0) -> Tensor:
    """Z-loss from the target's output, the sum and the sum of squares of all: shape (...) each, and of the result."""
    _check_sharpness(a, b)
    mean = total / classes
    z = (own - mean) / (squares / classes - mean.square()).sqrt()
    return F.softplus(a * (b - z)) / a


def squared_error_from(own: Tensor, total: Tensor, squares: Tensor, classes: int) -> Tensor:
    """|o - e_c|^2 / 2 from the target's output and the sum of squares: the oldest spherical loss."""
    return (squares - 2 * own + 1) / 2


def log_taylor_softmax_from(own: Tensor, total: Tensor, squares: Tensor, classes: int) -> Tensor:
    """-log of the Taylor softmax, (1 + o_c + o_c^2 / 2) / sum_j (1 + o_j + o_j^2 / 2); every term is at least 1/2."""
    return (classes + total + squares / 2).log() - (1 + own + own.square() / 2).log()


def spherical_loss(logits: Tensor, targets: Tensor, loss: Spherical) -> Tensor:
    """A spherical loss of dense outputs: shape (...), from logits (..., D) and targets (...) in [0, D).

    Raises:
        ValueError: shapes or dtypes that do not fit, or a target out of range.
    """
    _check_targets(logits, targets, None)
    own = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return loss(own, logits.sum(-1), logits.square().sum(-1), logits.shape[-1])


@dataclass
class SphericalOutput:
    """Output weights W = v u + 1 shift^T (D, d), with u's inverse, Q = W^T W and w = W^T 1, as `step` keeps them.

    Make one with `SphericalOutput.of(weight)`. `refresh` takes away the rounding that many steps leave behind.
    """

    v: Tensor
    u: Tensor
    u_inverse: Tensor
    shift: Tensor
    gram: Tensor
    total: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> "SphericalOutput":
        """From dense weights (D, d), floating point, which are copied. ValueError for another shape or dtype."""
        if weight.ndim != 2 or 0 in weight.shape or not weight.is_floating_point():
            raise ValueError(f"weight is floating point of shape (D, d), got {weight.dtype} of {tuple(weight.shape)}")
        v = weight.detach().clone()
        eye = torch.eye(v.shape[1], dtype=v.dtype, device=v.device)
        return cls(v, eye, eye.clone(), torch.zeros_like(v[0]), v.mT @ v, v.sum(0))

    @property
    def weight(self) -> Tensor:
        """W, dense: shape (D, d)."""
        return self.v @ self.u + self.shift

    def scores(self, hidden: Tensor) -> Tensor:
        """Outputs of all classes, shape (..., D), at the dense cost: for prediction."""
        return (hidden @ self.u.mT) @ self.v.mT + (hidden @ self.shift).unsqueeze(-1)

    def refresh(self) -> None:
        """Computes every part anew from W, in O(D d^2)."""
        vars(self).update(vars(type(self).of(self.weight)))

    def step(self, hidden: Tensor, targets: Tensor, loss: Spherical, lr: float) -> tuple[Tensor, Tensor]:
        """One exact step of gradient descent on the mean loss of a batch, in O(m d^2 + m^2 d + m^3), without the outputs.

        Args:
            hidden: h, shape (m, d), of the weights' dtype.
            targets: classes in [0, D), shape (m,), int64.
            loss: `z_loss_from`, with `functools.partial` for its a and b, or any other spherical loss.
            lr: learning rate, at least 0.

        Returns:
            The losses (m,) and the gradient (m, d) of their mean by `hidden`, both before the step.

        Raises:
            ValueError: shapes, dtypes or settings that do not fit, or a target out of range.
            torch.linalg.LinAlgError: a step so large that it makes U singular.
        """
        if hidden.ndim != 2 or hidden.shape[1] != self.v.shape[1] or hidden.dtype != self.v.dtype:
            raise ValueError(
                f"hidden is {self.v.dtype} of shape (m, {self.v.shape[1]}), got {hidden.dtype} of {tuple(hidden.shape)}"
            )
        if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
            raise ValueError(f"targets are int64 of shape ({len(hidden)},), got {targets.dtype} of {tuple(targets.shape)}")
        if not 0 <= lr < math.inf:
            raise ValueError(f"lr is a number from 0 on, got {lr}")
        if len(targets) and not (targets.min() >= 0 and targets.max() < len(self.v)):
            raise ValueError(f"targets are in [0, {len(self.v)}), got {targets.min().item()} to {targets.max().item()}")
        return output_step(self, hidden.detach(), targets, loss, lr)


def output_step(state: SphericalOutput, h: Tensor, targets: Tensor, loss: Spherical, lr: float) -> tuple[Tensor, Tensor]:
    """`SphericalOutput.step` without its checks, and so without a look at the values: it runs on fake tensors too.

    The step is W <- W A - lr G H^T with A = 1 - lr H B H^T, H the columns h_i, B the diagonal of the beta_i and
    G = 1 alpha^T + (columns gamma_i e_{c_i}); U takes A, u takes the ones, and rows of V the rest.
    """
    classes, m = len(state.v), len(h)
    qh, rows = h @ state.gram, state.v[targets] @ state.u + state.shift
    own, total, squares = (rows * h).sum(-1), h @ state.total, (qh * h).sum(-1)
    with torch.enable_grad():
        parts = [part.requires_grad_() for part in (own, total, squares)]
        losses = loss(*parts, classes)
        slopes = torch.autograd.grad(losses.sum() / m, parts, allow_unused=True, materialize_grads=True)
    gamma, alpha, beta = slopes[0], slopes[1], 2 * slopes[2]
    grad = alpha[:, None] * state.total + beta[:, None] * qh + gamma[:, None] * rows

    bh = lr * beta[:, None] * h
    kernel = torch.eye(m, dtype=h.dtype, device=h.device) - bh @ h.mT  # (1 - lr B H^T H) of the inverse of A
    through = torch.linalg.solve(kernel, bh)
    uh, h_u = h @ state.u.mT, h @ state.u_inverse
    state.u -= uh.mT @ bh
    state.u_inverse += through.mT @ h_u
    state.shift -= bh.mT @ (h @ state.shift) + lr * (alpha @ h)
    pulled = h_u + (h @ through.mT) @ h_u  # H^T times the new inverse of U
    state.v.index_add_(0, targets, -lr * gamma[:, None] * pulled)

    # Q <- A Q A + A K H^T + H K^T A + H S H^T, with K = -lr (w alpha^T + columns gamma_i W_{c_i}) and S = lr^2 G^T G
    k = -lr * (alpha[:, None] * state.total + gamma[:, None] * rows)
    k -= (k @ h.mT) @ bh
    cross = alpha[:, None] * gamma
    same = (targets[:, None] == targets) * gamma[:, None] * gamma
    s = lr**2 * (classes * alpha[:, None] * alpha + cross + cross.mT + same)
    qah = lr * beta[:, None] * qh
    left = k - qah + (s @ h + lr * beta[:, None] * ((h @ qh.mT) @ bh)) / 2
    half = left.mT @ h
    state.gram += half + half.mT
    state.total -= bh.mT @ (h @ state.total) + lr * ((classes * alpha + gamma) @ h)
    return losses.detach(), grad


def _check_sharpness(a: float, b: float) -> None:
    if not (0 < a < math.inf and math.isfinite(b)):
        raise ValueError(f"a is a number above 0 and b a number, got {a} and {b}")


def _check_targets(logits: Tensor, targets: Tensor, ignore_index: int | None) -> Tensor:
    """Which targets are not ignored, after shapes, dtypes and values were found to fit."""
    if logits.ndim < 1 or logits.shape[-1] < 2 or not logits.is_floating_point():
        raise ValueError(f"logits are floating point of shape (..., D), D at least 2, got {logits.dtype} {tuple(logits.shape)}")
    if targets.shape != logits.shape[:-1] or targets.dtype != torch.int64:
        raise ValueError(f"targets are int64 of shape {tuple(logits.shape[:-1])}, got {targets.dtype} of {tuple(targets.shape)}")
    kept = torch.ones_like(targets, dtype=torch.bool) if ignore_index is None else targets != ignore_index
    wrong = kept & ((targets < 0) | (targets >= logits.shape[-1]))
    if wrong.any():
        raise ValueError(f"targets are in [0, {logits.shape[-1]}), got {targets[wrong][0].item()}")
    return kept
