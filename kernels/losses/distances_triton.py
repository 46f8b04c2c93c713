"""Log-sum-exps of scores that fall with the squared distance of two points, over tiles, in Triton.

The same sums and gradients as in `distances_torch`, whose docstring defines them. One kernel keeps a tile of scores in registers
and merges its log-sum-exp into a running one. In the backward pass another computes the tile again and writes the derivatives by
the squared distances for one chunk of columns; two products with it give both gradients. Every sum has one owner: the same bits
in every run. Inputs are 16-bit or float32; sums are float32.

A near pair's distance is computed from the difference of the points, but in the gradient only the pair of a point and its own
column is: others come out of the products, with an error of rounding times |x| / distance. In float16 a derivative beyond the
largest number is cut off there.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from paperclaims.kernels.backend import Launch, blocks
from paperclaims.kernels.backend import launch as start_kernel
from paperclaims.kernels.losses import distances_torch as torch_body
from paperclaims.kernels.losses.distances_torch import NEAR, Options
from paperclaims.kernels.losses.tiles import compute, inside
from paperclaims.kernels.losses.tiles_triton import (
    add_log_sum_exp,
    check,
    chunk_words,
    dense,
    dot_tile,
    parts,
    product,
    tile_constants,
)

ROWS = 1024  # of points that are converted at once
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
EPSILON = tl.constexpr(torch.finfo(torch.float32).eps)


def log_sums(x: Tensor, w: Tensor, own: Tensor | None, options: Options, launch: Launch = start_kernel) -> Tensor:
    """As `distances_torch.log_sums`, float32."""
    check(x, options.tile, launch)
    (n, d), v = x.shape, len(w)
    blocks_n, number, columns = parts(n, v, options.tile)
    partial = x.new_empty((number, n), dtype=torch.float32)
    launch(
        _sum_kernel,
        (blocks_n * number,),
        *(x, w, _norms(x), _norms(w), dense(own), partial, n, v, d, columns),
        *(*x.stride(), *w.stride(), options.power, options.eps),
        **_constants(x, own, options),
    )
    return partial.logsumexp(0)


def gradients(
    x: Tensor,
    w: Tensor,
    own: Tensor | None,
    lse: Tensor,
    weights: Tensor,
    pull: Tensor | None,
    needs: Sequence[bool],
    options: Options,
    launch: Launch = start_kernel,
    chunk: int | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """As `distances_torch.gradients`; `chunk` columns of derivatives are held at once (None: by `chunk_words`)."""
    check(x, options.tile, launch)
    (n, d), v = x.shape, len(w)
    chunk = max(min(chunk or chunk_words(n, v, d, x.element_size(), "fp32"), v), 1)
    own, lse, norms, norms_w = dense(own), dense(lse), _norms(x), _norms(w)
    scale = weights.abs().amax() if n else weights.sum()  # near 1 in size, so that 16-bit derivatives keep their precision
    if options.power and n:  # a derivative by a squared distance is as small as that distance is large
        scale = scale / norms.mean().clamp(min=TINY.value)
    safe = torch.where(scale > 0, scale, 1)
    weights, pull = dense(weights / safe), None if pull is None else pull / safe
    stored, total = x.new_empty(n, chunk), norms.new_zeros(n, 1)
    by_x = torch.zeros(x.shape, dtype=torch.float32, device=x.device) if needs[0] else None
    by_w = torch.empty(w.shape, dtype=w.dtype, device=w.device) if needs[1] else None
    for start in range(0, v, chunk):
        columns = slice(start, min(start + chunk, v))
        tile, b = stored[:, : columns.stop - start], w[columns]
        launch(
            _slope_kernel,
            (triton.cdiv(n, options.tile_rows) * triton.cdiv(len(b), options.tile_columns),),
            *(x, b, norms, norms_w[columns], own, lse, weights, tile, n, len(b), d, start),
            *(*x.stride(), *w.stride(), stored.stride(0), options.power, options.eps),
            **_constants(x, own, options),
            CUT=x.dtype == torch.float16,
        )
        if needs[0]:
            product(tile, b, by_x, None, None, None, None, None, options.tile, launch)
            total += tile.sum(1, dtype=torch.float32, keepdim=True)
        if needs[1]:
            by_b = torch.zeros(b.shape, dtype=torch.float32, device=w.device)
            product(tile.T, x, by_b, None, None, None, None, None, options.tile[::-1], launch)
            sums = tile.sum(0, dtype=torch.float32)[:, None]
            by_b.neg_().addcmul_(sums, compute(b), value=1 + options.eps)
            if own is not None:
                _add_own(None, by_b, x, b, own - start, pull, options)
            by_w[columns] = by_b.mul_(scale).to(w.dtype)
    if needs[0]:
        by_x.neg_()
        for rows in blocks(n, ROWS):
            by_x[rows].addcmul_(total[rows], compute(x[rows]), value=1 + options.eps)
        if own is not None:
            _add_own(by_x, None, x, w, own, pull, options)
        by_x = by_x.mul_(scale).to(x.dtype)
    return by_x, by_w


def _add_own(by_x: Tensor | None, by_w: Tensor | None, x, w, own: Tensor, pull: Tensor, options: Options) -> None:
    """Adds the gradients of the pairs of a point and its own column, where that lies among those of `w`."""
    for rows in blocks(len(x), ROWS):
        place, within = inside(own[rows], len(w))
        strength = torch.where(within, pull[rows], 0)
        first, second = torch_body.pair_gradients(compute(x[rows]), compute(w[place]), strength, options)
        if by_x is not None:
            by_x[rows] += first
        if by_w is not None:
            by_w.index_add_(0, place, second)


def _norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).square_()


def _constants(x: Tensor, own: Tensor | None, options: Options) -> dict:
    power = options.power > 0
    constants = {"POWER": power, "REFINE": power and options.refine, "HAS_OWN": own is not None, "NEAR": NEAR}
    return constants | tile_constants(x, options.tile)


@triton.jit
def _squares(
    X, W, Norms, NormsW, n, v, in_n, in_v, other, D, x_n, x_d, w_v, w_d, eps,
    POWER: tl.constexpr, REFINE: tl.constexpr, NEAR: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """D of the rows n of X and v of W; `other` says which pairs are not a point and its own column."""
    tile = dot_tile(X, W, n, v, in_n, in_v, D, x_n, x_d, w_v, w_d, BLOCK_N, BLOCK_V, BLOCK_D, PRECISION)
    norm = tl.load(Norms + n, mask=in_n, other=0.0)[:, None]
    both = norm + tl.load(NormsW + v, mask=in_v, other=0.0)[None, :]
    tile = (1 + eps) * both - 2 * tile
    if REFINE:
        near = other & in_n[:, None] & in_v[None, :] & (tile <= NEAR * norm)
        if tl.max(tl.max(near.to(tl.int32), 1), 0) > 0:
            exact = eps * both
            x_column, w_column = X + n.to(tl.int64) * x_n, W + v.to(tl.int64) * w_v
            for _ in range(0, D):
                a = tl.load(x_column, mask=in_n, other=0.0).to(tl.float32)
                b = tl.load(w_column, mask=in_v, other=0.0).to(tl.float32)
                x_column += x_d
                w_column += w_d
                between = a[:, None] - b[None, :]
                exact += between * between
            tile = tl.where(near, exact, tile)
    least = TINY if POWER else 0.0
    if POWER and not REFINE:
        tile = tl.maximum(tile, norm * EPSILON)
    return tl.maximum(tile, least)


@triton.jit
def _sum_kernel(
    X, W, Norms, NormsW, Own, Partial, N, V, D, columns, x_n, x_d, w_v, w_d, power, eps,
    POWER: tl.constexpr, REFINE: tl.constexpr, HAS_OWN: tl.constexpr, NEAR: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of a block of points over one part of the columns."""
    blocks = tl.cdiv(N, BLOCK_N)
    part = tl.program_id(0) // blocks
    n = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < N
    own = tl.load(Own + n, mask=in_n, other=-1) if HAS_OWN else tl.full((BLOCK_N,), -1, dtype=tl.int64)
    most = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(part * columns, tl.minimum((part + 1) * columns, V), BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        in_v = v < V
        other = own[:, None] != v[None, :]
        tile = _squares(
            X, W, Norms, NormsW, n, v, in_n, in_v, other, D, x_n, x_d, w_v, w_d, eps,
            POWER, REFINE, NEAR, BLOCK_N, BLOCK_V, BLOCK_D, PRECISION,
        )  # fmt: skip
        tile = -0.5 * power * tl.log(tile) if POWER else -0.5 * tile
        most, total = add_log_sum_exp(tl.where(other & in_v[None, :], tile, float("-inf")), most, total)
    tl.store(Partial + part.to(tl.int64) * N + n, most + tl.log(total), mask=in_n)


@triton.jit
def _slope_kernel(
    X, W, Norms, NormsW, Own, Lse, Weights, G, N, V, D, start, x_n, x_d, w_v, w_d, g_n, power, eps,
    POWER: tl.constexpr, REFINE: tl.constexpr, HAS_OWN: tl.constexpr, NEAR: tl.constexpr, CUT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Twice the derivative of the weighted log-sum-exps by a tile of D, zero at a point's own column."""
    blocks = tl.cdiv(N, BLOCK_N)
    n = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    v = (tl.program_id(0) // blocks) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_n, in_v = n < N, v < V
    own = tl.load(Own + n, mask=in_n, other=-1) if HAS_OWN else tl.full((BLOCK_N,), -1, dtype=tl.int64)
    other = own[:, None] != (start + v)[None, :]
    tile = _squares(
        X, W, Norms, NormsW, n, v, in_n, in_v, other, D, x_n, x_d, w_v, w_d, eps,
        POWER, REFINE, NEAR, BLOCK_N, BLOCK_V, BLOCK_D, PRECISION,
    )  # fmt: skip
    lse = tl.load(Lse + n, mask=in_n, other=0.0)[:, None]
    weight = tl.load(Weights + n, mask=in_n, other=0.0)[:, None]
    if POWER:
        exponent = tl.minimum((-0.5 * power - 1) * tl.log(tile) - lse, 80.0)  # float32 ends at 88
        tile = tl.where(other & (tile > TINY), -power * tl.exp(exponent), 0.0)
    else:
        tile = tl.where(other, -tl.exp(-0.5 * tile - lse), 0.0)
    tile *= weight
    if CUT:
        tile = tl.minimum(tl.maximum(tile, -65504.0), 65504.0)
    place = G + n.to(tl.int64)[:, None] * g_n + v[None, :]
    tl.store(place, tile.to(G.dtype.element_ty), mask=in_n[:, None] & in_v[None, :])
