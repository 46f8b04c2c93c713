"""Sums of Gaussian kernels in one operator that never holds the Gram matrix: what Cauchy-Schwarz divergences are made of.

Source: Yu, Yu, Løkse, Jenssen, Príncipe, "Cauchy-Schwarz Divergence Information Bottleneck for Regression", 2024, arXiv
2404.17951. Every term of its estimators is a sum over rows of Gaussian Gram matrices or of their entrywise products, and such a
product is again the Gaussian kernel of the points side by side: exp(-|x-x'|^2/2s^2) exp(-|y-y'|^2/2r^2) belongs to (x/s, y/r).
So one operator, n + m numbers for n x m kernels, serves them all; its logarithm does not underflow.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from paperclaims.kernels.backend import choose_backend
from paperclaims.kernels.losses import distances_torch as torch_body
from paperclaims.kernels.losses.distances_torch import Options
from paperclaims.kernels.losses.tiles import compute_dtype

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def gaussian_log_sums(x: Tensor, w: Tensor, *, backend: str = "auto", tile: tuple[int, int] | None = None) -> Tensor:
    """log sum_j exp(-|x_i - w_j|^2 / 2), without the matrix of kernels.

    Args:
        x: points, shape (n, d), any strides.
        w: other points (or the same), shape (m, d), same dtype.
        backend: "auto", "torch" (tiled PyTorch, any device) or "triton" (float64 excepted).
        tile: rows and columns of a tile of kernels (for Triton powers of two, at least 16); None: chosen for the sizes at hand.

    Returns:
        Shape (n,); float32 for 16-bit inputs; -inf where m is 0.

    Raises:
        ValueError: shapes, dtypes, devices or settings that do not fit.

    In float32 a squared distance is known to about 1e-7 (|x|^2 + |w|^2): points far from the origin are best centred first.
    `backward` and `torch.compile` work; `torch.func.grad` and second derivatives do not pass through a registered operator: the
    dense form in `paperclaims.impl.losses.cs_ib` has them.
    """
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"x is (n, d) and w is (m, d), got {tuple(x.shape)} and {tuple(w.shape)}")
    if x.dtype not in DTYPES or w.dtype != x.dtype:
        raise ValueError(f"x and w have one dtype of {DTYPES}, got {x.dtype} and {w.dtype}")
    if x.device != w.device:
        raise ValueError("x and w are on one device")
    if tile is not None and (len(tile) != 2 or min(tile) < 1):
        raise ValueError(f"tile is a positive number of rows and one of columns, got {tile}")
    backend = choose_backend(backend, x) if backend != "auto" or x.dtype != torch.float64 else "torch"
    return _operator(x, w, backend, *(tile or default_tile(x.element_size(), backend)))


def default_tile(itemsize: int, backend: str) -> tuple[int, int]:
    """Rows and columns of a tile of kernels: in registers on a GPU, in a CPU's cache otherwise."""
    if backend == "triton":
        return (128, 128) if itemsize < 4 else (64, 64)
    return 512, 512


@torch.library.custom_op(
    "paperclaims::gaussian_log_sums",
    mutates_args=(),
    schema="(Tensor x, Tensor w, str backend, SymInt tile_rows, SymInt tile_columns) -> Tensor",
)
def _operator(x, w, backend, tile_rows, tile_columns):
    return _body(backend).log_sums(x, w, None, Options(tile_rows=tile_rows, tile_columns=tile_columns))


@_operator.register_fake
def _(x, w, *_settings):
    return x.new_empty(x.shape[:1], dtype=compute_dtype(x.dtype))


@torch.library.custom_op(
    "paperclaims::gaussian_log_sums_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor w, Tensor lse, bool need_x, bool need_w, str backend, SymInt tile_rows, "
    "SymInt tile_columns) -> (Tensor grad_x, Tensor grad_w)",
)
def _backward_operator(grad, x, w, lse, need_x, need_w, backend, tile_rows, tile_columns):
    options = Options(tile_rows=tile_rows, tile_columns=tile_columns)
    formed = _body(backend).gradients(x, w, None, lse, grad, None, (need_x, need_w), options)
    return tuple(x.new_empty(0) if one is None else one for one in formed)


@_backward_operator.register_fake
def _(grad, x, w, lse, need_x, need_w, *_settings):
    return tuple(one.new_empty(one.shape if need else 0) for one, need in ((x, need_x), (w, need_w)))


def _setup_context(ctx, inputs, output):
    x, w, *ctx.settings = inputs
    ctx.save_for_backward(x, w, output)


def _differentiate(ctx, grad):
    needs = ctx.needs_input_grad[:2]
    formed = _backward_operator(grad, *ctx.saved_tensors, *needs, *ctx.settings)
    return *(one if need else None for one, need in zip(formed, needs, strict=True)), *(None,) * len(ctx.settings)


_operator.register_autograd(_differentiate, setup_context=_setup_context)


@register_flop_formula(torch.ops.paperclaims.gaussian_log_sums)
def _flops(x, w, *_, **__) -> int:
    return 2 * x[0] * w[0] * w[1]


@register_flop_formula(torch.ops.paperclaims.gaussian_log_sums_backward)
def _flops_backward(grad, x, w, lse, need_x, need_w, *_, **__) -> int:
    return 2 * x[0] * w[0] * w[1] * (1 + need_x + need_w)


def _body(backend: str):
    if backend == "torch":
        return torch_body
    from paperclaims.kernels.losses import distances_triton

    return distances_triton
