"""Dice loss for polyphonic sound event detection, and the scores that such detection is judged by.

Source: Watcharasupat, Nguyen, Nguyen, Lee, Jones, Gan, "Improving Polyphonic Sound Event Detection on Multichannel Recordings
with the Sørensen-Dice Coefficient Loss and Transfer Learning", 2021, arXiv 2107.10471, for the use; the loss in its usual form
(Milletari, Navab, Ahmadi, 2016, arXiv 1606.04797, with squares; most code without). With probabilities p = sigmoid(z) and
activities y of frames and classes:

    loss = 1 - (2 sum p y + s) / (sum p^k + sum y^k + s)                        k = 1, or 2 with squares; s smooths

A silent cell (y = 0) that the network holds for silent (p near 0) adds next to nothing to either sum, however many there are.
Scores are those of the DCASE challenges (Mesaros, Heittola, Virtanen, 2016, Applied Sciences 6, 162).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["dice_loss", "error_rate", "f1_score", "segments"]


def dice_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    dim: int | tuple[int, ...] | None = None,
    smooth: float = 1.0,
    squared: bool = False,
) -> Tensor:
    """Dice loss of the sigmoids. With `smooth` 0 and certain logits it is 1 - F1.

    Args:
        logits: any shape, floating point; usually (..., frames, classes).
        targets: activities, 0 or 1 (or between), of the shape of `logits`, any real dtype.
        dim: the axes that the sums run over, such as -2 for a loss for each class; None: all, one loss for the batch.
        smooth: s, at least 0. Above 0 it keeps a gradient where nothing is active.
        squared: squares in the denominator.

    Returns:
        The shape of `logits` without those axes, in their dtype; 0 where nothing is active and nothing expected.

    Raises:
        ValueError: logits that are not floating point, two shapes, targets outside [0, 1], a negative `smooth`.
    """
    if not logits.is_floating_point() or logits.shape != targets.shape:
        raise ValueError(
            f"logits are floating point and targets share their shape, got {logits.dtype} {tuple(logits.shape)} "
            f"and {tuple(targets.shape)}"
        )
    if targets.is_complex() or not ((targets >= 0) & (targets <= 1)).all():
        raise ValueError("targets are in [0, 1]")
    if not 0 <= smooth < math.inf:
        raise ValueError(f"smooth is a number from 0 on, got {smooth}")
    wide = torch.promote_types(logits.dtype, torch.float32)  # sums over a batch leave the range of half precision
    p, y = logits.to(wide).sigmoid(), targets.to(wide)
    sizes = p.square() + y.square() if squared else p + y
    total = sizes.sum(dim) + smooth
    overlap = 2 * (p * y).sum(dim) + smooth
    some = total > 0
    return (1 - overlap / torch.where(some, total, 1)).where(some, 0).to(logits.dtype)


def segments(active: Tensor, length: int) -> Tensor:
    """Which classes are active at any time in each stretch of `length` frames.

    Args:
        active: bool, (..., frames, classes).
        length: frames of a segment; the last segment may be shorter.

    Returns:
        bool, (..., ceil(frames / length), classes).

    Raises:
        ValueError: another dtype or fewer than two axes, a length below 1.
    """
    if active.dtype != torch.bool or active.ndim < 2:
        raise ValueError(f"activities are bool of shape (..., frames, classes), got {active.dtype} of {tuple(active.shape)}")
    if length < 1:
        raise ValueError(f"a segment has at least one frame, got {length}")
    count = -(-active.shape[-2] // length)
    padded = F.pad(active, (0, 0, 0, count * length - active.shape[-2]))
    return padded.unflatten(-2, (count, length)).any(-2)


def f1_score(found: Tensor, true: Tensor, length: int = 1) -> Tensor:
    """F1 over all segments and classes, 2 TP / (2 TP + FP + FN): 1 where nothing is active and nothing was found.

    Args:
        found, true: bool, (..., frames, classes), one shape.
        length: frames of a segment.

    Returns:
        float64, (...).

    Raises:
        ValueError: as in `segments`, or two shapes.
    """
    hits, missed, invented = _counts(found, true, length)
    total = (2 * hits + missed + invented).sum(-1)
    return torch.where(total > 0, 2 * hits.sum(-1) / total.clamp(min=1), 1)


def error_rate(found: Tensor, true: Tensor, length: int = 1) -> Tensor:
    """Substitutions, deletions and insertions of all segments over the active cells in `true`; may exceed 1.

    In a segment S = min(FN, FP), D = max(0, FN - FP) and I = max(0, FP - FN), which add up to max(FN, FP). Arguments and errors
    as in `f1_score`; NaN or inf where nothing is active.
    """
    hits, missed, invented = _counts(found, true, length)
    return torch.maximum(missed, invented).sum(-1) / (hits + missed).sum(-1)


def _counts(found: Tensor, true: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """TP, FN and FP of every segment, float64 of shape (..., segments)."""
    if found.shape != true.shape:
        raise ValueError(f"found and true activities share a shape, got {tuple(found.shape)} and {tuple(true.shape)}")
    found, true = segments(found, length), segments(true, length)
    return tuple(cells.sum(-1, dtype=torch.float64) for cells in (found & true, true & ~found, found & ~true))
