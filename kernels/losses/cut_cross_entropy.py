"""Linear layer and cross-entropy in one operator that never holds the logits.

Source: Wijmans, Huval, Hertzberg, Koltun, Krähenbühl, "Cut Your Losses in Large-Vocabulary Language Models", 2024,
arXiv 2411.09009 (sections 4.1-4.3: indexed product and log-sum-exp by blocks, their gradients recomputed by blocks, gradient
filtering and vocabulary sorting). The loss of token i with embedding E_i, classifier rows C_v and target x_i is
logsumexp_v(C_v . E_i) - C_{x_i} . E_i; its gradient by the logits is softmax minus the target's distribution.
"""

import math
from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from paperclaims.kernels.backend import choose_backend
from paperclaims.kernels.losses import cut_cross_entropy_torch as torch_body
from paperclaims.kernels.losses.cut_cross_entropy_torch import Gradients, Options
from paperclaims.kernels.losses.tiles import check_targets, kept, scale_, spread

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    poly: float | Sequence[float] = (),
    reduction: str = "mean",
    shift: int = 0,
    filter_eps: float | str | None = None,
    filter_e: bool = True,
    filter_c: bool = True,
    sort_vocabulary: bool = False,
    accumulate: str = "fp32",
    gradients: str = "auto",
    backend: str = "auto",
    tile: tuple[int, int] | None = None,
) -> Tensor:
    """`F.cross_entropy(softcap * tanh((e @ c.T + bias) / softcap), targets)` without the matrix of logits.

    Args:
        e: embeddings, shape (..., d), any strides.
        c: classifier, shape (v, d), same dtype as `e` (under autocast both are cast).
        targets: words in [0, v) or `ignore_index`, integers, shape (...).
        bias: shape (v,), same dtype.
        softcap: bound of the logits; None: unbounded.
        label_smoothing: share of the target's weight that is spread over all words, in [0, 1].
        z_loss: weight of the squared log-sum-exp that is added to every token's loss, at least 0 (PaLM's auxiliary z-loss).
        poly: eps_1 to eps_N, or eps_1 alone, of sum_j eps_j (1 - p_t)^j that is added, p_t the target's probability (PolyLoss;
            with a smoothing, 1 - p_t is the smoothed one).
        reduction: "mean" over the tokens not ignored (NaN where there is none), "sum", or "none".
        shift: the embedding at a position predicts the target `shift` positions later, along the last axis of `targets`.
        filter_eps: leave a tile of logits out of the gradients where the gradient by these (capped) logits stays below this for
            all of its tokens and words: |softmax - target distribution| without `z_loss` and `poly`, the paper's gradient
            filtering. None, the default, is exact, and its time does not depend on the values; "auto" is 1/32 of the dtype's
            epsilon, 2^-12 for bfloat16 as in the paper. The bias's gradient is never filtered.
        filter_e, filter_c: whether the filter holds for the gradient by `e`, by `c`.
        sort_vocabulary: tiles of the backward pass take the words by average logit, so that a filter skips more of them.
        accumulate: the running sum of a gradient is kept in "fp32", "compensated" (Kahan, two numbers of the input's dtype)
            or in the "input" dtype. No difference between the first and the last for float32 and float64.
        gradients: "backward" computes every tile of logits again in the backward pass, the least memory; "forward" forms the
            gradients while the logits of a few tokens are at hand, a quarter less arithmetic, but it pays for gradients in a
            forward pass whose backward never comes, and it is not for reduction="none". "auto": "forward" where it
            measured faster at about equal memory, the PyTorch body in float32 and float64 with unsorted vocabulary.
        backend: "auto", "torch" (tiled PyTorch, any device) or "triton" (float64 excepted).
        tile: tokens and words of a tile, also the block of the filter (for Triton powers of two, at least 16); None: chosen
            for the memory of the sizes at hand.

    Returns:
        The loss, scalar or shaped like `targets` (its last axis shorter by `shift`); float32 for 16-bit inputs.

    Raises:
        ValueError: shapes, dtypes, devices or settings that do not fit, a target out of range.

    `backward`, `torch.autograd.grad` and `torch.compile` work; `torch.func.grad`, forward mode and second derivatives do not
    pass through a registered operator: `paperclaims.impl.losses.cut_cross_entropy` has the plain differentiable form.
    """
    if torch.is_autocast_enabled(e.device.type) and e.dtype != torch.float64:  # as autocast treats any product
        dtype = torch.get_autocast_dtype(e.device.type)
        e, c, bias = e.to(dtype), c.to(dtype), None if bias is None else bias.to(dtype)
    poly = _coefficients(poly)
    _check(e, c, targets, bias, softcap, label_smoothing, z_loss, reduction, shift, accumulate, gradients, tile)
    backend = choose_backend(backend, e) if backend != "auto" or e.dtype != torch.float64 else "torch"
    form = _form_in_forward(e, gradients, backend, reduction, sort_vocabulary)
    eps = torch.finfo(e.dtype).eps / 32 if filter_eps == "auto" else filter_eps or 0.0
    if isinstance(eps, str) or not eps >= 0:
        raise ValueError(f"filter_eps is None, 'auto' or a number >= 0, got {filter_eps!r}")
    if shift:  # the last positions predict nothing
        targets = torch.cat([targets[..., shift:], torch.full_like(targets[..., :shift], ignore_index)], -1)
    n, (v, d) = targets.numel(), c.shape
    needs = [form and torch.is_grad_enabled() and x is not None and x.requires_grad for x in (e, c, bias)]
    tokens, words = tile or default_tile(n, v, d, e.element_size(), any(needs), eps > 0, backend)
    settings = (
        softcap or 0.0,
        label_smoothing,
        float(z_loss),
        poly,
        ignore_index,
        reduction,
        eps,
        filter_e,
        filter_c,
        sort_vocabulary,
        accumulate,
    )
    loss = _operator(e.reshape(n, d), c, targets.reshape(n), bias, *needs, backend, *settings, tokens, words)[0]
    if reduction != "none":
        return loss
    loss = loss.view(targets.shape)
    return loss[..., : targets.shape[-1] - shift] if shift else loss


