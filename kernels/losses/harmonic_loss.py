"""Harmonic loss of a large vocabulary in one operator that never holds the distances.

Source: Baek, Liu, Tyagi, Tegmark, "Harmonic Loss Trains Interpretable AI Models", 2025, arXiv 2502.01628. With class centres w_j
the probability of class j for the point x is d_j^-n / sum_k d_k^-n, d_j = |w_j - x|; the loss is -log of the target's:

    loss = log(1 + sum_{j != c} (d_c / d_j)^n)

The sum over the other classes goes by tiles (`distances_torch`, `distances_triton`), the target's distance is computed from the
difference of the points. So a loss near 0 keeps its digits, where the logarithm of a probability near 1 has none.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from paperclaims.kernels.backend import choose_backend
from paperclaims.kernels.losses import distances_torch as torch_body
from paperclaims.kernels.losses.distances_torch import Options
from paperclaims.kernels.losses.tiles import check_targets, compute_dtype, kept, spread

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def harmonic_cross_entropy(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    n: float | None = None,
    *,
    eps: float = 0.0,
    refine: bool = True,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
    tile: tuple[int, int] | None = None,
) -> Tensor:
    """-log of d_c^-n / sum_j d_j^-n, d_j = |w_j - x|, c the target, without the matrix of distances.

    Args:
        x: points, shape (..., d), any strides.
        w: class centres, shape (v, d), same dtype as `x` (under autocast both are cast).
        targets: classes in [0, v) or `ignore_index`, integers, shape (...).
        n: harmonic exponent, above 0; None: the paper's sqrt(d). (The authors' code raises squared distances to it: there the
            exponent is 2 n.)
        eps: squared distances are |w - x|^2 + eps (|w|^2 + |x|^2): a softening that keeps the loss the same when all is scaled.
            0, the default, is the paper's form.
        refine: compute pairs that are near each other from their difference, also those that are not a point and its target.
            False saves a look at every tile; distances below about eps^(1/2) |x| of the dtype are then not resolved.
        ignore_index: a target that is left out; its loss is 0.
        reduction: "mean" over the targets not ignored (NaN where there is none), "sum", or "none".
        backend: "auto", "torch" (tiled PyTorch, any device) or "triton" (float64 excepted).
        tile: points and classes of a tile (for Triton powers of two, at least 16); None: chosen for the sizes at hand.

    Returns:
        The loss, scalar or shaped like `targets`; float32 for 16-bit inputs. 0 (below 1e-19^n) for a point on its centre, log k
        where k centres lie there, and a large number, not infinity, for a point on another class's centre: squared distances are
        at least the smallest normal number of float32 (of float64, for those). There the pair at distance 0 has gradient 0.

    Raises:
        ValueError: shapes, dtypes, devices or settings that do not fit, a target out of range.

    `backward`, `torch.autograd.grad` and `torch.compile` work; `torch.func.grad`, forward mode and second derivatives do not
    pass through a registered operator: `paperclaims.impl.losses.harmonic_loss` has the plain differentiable form.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w = x.to(dtype), w.to(dtype)
    _check(x, w, targets, eps, reduction, tile)
    n = x.shape[-1] ** 0.5 if n is None else n
    if not 0 < n < math.inf:
        raise ValueError(f"n is None or a number above 0, got {n}")
    backend = choose_backend(backend, x) if backend != "auto" or x.dtype != torch.float64 else "torch"
    rows, columns = tile or default_tile(x.element_size(), backend)
    points = x.reshape(targets.numel(), x.shape[-1])
    settings = backend, ignore_index, reduction, n, eps, refine, rows, columns
    loss = _operator(points, w, targets.reshape(-1), *settings)[0]
    return loss.view(targets.shape) if reduction == "none" else loss


def default_tile(itemsize: int, backend: str) -> tuple[int, int]:
    """Points and classes of a tile of distances; on a GPU it lies in registers."""
    if backend == "triton":
        return (128, 128) if itemsize < 4 else (64, 64)
    return 2048, 2048


def _check(x, w, targets, eps, reduction, tile) -> None:
    if x.ndim < 1 or w.ndim != 2 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"x is (..., d) and w is (v, d), got {tuple(x.shape)} and {tuple(w.shape)}")
    if targets.shape != x.shape[:-1]:
        raise ValueError(f"targets have the shape of x without its last axis, {tuple(x.shape[:-1])}, got {tuple(targets.shape)}")
    if x.dtype not in DTYPES or w.dtype != x.dtype:
        raise ValueError(f"x and w have one dtype of {DTYPES}, got {x.dtype} and {w.dtype}")
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets are int64 or int32, got {targets.dtype}")
    if not x.device == w.device == targets.device:
        raise ValueError("x, w and targets are on one device")
    if len(w) == 0 or w.shape[1] == 0:
        raise ValueError(f"w needs at least one class and one dimension, got {tuple(w.shape)}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps is a number from 0 on, got {eps}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is 'mean', 'sum' or 'none', got {reduction!r}")
    if tile is not None and (len(tile) != 2 or min(tile) < 1):
        raise ValueError(f"tile is a positive number of points and one of classes, got {tile}")


