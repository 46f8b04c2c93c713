"""Multi-sample dropout (Inoue, 2019, arXiv 1905.09788): several dropout masks on the same features in one step.

    h = backbone(x) once;   z_m = head(mask_m * h / (1 - p)),  m = 1 ... M;   loss = mean over m of loss(z_m, y)

The masks are independent, the head's weights shared; without training there is one pass without a mask. The gradient has the mean
of ordinary dropout's, and of its variance the part that comes from the masks falls as 1 / M. It is the gradient of a batch that
holds every sample M times, at the price of the head alone.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["MultiSampleDropout", "dropout_samples", "mean_loss", "multi_sample_cross_entropy"]


def dropout_samples(h: Tensor, p: float, samples: int, *, generator: torch.Generator | None = None) -> Tensor:
    """M masked copies of the features, each kept value over 1 - p: (..., d) to (M, ..., d).

    Raises:
        ValueError: p outside [0, 1), no samples, or features that are not floating point.
    """
    _check(p, samples)
    if not h.is_floating_point():
        raise ValueError(f"features are floating point, got {h.dtype}")
    kept = torch.rand(samples, *h.shape, device=h.device, generator=generator) >= p
    return torch.where(kept, h / (1 - p), 0)


class MultiSampleDropout(nn.Module):
    """A head behind M dropout masks.

    Args:
        head: from features (..., d) to outputs (..., out); applied once, to all masked copies as one batch.
        p: share of features that a mask drops, in [0, 1).
        samples: M.

    Raises:
        ValueError: p outside [0, 1), or no samples.
    """

    def __init__(self, head: nn.Module, p: float = 0.5, samples: int = 8):
        super().__init__()
        _check(p, samples)
        self.head, self.p, self.samples = head, p, samples

    def forward(self, h: Tensor) -> Tensor:
        """Outputs (M, ..., out) for features (..., d); (1, ..., out) in evaluation, without a mask."""
        if not self.training:
            return self.head(h).unsqueeze(0)
        return self.head(dropout_samples(h, self.p, self.samples))

    def extra_repr(self) -> str:
        return f"p={self.p}, samples={self.samples}"


def mean_loss(loss: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over the masks of `loss(output, targets)`, for the outputs (M, ...) of `MultiSampleDropout`.

    Raises:
        ValueError: no outputs.
    """
    if outputs.ndim < 1 or not len(outputs):
        raise ValueError(f"outputs are (M, ...) with M at least 1, got {tuple(outputs.shape)}")
    return torch.stack([loss(output, targets) for output in outputs]).mean()


def multi_sample_cross_entropy(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    p: float = 0.5,
    samples: int = 8,
    ignore_index: int = -100,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean cross-entropy of a linear head under M masks, one mask at a time: memory does not grow with M.

    Gradients are formed together with the loss, so that neither masks nor logits are kept; there is no second derivative.

    Args:
        h: features, shape (n, d), floating point.
        weight, bias: of the head, shapes (classes, d) and (classes,), dtype of h.
        targets: shape (n,), int64, each in 0..classes-1 or ignore_index.
        p, samples: as in `MultiSampleDropout`.
        generator: of the masks, on the device of h.

    Returns:
        A scalar in the dtype of h, a mean over masks and targets that count; NaN without one.

    Raises:
        ValueError: as in `MultiSampleDropout`, or shapes, dtypes or targets other than these.
    """
    _check(p, samples)
    classes, d = weight.shape if weight.ndim == 2 else (0, 0)
    alike = len({part.dtype for part in (h, weight, bias) if part is not None}) == 1 and h.is_floating_point()
    if not alike or h.ndim != 2 or h.shape[1] != d or (bias is not None and bias.shape != (classes,)):
        raise ValueError(
            f"h (n, d), weight (classes, d) and bias (classes,) share a floating-point dtype, got {h.dtype} {tuple(h.shape)}, "
            f"{weight.dtype} {tuple(weight.shape)} and {None if bias is None else (bias.dtype, tuple(bias.shape))}"
        )
    if targets.shape != h.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets are int64 of shape ({len(h)},), got {targets.dtype} {tuple(targets.shape)}")
    if (((targets < 0) | (targets >= classes)) & (targets != ignore_index)).any():
        raise ValueError(f"targets are in 0..{classes - 1} or {ignore_index}")
    return _OneMaskAtATime.apply(h, weight, bias, targets, p, samples, ignore_index, generator)


class _OneMaskAtATime(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, bias, targets, p, samples, ignore_index, generator):
        wanted, inputs = ctx.needs_input_grad[:3], (h, weight, bias)
        wide = torch.promote_types(h.dtype, torch.float32)
        sums = [torch.zeros_like(part, dtype=wide) if want else None for part, want in zip(inputs, wanted, strict=True)]
        total = torch.zeros((), dtype=wide, device=h.device)
        counts = (targets != ignore_index).unsqueeze(-1)
        scale, rows = 1 / (samples * counts.sum()).to(wide), torch.where(counts, targets.unsqueeze(-1), 0)
        for _ in range(samples):
            kept = torch.rand(h.shape, device=h.device, generator=generator) >= p
            masked = torch.where(kept, h / (1 - p), 0)
            logits = F.linear(masked, weight, bias)
            total += F.cross_entropy(logits.to(wide), targets, ignore_index=ignore_index, reduction="sum")
            if not any(wanted):
                continue
            slope = logits.softmax(-1, dtype=wide)
            slope = (slope.scatter_add_(-1, rows, -torch.ones_like(slope[:, :1])) * counts).to(h.dtype)
            if wanted[0]:
                sums[0] += torch.where(kept, slope @ weight / (1 - p), 0)
            if wanted[1]:
                sums[1] += slope.T @ masked
            if wanted[2]:
                sums[2] += slope.sum(0)
        sums = [None if part is None else (scale * part).to(h.dtype) for part in sums]
        ctx.save_for_backward(*sums)
        return (total * scale).to(h.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, slope):
        return *(None if part is None else part * slope for part in ctx.saved_tensors), None, None, None, None, None


def _check(p: float, samples: int) -> None:
    if not 0 <= p < 1:
        raise ValueError(f"p is in [0, 1), got {p}")
    if samples < 1:
        raise ValueError(f"samples is at least 1, got {samples}")
