"""EnsLoss (Dai, 2024, arXiv 2409.00908): a new convex, calibrated loss of the margin for every batch, drawn by its derivative.

A loss phi of the margin z = y f(x) is convex if phi' does not fall, and a convex one is calibrated if phi'(0) < 0. Gradient
descent asks nothing but phi'(z_i) of it, so that random numbers g_1 <= ... <= g_n < 0, put in the order of the margins, are as
good as a loss drawn at random:

    g = max(-BC_lam^-1(e), -1) - 1e-6,   e ~ N(0, 1)        BC_lam^-1(e) = (1 + lam e)_+^(1 / lam), the exponential for lam = 0
    the i-th smallest g belongs to the i-th smallest margin, and is divided by that margin where it exceeds 1

as in the authors' code, whose scripts mostly keep lam = 0 and can draw it from U(-1, 1) anew every few epochs. (The division
makes the derivative fall like 1 / z at least. The loss is still unbounded below, as -log z is.)
"""

import torch
from torch import Tensor, nn

__all__ = ["EnsLoss", "calibrated_derivatives", "inverse_box_cox"]

LEAST = 1e-6


def inverse_box_cox(e: Tensor, lam: float | Tensor) -> Tensor:
    """(1 + lam e)_+^(1 / lam), exp(e) for lam = 0; rises in e, from 0 (lam > 0) or up to infinity (lam < 0).

    Args:
        e: any shape, floating point.
        lam: a number, or a tensor that broadcasts with e.

    Raises:
        ValueError: e not floating point, or a lam that is not finite.
    """
    lam = torch.as_tensor(lam, dtype=e.dtype if e.is_floating_point() else None, device=e.device)
    if not e.is_floating_point() or not lam.isfinite().all():
        raise ValueError(f"e is floating point and lam finite, got {e.dtype} and {lam}")
    some = torch.where(lam == 0, 1, lam)
    # log1p keeps digits where lam is small; its -inf at 0 becomes 0 or infinity.
    logarithm = torch.log1p((some * e).clamp(min=-1)) / some
    return torch.where(lam == 0, e, logarithm).exp()


def calibrated_derivatives(margins: Tensor, e: Tensor, lam: float | Tensor) -> Tensor:
    """Derivatives, in [-1 - 1e-6, 0), of a convex and calibrated loss at the margins of a batch; without a gradient.

    Equal margins get different ones, as at a kink of the loss.

    Args:
        margins: y f(x), shape (..., n), floating point; the batch is the last axis.
        e: normal random numbers, same shape and dtype.
        lam: a number, or of shape (..., 1).

    Raises:
        ValueError: margins not floating point (..., n), or e of another shape or dtype.
    """
    if not margins.is_floating_point() or margins.ndim < 1 or e.shape != margins.shape or e.dtype != margins.dtype:
        raise ValueError(
            f"margins and e share a floating-point dtype and a shape (..., n), got {margins.dtype} {tuple(margins.shape)} and "
            f"{e.dtype} {tuple(e.shape)}"
        )
    margins = margins.detach()
    drawn = (-inverse_box_cox(e, lam)).clamp(min=-1).sort(-1).values
    ranks = margins.argsort(-1).argsort(-1)
    return drawn.gather(-1, ranks) / margins.clamp(min=1) - LEAST


class EnsLoss(nn.Module):
    """A loss for binary classification that is another one in every batch; its value means nothing, its gradient does.

    Args:
        period: calls (batches) after which lam is drawn anew from U(-1, 1); until then it is 0, as in the authors' code.
        generator: of the random numbers, on the device of the scores; None: PyTorch's own.

    Raises:
        ValueError: a period below 1; in a call, scores and targets of different shapes, no floating-point scores, or targets
            other than 0 and 1.
    """

    def __init__(self, period: int = 10, generator: torch.Generator | None = None):
        super().__init__()
        if period < 1:
            raise ValueError(f"period is at least 1, got {period}")
        self.period, self.generator = period, generator
        self.lam, self.calls = 0.0, 0

    def forward(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Mean of g z over scores f(x) and targets 0 or 1, any shape; a scalar, NaN for the mean of nothing."""
        if scores.shape != targets.shape or not scores.is_floating_point():
            raise ValueError(
                f"scores are floating point and share the shape of the targets, got {scores.dtype} {tuple(scores.shape)} and "
                f"{tuple(targets.shape)}"
            )
        if not ((targets == 0) | (targets == 1)).all():
            raise ValueError("targets are 0 and 1")
        draw = {"generator": self.generator, "device": scores.device}
        if self.calls and self.calls % self.period == 0:
            self.lam = 2 * torch.rand((), **draw).item() - 1
        self.calls += 1
        margins = (scores * (2 * targets - 1)).flatten()
        e = torch.randn(margins.shape, dtype=margins.dtype, **draw)
        return (calibrated_derivatives(margins, e, self.lam) * margins).mean()