def default_tile(n: int, v: int, d: int, itemsize: int, form: bool, filtered: bool, backend: str) -> tuple[int, int]:
    """Tokens and words of a tile of logits, for n tokens, v words and d dimensions of `itemsize` bytes.

    On a GPU a tile lies in registers. Where the PyTorch body forms gradients in the forward pass, the logits kept, tokens x v,
    take at most 3/8 of the gradients' own bytes, or 4 MiB. A filter wants small blocks.
    """
    if backend == "triton":
        return (128, 128) if itemsize < 4 else (64, 64)
    if form:
        room = max(0.375 * (n + v) * d * itemsize, 2**22)
        tokens = min(max(int(room / (v * max(itemsize, 4))) // 16 * 16, 16), 512)
        return (min(tokens, 128), 256) if filtered else (tokens, 4096)
    return (128, 256) if filtered else (2048, 1024)


class Cost(NamedTuple):
    """Least work of one call: floating-point operations of the products, bytes to and from memory."""

    flops: int
    bytes: int


def cost(n: int, v: int, d: int, itemsize: int, gradients: bool = True, recompute: bool = True) -> Cost:
    """Operations and bytes that n tokens, v words and d dimensions cannot do without, inputs and outputs moved once a pass.

    One product for the logits, one more where the backward pass computes them again, two for the gradients.
    """
    inputs, index = (n + v) * d * itemsize, 8 * n
    if not gradients:
        return Cost(2 * n * v * d, inputs + index + 8 * n)
    passes = 2 if recompute else 1
    return Cost(2 * n * v * d * (2 + passes), (passes + 1) * inputs + passes * (index + 8 * n))


def _coefficients(poly: float | Sequence[float]) -> list[float]:
    """A number or some, PyTorch's and NumPy's among them, as floats."""
    found = poly.tolist() if hasattr(poly, "tolist") else poly
    found = [found] if isinstance(found, Real) else found
    if not isinstance(found, Sequence) or not all(isinstance(eps, Real) and math.isfinite(eps) for eps in found):
        raise ValueError(f"poly is a number or some, all finite, got {poly!r}")
    return [float(eps) for eps in found]


def _check(e, c, targets, bias, softcap, label_smoothing, z_loss, reduction, shift, accumulate, gradients, tile) -> None:
    if e.ndim < 1 or c.ndim != 2 or e.shape[-1] != c.shape[1]:
        raise ValueError(f"e is (..., d) and c is (v, d), got {tuple(e.shape)} and {tuple(c.shape)}")
    if targets.shape != e.shape[:-1]:
        raise ValueError(f"targets have the shape of e without its last axis, {tuple(e.shape[:-1])}, got {tuple(targets.shape)}")
    if bias is not None and bias.shape != c.shape[:1]:
        raise ValueError(f"bias has the shape {tuple(c.shape[:1])}, got {tuple(bias.shape)}")
    if e.dtype not in DTYPES or any(x is not None and x.dtype != e.dtype for x in (c, bias)):
        raise ValueError(f"e, c and bias have one dtype of {DTYPES}, got {[x.dtype for x in (e, c, bias) if x is not None]}")
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets are int64 or int32, got {targets.dtype}")
    if any(x is not None and x.device != e.device for x in (c, targets, bias)):
        raise ValueError("e, c, targets and bias are on one device")
    if len(c) == 0 or c.shape[1] == 0:
        raise ValueError(f"c needs at least one word and one dimension, got {tuple(c.shape)}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap is None or a positive number, got {softcap}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is in [0, 1], got {label_smoothing}")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss is a number from 0 on, got {z_loss}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is 'mean', 'sum' or 'none', got {reduction!r}")
    if shift and not (targets.ndim and 0 <= shift < targets.shape[-1]):
        raise ValueError(f"shift is in [0, {targets.shape[-1] if targets.ndim else 1}), got {shift}")
    if accumulate not in ("fp32", "compensated", "input"):
        raise ValueError(f"accumulate is 'fp32', 'compensated' or 'input', got {accumulate!r}")
    if gradients not in ("auto", "forward", "backward"):
        raise ValueError(f"gradients is 'auto', 'forward' or 'backward', got {gradients!r}")
    if tile is not None and (len(tile) != 2 or min(tile) < 1):
        raise ValueError(f"tile is a positive number of tokens and one of words, got {tile}")


def _form_in_forward(e: Tensor, gradients: str, backend: str, reduction: str, sort_vocabulary: bool) -> bool:
    possible = backend == "torch" and reduction != "none" and not sort_vocabulary
    if gradients == "forward" and not possible:
        raise ValueError("gradients='forward' is for the PyTorch body, a reduction to a scalar and an unsorted vocabulary")
    return possible and (gradients == "forward" or (gradients == "auto" and e.dtype in (torch.float32, torch.float64)))


_INPUTS = "Tensor e, Tensor c, Tensor targets, Tensor? bias"
_SETTINGS = (
    "str backend, float softcap, float label_smoothing, float z_loss, float[] poly, int ignore_index, str reduction, "
    "float filter_eps, bool filter_e, bool filter_c, bool sort_vocabulary, str accumulate, SymInt tile_tokens, SymInt tile_words"
)


@torch.library.custom_op(
    "paperclaims::cut_cross_entropy",
    mutates_args=(),
    schema=f"({_INPUTS}, bool form_e, bool form_c, bool form_bias, {_SETTINGS})"
    " -> (Tensor loss, Tensor lse, Tensor pull, Tensor grad_e, Tensor grad_c, Tensor grad_bias)",
)
def _operator(e, c, targets, bias, form_e, form_c, form_bias, backend, *options):
    """Reduced loss, log-sum-exp (n,), and, empty otherwise, the pull (n,) of a polynomial and the gradients asked for."""
    options = Options(*options)
    valid = targets != options.ignore_index
    check_targets(targets, valid, len(c))
    count = valid.sum()
    formed = Gradients(None, None, None)
    if backend == "triton":
        loss, lse, pull = _triton_body().forward(e, c, targets, bias, options)
    else:
        index = kept(valid)
        needs = form_e, form_c, form_bias
        if any(needs):
            tokens = count.clamp(min=1) if options.reduction == "mean" else torch.ones_like(count)
            scale = tokens.to(torch.promote_types(e.dtype, torch.float32)).reciprocal()
            loss, lse, pull, formed = torch_body.forward_and_gradients(e[index], c, targets[index], bias, scale, needs, options)
        else:
            loss, lse, pull = torch_body.forward(e[index], c, targets[index], bias, options)
        loss, lse, pull = (spread(x, index, len(e)) for x in (loss, lse, pull))
        formed = formed._replace(e=spread(formed.e, index, len(e)))
    if options.reduction == "mean":
        loss = loss.sum() / count
    elif options.reduction == "sum":
        loss = loss.sum()
    return loss, lse, *(e.new_empty(0) if x is None else x for x in (pull, *formed))


@_operator.register_fake
def _(e, c, targets, bias, form_e, form_c, form_bias, backend, *options):
    options = Options(*options)
    wide = torch.promote_types(e.dtype, torch.float32)
    loss = e.new_empty(targets.shape if options.reduction == "none" else (), dtype=wide)
    shapes = zip((form_e, form_c, form_bias), (e, c, bias), strict=True)
    lse, pull = e.new_empty(targets.shape, dtype=wide), e.new_empty(targets.shape, dtype=wide) if options.poly else e.new_empty(0)
    return loss, lse, pull, *(x.new_empty(x.shape) if form else e.new_empty(0) for form, x in shapes)


@torch.library.custom_op(
    "paperclaims::cut_cross_entropy_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_INPUTS}, Tensor lse, Tensor pull, bool need_e, bool need_c, bool need_bias, {_SETTINGS})"
    " -> (Tensor grad_e, Tensor grad_c, Tensor grad_bias)",
)
def _backward_operator(grad, e, c, targets, bias, lse, pull, need_e, need_c, need_bias, backend, *options):
    options = Options(*options)
    pull = pull if options.poly else None
    valid, weights, scale = targets != options.ignore_index, None, grad
    if options.reduction == "mean":
        scale = grad / valid.sum().clamp(min=1)
    elif options.reduction == "none":  # at most 1 in size, so that 16-bit gradients of logits keep their precision
        scale = torch.where(valid, grad, 0).abs().amax() if len(grad) else grad.sum()
        weights = grad / torch.where(scale > 0, scale, 1)
    needs = need_e, need_c, need_bias
    if backend == "triton":
        weights = valid.to(lse.dtype) if weights is None else torch.where(valid, weights, 0)
        formed = _triton_body().backward(e, c, targets, bias, lse, pull, weights, scale, needs, options)
    else:
        index = kept(valid)
        lse, pull, weights = (None if x is None else x[index] for x in (lse, pull, weights))
        formed = torch_body.backward(e[index], c, targets[index], bias, lse, pull, weights, scale, needs, options)
        formed = formed._replace(e=spread(formed.e, index, len(e)))
    return tuple(e.new_empty(0) if x is None else x for x in formed)


@_backward_operator.register_fake
def _(grad, e, c, targets, bias, lse, pull, need_e, need_c, need_bias, backend, *options):
    shapes = zip((need_e, need_c, need_bias), (e, c, bias), strict=True)
    return tuple(x.new_empty(x.shape) if need else e.new_empty(0) for need, x in shapes)


def _setup_context(ctx, inputs, output):
    e, c, targets, bias, form_e, form_c, form_bias, *ctx.settings = inputs
    _, lse, pull, *formed = output
    ctx.save_for_backward(e, c, targets, bias, lse, pull)
    ctx.formed = [x.detach() for x in formed] if form_e or form_c or form_bias else None
    ctx.set_materialize_grads(False)  # the other outputs are as large as the inputs


def _differentiate(ctx, grad, *_):
    """Scales the gradients formed in the forward pass, in place the first time, or computes them from tiles.

    With `create_graph` always from tiles: that operator refuses a second derivative, where a scaled constant would lack it.
    """
    needs = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]
    if grad is None:
        return (None,) * (len(ctx.settings) + 7)
    if ctx.formed is None or torch.is_grad_enabled():
        formed = _backward_operator(grad, *ctx.saved_tensors, *needs, *ctx.settings)
    elif type(grad) is Tensor:  # not while a graph is traced
        formed, ctx.formed = [scale_(x, grad) for x in ctx.formed], None
    else:
        formed = [x * grad for x in ctx.formed]
    by_e, by_c, by_bias = (x if need else None for x, need in zip(formed, needs, strict=True))
    return by_e, by_c, None, by_bias, *[None] * (len(ctx.settings) + 3)


_operator.register_autograd(_differentiate, setup_context=_setup_context)


@register_flop_formula(torch.ops.paperclaims.cut_cross_entropy)
def _flops(e, c, targets, bias, form_e, form_c, form_bias, *_, **__) -> int:
    return 2 * e[0] * c[0] * c[1] * (1 + form_e + form_c)


@register_flop_formula(torch.ops.paperclaims.cut_cross_entropy_backward)
def _flops_backward(grad, e, c, targets, bias, lse, pull, need_e, need_c, *_, **__) -> int:
    return 2 * e[0] * c[0] * c[1] * (1 + need_e + need_c)


def _triton_body():
    from paperclaims.kernels.losses import cut_cross_entropy_triton

    return cut_cross_entropy_triton