def losses_and_sums(x: Tensor, w: Tensor, targets: Tensor, options: Options, body=torch_body) -> tuple[Tensor, Tensor]:
    """Loss of every point and log sum_j d_j^-n over all classes, (n,) each, every target in range; undecorated."""
    own = torch_body.own_squares(x, w, targets, options).log_().mul_(-options.power / 2)
    others = body.log_sums(x, w, targets, options)
    loss = torch.logaddexp(others - own, torch.zeros_like(own))
    return loss, own.add_(loss)


def gradients(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    loss: Tensor,
    lse: Tensor,
    weights: Tensor,
    needs: Sequence[bool],
    options: Options,
    body=torch_body,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients by x and w of sum_i weights_i loss_i, from the losses and sums of the forward pass; undecorated."""
    return body.gradients(x, w, targets, lse, weights, -torch.expm1(-loss) * weights, needs, options)


_SETTINGS = "str backend, int ignore_index, str reduction, float n, float eps, bool refine, SymInt tile_rows, SymInt tile_columns"


@torch.library.custom_op(
    "paperclaims::harmonic_loss",
    mutates_args=(),
    schema=f"(Tensor x, Tensor w, Tensor targets, {_SETTINGS}) -> (Tensor loss, Tensor losses, Tensor lse)",
)
def _operator(x, w, targets, backend, ignore_index, reduction, *options):
    """Reduced loss, and loss and log-sum-exp of every point, (n,), zero where ignored."""
    valid = targets != ignore_index
    check_targets(targets, valid, len(w))
    index = kept(valid)
    losses, lse = losses_and_sums(x[index], w, targets[index].long(), Options(*options), _body(backend))
    losses, lse = spread(losses, index, len(x)), spread(lse, index, len(x))
    if reduction == "none":
        return losses.clone(), losses, lse
    return losses.sum() if reduction == "sum" else losses.sum() / valid.sum(), losses, lse


@_operator.register_fake
def _(x, w, targets, backend, ignore_index, reduction, *options):
    losses = x.new_empty(targets.shape, dtype=compute_dtype(x.dtype))
    return (torch.empty_like(losses) if reduction == "none" else losses.new_empty(())), losses, torch.empty_like(losses)


@torch.library.custom_op(
    "paperclaims::harmonic_loss_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor x, Tensor w, Tensor targets, Tensor losses, Tensor lse, bool need_x, bool need_w, {_SETTINGS})"
    " -> (Tensor grad_x, Tensor grad_w)",
)
def _backward_operator(grad, x, w, targets, losses, lse, need_x, need_w, backend, ignore_index, reduction, *options):
    valid = targets != ignore_index
    if reduction == "mean":
        grad = grad / valid.sum().clamp(min=1)
    index = kept(valid)
    weights = grad.expand(len(x))[index].to(losses.dtype)
    arguments = x[index], w, targets[index].long(), losses[index], lse[index], weights
    by_x, by_w = gradients(*arguments, (need_x, need_w), Options(*options), _body(backend))
    return tuple(x.new_empty(0) if one is None else one for one in (spread(by_x, index, len(x)), by_w))


@_backward_operator.register_fake
def _(grad, x, w, targets, losses, lse, need_x, need_w, *settings):
    return tuple(one.new_empty(one.shape if need else 0) for one, need in ((x, need_x), (w, need_w)))


def _setup_context(ctx, inputs, output):
    x, w, targets, *ctx.settings = inputs
    ctx.save_for_backward(x, w, targets, *output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, *_):
    nothing = (None,) * (len(ctx.settings) + 1)
    if grad is None:
        return None, None, *nothing
    needs = ctx.needs_input_grad[:2]
    formed = _backward_operator(grad, *ctx.saved_tensors, *needs, *ctx.settings)
    return *(one if need else None for one, need in zip(formed, needs, strict=True)), *nothing


_operator.register_autograd(_differentiate, setup_context=_setup_context)


@register_flop_formula(torch.ops.paperclaims.harmonic_loss)
def _flops(x, w, *_, **__) -> int:
    return 2 * x[0] * w[0] * w[1]


@register_flop_formula(torch.ops.paperclaims.harmonic_loss_backward)
def _flops_backward(grad, x, w, targets, losses, lse, need_x, need_w, *_, **__) -> int:
    return 2 * x[0] * w[0] * w[1] * (1 + need_x + need_w)


def _body(backend: str):
    if backend == "torch":
        return torch_body
    from paperclaims.kernels.losses import distances_triton

    return distances_triton
